"""Typed files into a bundle, whole or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from moebius_export.errors import ExportError
from moebius_export.placing import link_file, placed_whole
from moebius_export.precision.graph import Opened, Weights, opened
from moebius_export.precision.kept import check_kept
from moebius_export.precision.measure import Say
from moebius_export.precision.plan import Plan, read_plan, write_plan
from moebius_export.precision.typed import typed
from moebius_export.weights_file import weights_file
from moebius_runtime.bundle import Bundle
from moebius_runtime.files import atomic_write, sha256_file
from moebius_runtime.manifest import FileInfo, GraphFile, GraphName, Manifest, Precision, write_manifest


def plans_of(bundle: Bundle, precision: Precision) -> dict[GraphName, Plan]:
    """The plans that lie in a bundle, as they are now, edited or not.

    Raises:
        ExportError: there is none of that precision, one is no plan, or one is of another graph or another float32
            file than the bundle's.
    """
    plans: dict[GraphName, Plan] = {}
    for name, info in bundle.manifest.graphs.items():
        file = info.files.get(precision)
        if file is None or file.plan is None:
            raise ExportError(
                f"{bundle.path}: {name} has no plan for {precision}; make one with `moebius-export precision "
                f"{bundle.path} --to {precision}`"
            )
        path = bundle.path / file.plan
        if not path.resolve().is_relative_to(bundle.path.resolve()):
            raise ExportError(f"{path} is a link that leaves the bundle; put the plan itself there")
        plan = read_plan(path)
        source = info.files.get("fp32")
        if source is None:
            raise ExportError(f"{bundle.path}: {name} has no fp32 file to type; export the bundle again")
        files = bundle.manifest.files
        found = (name, precision, files[source.model].sha256, files[source.weights].sha256 if source.weights else None)
        if (plan.graph, plan.precision, plan.onnx_sha256, plan.weights_sha256) != found:
            raise ExportError(
                f"{path}: it is a plan of {plan.graph} in {plan.precision} for the file {plan.onnx_sha256[:16]}..., "
                f"the bundle's {name} is {found[2][:16]}... Make it again, without --reapply."
            )
        plans[name] = plan
    return plans


def write_typed(bundle: Bundle, plans: Mapping[GraphName, Plan], *, only: bool, say: Say) -> Manifest:
    """Writes the typed files and their plans into the bundle, in place of older ones of that precision.

    The bundle is made anew beside itself, with its other files linked, and exchanged when it is complete.

    Args:
        bundle: with its float32 files.
        plans: one for each graph.
        only: leave out the files of all other precisions, and engines, which were built from them.
        say: told each graph.

    Raises:
        ExportError: a plan does not fit its graph.
        OutputError: the bundle cannot be written.
    """
    (precision,) = {plan.precision for plan in plans.values()}
    graphs = {name: Opened(opened(bundle.model_file(name), plan.keep)) for name, plan in plans.items()}
    for name, plan in plans.items():
        check_kept([graphs[name]], plan.keep, plan.precision)
        plan.check(graphs[name])
    with placed_whole(bundle.path) as folder:
        files = linked(bundle, folder, precision, only)
        infos = dict(bundle.manifest.graphs)
        groups: dict[Path, list[GraphName]] = {}
        for name in plans:
            groups.setdefault(Path(infos[name].files["fp32"].model).parent, []).append(name)
        done = 0
        for group, names in groups.items():
            data = f"model_{precision}.onnx.data"
            with weights_file(folder / group, data) as weights:
                for name in names:
                    say(f"write {name}", done, len(plans))
                    done += 1
                    source = infos[name].files["fp32"].model
                    stem = Path(source).stem
                    model_path = f"{group}/{stem}_{precision}.onnx"
                    plan_path = f"{group}/{stem.replace('model', 'precision', 1)}_{precision}.json"
                    reader = Weights((bundle.path / source).parent)
                    model = typed(graphs[name], reader, plans[name].computes, plans[name].stores)
                    weights.add(model)
                    with atomic_write(folder / model_path) as stream:
                        stream.write(model.SerializeToString(deterministic=True))
                    del model
                    write_plan(plans[name], folder / plan_path)
                    file = GraphFile(model=model_path, weights=f"{group}/{data}", plan=plan_path)
                    others = {} if only else {k: f for k, f in infos[name].files.items() if k != precision}
                    infos[name] = infos[name].model_copy(update={"files": {**others, precision: file}})
                    for path in (model_path, plan_path):
                        files[path] = file_info(folder / path)
            files[f"{group}/{data}"] = file_info(folder / group / data)
        manifest = bundle.manifest.model_copy(update={"graphs": infos, "files": dict(sorted(files.items()))})
        manifest = Manifest.model_validate(manifest.model_dump())
        write_manifest(manifest, folder)
    return manifest


def linked(
    bundle: Bundle, folder: Path, precision: Precision, only: bool, graphs: Collection[GraphName] | None = None
) -> dict[str, FileInfo]:
    """Links all files that stay into the new folder; returns those of the manifest among them.

    Args:
        bundle: the old one.
        folder: the new one.
        precision: that is made anew.
        only: leave out also all other files of `graphs`, None for all, and engines.
        graphs: see `only`.
    """
    old = {path for info in bundle.manifest.graphs.values() if (f := info.files.get(precision)) for path in f.paths}
    if only:
        named = [info for name, info in bundle.manifest.graphs.items() if graphs is None or name in graphs]
        old |= {path for info in named for f in info.files.values() for path in f.paths}
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
    """Size and hash of a file, for the manifest."""
    return FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
