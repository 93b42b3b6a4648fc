"""Writes a static site that runs a bundle in a browser: docs/web.md describes its files."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import onnx

from moebius_export.errors import ExportError
from moebius_export.onnx_export.inline import inline_bundle
from moebius_export.precision.quick import make_plans, quick_options
from moebius_export.precision.write import write_typed
from moebius_export.web.onnxruntime_web import VERSION, runtime_files
from moebius_export.web.shards import SHARD_BYTES, Shard, Volume, refer_to, volume_bytes, volumes_of, write_shards
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.check_values import TOLERANCE
from moebius_runtime.bundle.manifest import GraphName, Manifest
from moebius_runtime.files import atomic_write, link_file, placed_whole, sha256_file
from moebius_runtime.settings.distilled import distilled_settings
from moebius_runtime.settings.modes import DEFAULT_MODE, MODES
from moebius_runtime.settings.options import InpaintOptions, settings_of

SCHEMA_VERSION = 1
SITE_FILE = "site.json"
SitePrecision = Literal["fp32", "fp16"]

ENGINE_META = '<meta name="engine" content="server">'
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self' blob:; worker-src 'self' blob:; base-uri 'none'; form-action 'none'"
)
_SITE_META = f'<meta name="engine" content="site">\n<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
_SERVER_ONLY = ("docs.html", "js/docs.js")
_WORKER = "js/site/offline.js"  # of the page; a service worker serves the folder that it lies in and those below
_PRUNED = ("files", "parity", "rewrites")  # of the manifest: they describe files that the site does not hold


def export_site(
    path: str | Path,
    out: Path,
    *,
    fp16: bool = False,
    onnxruntime_web: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    note: Callable[[str], None] = lambda text: None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Writes the site whole or not at all, and returns the content of its `site.json`.

    Args:
        path: of a bundle. Its graphs are inlined and rewritten for WebGPU (`moebius_export.graph.webgpu`).
        out: a new folder, or an older site, which is replaced.
        fp16: take the mixed-precision files of the bundle, or make them by a plan where it has none.
        onnxruntime_web: see `runtime_files`.
        progress: called with each stage.
        note: called with messages on the precision plan.
        shard_bytes: the most of one shard.

    Raises:
        BundleError: the bundle is damaged.
        ExportError: `out` is another folder than a site, or a graph cannot be inlined.
        InputError: the folder of onnxruntime-web is not that of the pinned version.
        OutputError: the site cannot be written.
    """
    bundle = Bundle.open(path)
    if out.exists() and not (out / SITE_FILE).is_file():
        raise ExportError(f"--out {out} exists and is not a site; name a new folder")
    progress("onnxruntime-web")
    runtime = runtime_files(onnxruntime_web)
    precision: SitePrecision = "fp16" if fp16 else "fp32"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".web.", dir=out.parent) as scratch:
        name = bundle.path.resolve().name
        if fp16:
            bundle = _with_fp16(bundle, Path(scratch) / "fp16", progress, note)
        inline_bundle(bundle.path, Path(scratch) / "inlined", progress, for_gpu=True)
        bundle = Bundle.open(Path(scratch) / "inlined")
        with placed_whole(out) as folder:
            for file, data in runtime.items():
                _write(folder / "ort" / file, data)
            graphs = _graphs(bundle, precision, folder, progress, shard_bytes)
            site = _description(bundle.manifest, name, precision, graphs)
            _write(folder / SITE_FILE, (json.dumps(site, indent=1) + "\n").encode())
            _write_page(folder)
    return site


def _with_fp16(bundle: Bundle, folder: Path, progress: Callable[[str], None], note: Callable[[str], None]) -> Bundle:
    """The bundle itself where every graph has an fp16 file, else a copy by links to which they are added."""
    if all("fp16" in graph.files for graph in bundle.manifest.graphs.values()):
        return bundle

    def stage(text: str, done: int, total: int | None) -> None:
        progress(f"fp16: {text}")

    plans = make_plans(bundle, quick_options(to="fp16"), stage, note)  # messages name the user's bundle, not the copy
    for name in (*bundle.manifest.files, "manifest.json"):
        link_file(bundle.path / name, folder / name)
    write_typed(Bundle.open(folder), plans, only=False, progress=stage)
    return Bundle.open(folder)


