"""Files of another precision in a bundle: the new bundle appears as a whole, or the old one stays."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import onnx

from moebius_export.errors import ExportError
from moebius_export.graph.opened import Opened, Weights, opened
from moebius_export.graph.weights_file import weights_file
from moebius_export.precision.kept_functions import check_kept
from moebius_export.precision.plan import Plan, plan_bytes, read_plan
from moebius_export.precision.typed import typed
from moebius_export.trajectories.measure import Progress
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import FileInfo, GraphFile, GraphName, Manifest, Precision, write_manifest
from moebius_runtime.files import atomic_write, link_file, placed_whole, sha256_file


def plans_of(bundle: Bundle, precision: Precision) -> dict[GraphName, Plan]:
    """Returns the precision plans that lie in a bundle, edited or not.

    Raises:
        ExportError: a graph has no plan of that precision, a file is not a plan, or a plan belongs to another graph or
            to other float32 files.
    """
    command = f"moebius-export precision {bundle.path} --to {precision}"
    plans: dict[GraphName, Plan] = {}
    for name in bundle.manifest.graphs:
        path = plan_path(bundle, name, precision, command)
        plan = plans[name] = read_plan(path)
        check_source(bundle, name, path, (plan.graph, plan.onnx_sha256, plan.weights_sha256))
        if plan.precision != precision:
            raise ExportError(f"{path}: it is a plan for {plan.precision}; expected one for {precision}")
    return plans


def plan_path(bundle: Bundle, name: GraphName, precision: Precision, command: str) -> Path:
    """Returns the path of a graph's plan in a bundle.

    Raises:
        ExportError: the bundle has no plan of that precision (`command` makes one), or it is a link out of the bundle.
    """
    file = bundle.graph(name).files.get(precision)
    if file is None or file.plan is None:
        raise ExportError(f"{bundle.path}: {name} has no plan for {precision}; make one with `{command}`")
    path = bundle.path / file.plan
    if not path.resolve().is_relative_to(bundle.path.resolve()):
        raise ExportError(f"{path} is a link that leaves the bundle; put the plan itself there")
    return path


def check_source(bundle: Bundle, name: GraphName, path: Path, planned: tuple[str, str, str | None]) -> None:
    """Checks that a plan was made for a graph's float32 files.

    Args:
        bundle, name: the graph.
        path: of the plan, for the message.
        planned: what the plan names: its graph, and the SHA-256 of the ONNX file and of the weights file.

    Raises:
        ExportError: it was made for another graph or for other files, or the bundle has no float32 files.
    """
    files, source = bundle.manifest.files, bundle.graph(name).files.get("fp32")
    if source is None:
        raise ExportError(f"{bundle.path}: {name} has no fp32 file, which a plan applies to; export the bundle again")
    found = (name, files[source.model].sha256, files[source.weights].sha256 if source.weights else None)
    if planned != found:
        raise ExportError(
            f"{path}: it is a plan of {planned[0]} for the file {planned[1][:16]}..., the bundle's {name} is "
            f"{found[1][:16]}... Make it again, without --reapply."
        )


def write_typed(bundle: Bundle, plans: Mapping[GraphName, Plan], *, only: bool, progress: Progress) -> Manifest:
    """Writes the mixed-precision files and their plans into the bundle; see `write_precision`.

    Args:
        bundle: with its float32 files.
        plans: one for each graph, all of one precision.
        only: as for `write_precision`.
        progress: called with each graph.

    Raises:
        ExportError: a plan does not fit its graph.
        OutputError: the bundle cannot be written.
    """
    (precision,) = {plan.precision for plan in plans.values()}
    graphs = {name: Opened(opened(bundle.model_file(name), plan.keep)) for name, plan in plans.items()}
    for name, plan in plans.items():
        check_kept([graphs[name]], plan.keep, plan.precision)
        plan.check(graphs[name])

    def model(name: GraphName) -> onnx.ModelProto:
        reader = Weights((bundle.path / bundle.graph(name).files["fp32"].model).parent)
        return typed(graphs[name], reader, plans[name].computes, plans[name].stores)

    contents = {name: plan_bytes(plan) for name, plan in plans.items()}
    return write_precision(bundle, precision, model, contents, only=only, progress=progress)


def write_precision(
    bundle: Bundle,
    precision: Precision,
    model: Callable[[GraphName], onnx.ModelProto],
    plans: Mapping[GraphName, bytes | None],
    *,
    only: bool,
    progress: Progress,
) -> Manifest:
    """Writes the files of a precision into a bundle, in place of older files of that precision.

    The new bundle is built beside the old one, with hard links to the files that stay, and replaces it when it is
    complete. Graphs of one folder share one weights file. Each model passes `onnx.checker`.

    Args:
        bundle: with its float32 files.
        precision: of the new files.
        model: returns the new model of a graph; its weights are in memory.
        plans: the graphs to write, each with the bytes of its plan or None. Other graphs get no file of this precision.
        only: leave out all other files of these graphs, and the engines, which were built from them.
        progress: called with each graph, the number of graphs done and their total.

    Raises:
        ExportError: as `model`.
        OutputError: the bundle cannot be written.
    """
    with placed_whole(bundle.path) as folder:
        files = linked(bundle, folder, precision, only, plans.keys())
        infos = {
            name: info.model_copy(update={"files": {key: f for key, f in info.files.items() if key != precision}})
            for name, info in bundle.manifest.every_graph.items()
        }
        groups: dict[str, list[GraphName]] = {}
        for name in plans:
            groups.setdefault(Path(infos[name].files["fp32"].model).parent.as_posix(), []).append(name)
        done = 0
        for group, names in groups.items():
            data = f"{group}/model_{precision}.onnx.data"
            with weights_file(folder / group, Path(data).name) as weights:
                for name in names:
                    progress(f"write {name}", done, len(plans))
                    done += 1
                    stem = Path(infos[name].files["fp32"].model).stem
                    path, plan = f"{group}/{stem}_{precision}.onnx", None
                    new = model(name)
                    weights.add(new)
                    _write(folder / path, new.SerializeToString(deterministic=True))
                    del new
                    if (content := plans[name]) is not None:
                        plan = f"{group}/{stem.replace('model', 'precision', 1)}_{precision}.json"
                        _write(folder / plan, content)
                    file = GraphFile(model=path, weights=data, plan=plan)
                    kept = {} if only else infos[name].files
                    infos[name] = infos[name].model_copy(update={"files": {**kept, precision: file}})
            for name in names:
                onnx.checker.check_model(str(folder / infos[name].files[precision].model))
                files |= {path: file_info(folder / path) for path in infos[name].files[precision].paths}
        graphs = {name: infos[name] for name in bundle.manifest.graphs}
        whole = {
            name: infos[name]
            for name in bundle.manifest.decoders
            if all(path in files for file in infos[name].files.values() for path in file.paths)
        }
        update = {"graphs": graphs, "decoders": whole, "files": dict(sorted(files.items()))}
        manifest = bundle.manifest.model_copy(update=update)
        manifest = Manifest.model_validate(manifest.model_dump())
        write_manifest(manifest, folder)
    return manifest


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as stream:
        stream.write(content)


def linked(
    bundle: Bundle, folder: Path, precision: Precision, only: bool, graphs: Collection[GraphName]
) -> dict[str, FileInfo]:
    """Links the files that stay into the new folder; returns those of the manifest among them.

    Args:
        bundle: the old one.
        folder: the new one.
        precision: whose files are left out.
        only: leave out all files of `graphs` too, the decoders that share weights with them, and the engines.
        graphs: the graphs that are written.
    """
    infos = bundle.manifest.every_graph
    old = {path for info in infos.values() if (f := info.files.get(precision)) for path in f.paths}
    if only:
        old |= {path for name in graphs for f in infos[name].files.values() for path in f.paths}
        decoders = [file for info in bundle.manifest.decoders.values() for file in info.files.values()]
        old |= {path for file in decoders if old & set(file.paths) for path in file.paths}
    for path in sorted(bundle.path.rglob("*")):
        name = path.relative_to(bundle.path).as_posix()
        if name in old or name == "manifest.json" or (only and name.startswith("engines/")):
            continue
        if path.is_dir() and not path.is_symlink():
            (folder / name).mkdir(exist_ok=True)
        else:
            link_file(path, folder / name)
    return {name: info for name, info in bundle.manifest.files.items() if name not in old}


def file_info(path: Path) -> FileInfo:
    """Returns the size and SHA-256 of a file, for the manifest."""
    return FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
