"""The stages `export` and `precision plan` of a build. Each runs only where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moebius_export.errors import ExportError
from moebius_export.trt.events import Note, Report, Stage, Step
from moebius_export.trt.options import BuildOptions
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.hub import hub_name
from moebius_runtime.bundle.manifest import MANIFEST_NAME, GraphName

DEFAULT_BUNDLE = Path("moebius-bundle")


def prepare(path: Path, options: BuildOptions, report: Report) -> Bundle:
    """Returns the bundle at `path` with files of the requested precision, after making what is missing.

    Raises:
        BundleError, ExportError: as `ensure_bundle` and `ensure_precision`.
    """
    if not _named(path):
        report(Stage("export", f"there is no bundle at {path}"))
    bundle = ensure_bundle(path, lambda graph, phase: report(Step(graph, phase, None)))
    if missing := _missing(bundle, options):
        report(Stage("precision plan", f"{bundle.path} has no {options.precision} file of {', '.join(missing)}"))
    return ensure_precision(
        bundle,
        options,
        lambda stage, phase: report(Step(stage, phase, None)),
        lambda text: report(Note(text)),
    )


def ensure_bundle(path: Path, progress: Callable[[str, str], None]) -> Bundle:
    """Opens the bundle at `path`. Exports it first if nothing is there, which is the only case that needs PyTorch.

    Args:
        path: folder of the bundle, or `hub:OWNER/REPO[@REVISION]`; engines of the latter go to its folder in the cache.
        progress: called with (graph, stage) during the export.

    Raises:
        BundleError: `path` holds something else, or a damaged bundle.
        ExportError: there is no bundle, and PyTorch or another package of the extra `export` is not installed.
    """
    if not _named(path):
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
    """Returns the bundle with graph files of the requested precision. Writes missing FP16 and BF16 files.

    They follow the shipped precision plan or the fixed rules (`moebius_export.precision.quick`), never a search.

    Args:
        bundle: the bundle that engines are built from.
        options: the precision and the graphs. With plugins, the nodes that plugins take stay functions.
        progress: called with ("precision plan", phase) while files are written.
        note: called with each line that the user should read about the plan.

    Raises:
        BundleError: the bundle has no such graph.
        ExportError: files of that precision are missing and cannot be written here.
    """
    precision = options.precision
    missing = _missing(bundle, options)
    if not missing:
        return bundle
    if bundle.remote is not None:
        raise ExportError(
            f"{bundle.name}: no {precision} file of {', '.join(missing)}; a commit of a hub is not changed, so write "
            f"them into a copy and build from that: moebius-export "
            + (f"int8 {bundle.name}" if precision in ("int8", "fp8") else f"precision {bundle.name} --to {precision}")
        )
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

    def report(stage: str, done: int, total: int) -> None:
        progress("precision plan", f"{stage}: {done} of {total}" if total else stage)

    keep: tuple[Keepable, ...] = ("LocalLambda",) if options.plugins else ()
    plans = make_plans(bundle, quick_options(to=precision, keep=keep), report, note)
    write_typed(bundle, plans, only=False, progress=report)
    return Bundle.open(bundle.path)


def _named(path: Path) -> bool:
    """Whether a bundle is there already, on this machine or in a hub."""
    return hub_name(path) is not None or path.exists()


def _missing(bundle: Bundle, options: BuildOptions) -> list[GraphName]:
    """The requested graphs that have no file of the precision."""
    return [graph for graph in options.graphs if options.precision not in bundle.graph(graph).files]