def _graphs(
    bundle: Bundle, precision: SitePrecision, site: Path, progress: Callable[[str], None], limit: int
) -> dict[GraphName, dict[str, Any]]:
    """Writes the shards of every graph that has a file of the precision; graphs of one weights file share volumes."""
    groups: dict[str | None, dict[GraphName, tuple[Path, onnx.ModelProto]]] = {}
    for name, graph in bundle.manifest.every_graph.items():
        if precision not in graph.files:
            if name in bundle.manifest.graphs:
                raise ExportError(f"{bundle.path}: {name} has no {precision} file; export the bundle with it")
            continue
        file = bundle.model_file(name, precision)
        model = onnx.load(str(file), load_external_data=False)
        groups.setdefault(graph.files[precision].weights, {})[name] = (file, model)
    described: dict[GraphName, dict[str, Any]] = {}
    for weights, group in groups.items():
        stem = "weights" if weights is None else weights.split("/")[0]
        volumes = volumes_of((model for _, model in group.values()), stem, limit)
        written: dict[Volume, list[Shard]] = {}
        for volume in volumes:
            assert weights is not None
            progress(f"shards of {volume.name}")
            written[volume] = write_shards(volume_bytes(bundle.path / weights, volume), site, limit)
        for name, (_, model) in group.items():
            used = refer_to(model, volumes)
            shards = write_shards([model.SerializeToString(deterministic=True)], site, limit)
            described[name] = {
                "model": [asdict(shard) for shard in shards],
                "data": {volume.name: [asdict(shard) for shard in written[volume]] for volume in used},
                "nodes": len(model.graph.node),
            }
    return described


def _description(
    manifest: Manifest, name: str, precision: SitePrecision, graphs: dict[GraphName, dict[str, Any]]
) -> dict[str, Any]:
    """The content of `site.json`: what the page and its engine need to know."""
    content = manifest.model_dump(mode="json")
    for key in _PRUNED:
        del content[key]
    for kind in ("graphs", "decoders"):
        content[kind] = {graph: info for graph, info in content[kind].items() if graph in graphs}
        for info in content[kind].values():
            del info["files"]
    steps = {}
    for mode in MODES:
        options = InpaintOptions(mode=mode)
        settings = settings_of(options, manifest.defaults, manifest.modes)
        steps[mode] = distilled_settings(settings, options, manifest).steps
    return {
        "schema_version": SCHEMA_VERSION,
        "model": name,
        "test_weights": manifest.stand_in,
        "precision": precision,
        "tolerance": TOLERANCE[precision],
        "onnxruntime_web": VERSION,
        "mode": DEFAULT_MODE,
        "mode_steps": steps,
        "size": sum(shard_sizes(graphs).values()),
        "graphs": graphs,
        "manifest": content,
    }


def shard_sizes(graphs: Mapping[Any, Any]) -> dict[str, int]:
    """The bytes of each shard of a site by its SHA-256, from `graphs` of its `site.json`; graphs share shards."""
    return {s["sha256"]: s["size"] for g in graphs.values() for part in (g["model"], *g["data"].values()) for s in part}


def _write_page(site: Path) -> None:
    """Copies the page of moebius-serve with the site's engine, and lists its files for offline use."""
    page = resources.files("moebius_serve") / "page"
    for source in _files(page):
        if source in (*_SERVER_ONLY, "index.html", _WORKER):
            continue
        _write(site / "page" / source, (page / source).read_bytes())
    index = (page / "index.html").read_text(encoding="utf-8")
    if index.count(ENGINE_META) != 1:
        raise ExportError(f"the page of moebius-serve lacks {ENGINE_META}; install moebius-edge again")
    _write(site / "index.html", index.replace(ENGINE_META, _SITE_META).encode())
    files = {
        path.relative_to(site).as_posix(): sha256_file(path)
        for path in sorted(site.rglob("*"))
        if path.is_file() and path.parent.name != "shards"
    }
    version = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    listed = json.dumps({"version": version, "files": files}, indent=1)
    worker = (page / _WORKER).read_text(encoding="utf-8")
    _write(site / "offline.js", f"self.SITE = {listed};\n\n{worker}".encode())


def _files(folder: Any, prefix: str = "") -> list[str]:
    """Paths of all files below a folder of package resources."""
    found = []
    for entry in sorted(folder.iterdir(), key=lambda one: str(one.name)):
        if entry.is_dir():
            found += _files(entry, f"{prefix}{entry.name}/")
        else:
            found.append(prefix + entry.name)
    return found


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as stream:
        stream.write(data)
