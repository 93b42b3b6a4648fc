"""The command `moebius-export trt`. With an existing bundle it needs neither PyTorch nor the `onnx` package."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from moebius_export.trt.options import (
    DEFAULT_GRAPHS,
    Batches,
    BuildOptions,
    Tuning,
    parse_graphs,
    parse_size,
    parse_sms,
    precision_of,
)
from moebius_runtime import console
from moebius_runtime.bundle.passport import EngineBackend
from moebius_runtime.commands.stages import Stages
from moebius_runtime.errors import InputError

if TYPE_CHECKING:
    from moebius_export.trt.build import Result
    from moebius_export.trt.events import Event
    from moebius_export.trt.forecast import Forecast
    from moebius_runtime.bundle.passport import Device


def trt(
    bundle: Annotated[
        Path,
        typer.Argument(
            help="Folder of the bundle, exported first if it does not exist; or hub:OWNER/REPO[@REVISION], whose "
            "engines stay in the cache."
        ),
    ] = Path("moebius-bundle"),
    fp16: Annotated[bool, typer.Option("--fp16", help="Build FP16 engines.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Build float32 engines.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Build BF16 engines (Ampere and later).")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="Build from the files of `moebius-export int8`.")] = False,
    fp8: Annotated[
        bool, typer.Option("--fp8", help="Build from `moebius-export int8 --target tensorrt-fp8` (Ada and later).")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="tensorrt or tensorrt-rtx. Default: the one that is installed.")
    ] = None,
    sm: Annotated[
        str | None,
        typer.Option(help="Compute capabilities to build for, such as 86,89,120 (tensorrt-rtx; no GPU needed)."),
    ] = None,
    graphs: Annotated[str, typer.Option(help="Graphs to build.")] = ",".join(DEFAULT_GRAPHS),
    workspace: Annotated[
        str | None, typer.Option(help="Limit of the builder's scratch memory, such as 512MiB or 2GiB.")
    ] = None,
    opt_level: Annotated[int | None, typer.Option(help="0 (quick build) to 5 (longest search).")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel timings, read and written; later builds are faster.")
    ] = None,
    min_batch: Annotated[
        int | None, typer.Option(help="Smallest batch (bundles exported with --dynamic-batch).")
    ] = None,
    opt_batch: Annotated[int | None, typer.Option(help="Batch that the engine is optimized for.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Largest batch.")] = None,
    hardware_compatibility: Annotated[
        str, typer.Option(help="none, ampere+ (any GPU from Ampere on; slower) or same-cc (TensorRT 10.9 and later).")
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines load in later TensorRT of the same major version.")
    ] = False,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Small engines without weights, refitted at each load.")
    ] = False,
    tf32: Annotated[
        bool,
        typer.Option("--tf32", help="Use TF32: float32 matmuls and convolutions round their factors to 10 bits."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build even if the memory forecast does not fit.")] = False,
) -> None:
    """Builds TensorRT engines of a bundle, with a passport that names their device and source files.

    Exports a bundle where there is none, and writes FP16 or BF16 files by the shipped precision plan where they are
    missing. Each graph is then parsed once, its memory is forecast, and its engine is built.
    """
    from moebius_export.plugins.local_lambda import enabled

    precision = precision_of({"fp16": fp16, "fp32": fp32, "bf16": bf16, "int8": int8, "fp8": fp8})
    known = get_args(EngineBackend)
    if backend not in (None, *known):
        raise InputError(f"--backend {backend}: expected one of {', '.join(known)}")
    options = BuildOptions(
        precision=precision,
        backend=backend,  # type: ignore[arg-type]  # checked above
        sms=parse_sms(sm) if sm is not None else (),
        graphs=parse_graphs(graphs),
        batches=Batches(min_batch, opt_batch, max_batch),
        tuning=Tuning(
            workspace=parse_size(workspace) if workspace is not None else None,
            opt_level=opt_level,
            timing_cache=timing_cache,
            hardware_compatibility=hardware_compatibility,  # type: ignore[arg-type]  # checked by `check_options`
            version_compatible=version_compatible,
            strip_weights=strip_weights,
            tf32=tf32,
        ),
        force=force,
        plugins=enabled(),
    )
    from moebius_runtime.hardware.devices import current_device

    with _ended_by_sigterm():
        try:
            result = _run(bundle, options, current_device())
        except KeyboardInterrupt:
            raise typer.Abort from None
    passport = result.passport
    size = sum(engine.size for engine in passport.engines.values())
    where = passport.gpu or "SM " + ", ".join(map(str, passport.sm))
    console.out.print(
        f"{result.folder}: {len(passport.engines)} {passport.precision} engine(s) for {where}, "
        f"{size / 1e6:,.0f} MB, "
        f"{sum(engine.build_seconds for engine in passport.engines.values()):.0f} s"
    )


def _run(path: Path, options: BuildOptions, device: Device | None) -> Result:
    """Runs the stages of a build and shows their events: progress bars on a terminal, lines elsewhere."""
    from moebius_export.trt.build import build_engines, ready
    from moebius_export.trt.builder import ParseError
    from moebius_export.trt.prepare import prepare

    columns = (
        TextColumn("{task.description:<14}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[phase]}"),
    )
    plain = not console.err.is_terminal
    with (
        Progress(*columns, console=console.err, disable=plain) as bars,
        Stages("trt") if plain else nullcontext() as line,
    ):
        show = _shown(bars, line)
        found = ready(options, device, show)
        bundle = prepare(path, options, show)
        try:
            return build_engines(bundle, options, device, show, found)
        except ParseError as error:
            for problem in error.problems:
                console.err.print(console.one_line(problem))
            raise


def _shown(bars: Progress, line: Stages | None) -> Callable[[Event], None]:
    """Returns a function that shows events: as progress bars, or in `line` where there is no terminal."""
    from moebius_export.trt.events import Built, Note, Stage, Step
    from moebius_export.trt.forecast import Forecast

    tasks: dict[str, TaskID] = {}

    def finish(name: str) -> None:
        bars.update(tasks[name], completed=100, total=100, phase="done")
        bars.stop_task(tasks.pop(name))

    def show(event: Event) -> None:
        if isinstance(event, Note):
            console.warn(event.text)
        elif isinstance(event, Forecast):
            console.out.print(_table(event))
            for advice in event.advice:
                console.warn(f"this may not fit: {advice}")
        elif isinstance(event, Stage):
            for name in list(tasks):
                finish(name)
            if line is not None:
                line(f"{event.name}: {event.detail}")
            else:
                bars.console.print(console.one_line(f"{event.name}: {event.detail}"), style="bold", markup=False)
        elif isinstance(event, Step) and line is not None:
            # `Stages` prints a line for each new text before the colon: each phase here, each graph in a build.
            line(
                f"{event.graph}, {event.phase}"
                if event.share is None
                else f"{event.graph}: {event.phase}, {event.share:.0%}"
            )
        elif isinstance(event, Step):
            if event.graph not in tasks:
                tasks[event.graph] = bars.add_task(event.graph, total=None, phase="")
            share = None if event.share is None else 100 * event.share
            total = None if share is None else 100
            bars.update(tasks[event.graph], completed=share or 0, total=total, phase=console.one_line(event.phase)[:50])
        elif isinstance(event, Built):
            if event.graph in tasks:
                finish(event.graph)
            activations = "" if event.device_memory is None else f", activations {_size(event.device_memory)} as built"
            console.out.print(f"{event.graph:<12} {_size(event.size)} in {event.seconds:.1f} s{activations}")

    return show


def _table(forecast: Forecast) -> Table:
    """The memory forecast as a table."""
    table = Table("memory forecast", box=None, header_style="bold")
    for heading in ("weights", "activations", "sum"):
        table.add_column(heading, justify="right")
    for one in forecast.needs:
        row = (one.weights, one.activations, one.weights + one.activations)
        table.add_row(one.graph, *map(_size, row))
    table.add_row("building, at most one at a time", "", "", _size(forecast.building))
    limit = "free memory, at most" if forecast.workspace is None else f"{_size(forecast.workspace)}, included above"
    table.add_row("  builder's scratch memory", "", "", limit)
    table.add_row("running, all loaded", "", "", _size(forecast.running))
    table.add_row("running, one loaded at a time", "", "", _size(forecast.sequential))
    free = "unknown: no GPU here" if forecast.free is None else _size(forecast.free)
    table.add_row(f"free on {forecast.device}" if forecast.device else "free", "", "", free)
    return table


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Turns SIGTERM into a KeyboardInterrupt, so that it cleans up as Ctrl-C does."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
