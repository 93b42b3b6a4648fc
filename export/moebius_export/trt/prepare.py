"""The bundle that engines are built from: found, or exported first; its files in the precision that is asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moebius_export.errors import ExportError
from moebius_export.trt.options import BuildOptions
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import MANIFEST_NAME

DEFAULT_BUNDLE = Path("moebius-bundle")


def ensure_bundle(path: Path, progress: Callable[[str, str], None]) -> Bundle:
    """The bundle at `path`, exported there first where there is nothing; needs PyTorch only then.

    Args:
        path: of the bundle.
        progress: told (graph, stage) of an export.

    Raises:
        BundleError: there is something else, or a damaged bundle.
        ExportError: it must be exported and PyTorch or another package of the extra `export` is not installed.
    """
    if not path.exists():
        try:
            from moebius_export.onnx_export.export import ExportOptions, export_onnx
        except ModuleNotFoundError as error:
            raise ExportError(
                f"{path}: there is no bundle, and none can be exported here ({error}). Export it where PyTorch is "
                f"(`moebius-export onnx --target tensorrt --out {path}`) and copy the folder here, or install the "
                'exporter: pip install "moebius-edge[export]"'
            ) from error
        export_onnx(path, ExportOptions(target="tensorrt"), progress)
    return Bundle.open(path)


def ensure_precision(
    bundle: Bundle,
    options: BuildOptions,
    progress: Callable[[str, str], None],
    note: Callable[[str], None] = lambda text: None,
) -> Bundle:
    """The bundle, holding the graphs' files in the precision; fp16 and bf16 are typed here where they are missing,
    by the shipped plan or the fixed rules (`moebius_export.precision.quick`), never by a search.

    Args:
        bundle: as it is.
        options: which precision and graphs; with plugins, the nodes that these take stay functions.
        progress: told (graph, stage) where files have to be made.
        note: told what the user should know of the plan that they are made by.

    Raises:
        BundleError: the bundle has no such graph.
        ExportError: files of that precision are missing, and cannot be made here.
    """
    precision = options.precision
    missing = [graph for graph in options.graphs if precision not in bundle.graph(graph).files]
    if not missing:
        return bundle
    what = f"{bundle.path / MANIFEST_NAME}: no {precision} file of {', '.join(missing)}"
    if precision in ("int8", "fp8"):
        target = " --target tensorrt-fp8" if precision == "fp8" else ""
        raise ExportError(
            f"{what}. They are calibrated, so write them first: moebius-export int8 {bundle.path}{target}"
        )
    if precision not in ("fp16", "bf16"):
        raise ExportError(f"{what}. The bundle holds {', '.join(bundle.graph(missing[0]).files)}: take one of these.")
    try:
        from moebius_export.precision.kept_functions import Keepable
        from moebius_export.precision.quick import make_plans, quick_options
        from moebius_export.precision.write import write_typed
    except ModuleNotFoundError as error:
        raise ExportError(
            f"{what}, and none can be made here ({error}). Write them where the exporter is, and copy the bundle here: "
            f"moebius-export precision {bundle.path} --to {precision}"
        ) from error

    def say(stage: str, done: int, total: int) -> None:
        progress("precision", f"{stage}: {done} of {total}" if total else stage)

    keep: tuple[Keepable, ...] = ("LocalLambda",) if options.plugins else ()
    plans = make_plans(bundle, quick_options(to=precision, keep=keep), say, note)
    write_typed(bundle, plans, only=False, progress=say)
    return Bundle.open(bundle.path)
