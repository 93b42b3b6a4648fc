"""`moebius-export trt`: the command. Neither PyTorch nor the `onnx` package is needed where the bundle is there."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from moebius_runtime import console
from moebius_runtime.bundle.passport import EngineBackend
from moebius_runtime.commands.stages import Stages
from moebius_runtime.errors import InputError

if TYPE_CHECKING:
    from moebius_export.trt.build import Result
    from moebius_export.trt.events import Event
    from moebius_export.trt.forecast import Forecast
    from moebius_export.trt.options import BuildOptions
    from moebius_runtime.bundle.passport import Device

_BACKENDS: tuple[EngineBackend, ...] = ("tensorrt", "tensorrt-rtx")


def trt(
    bundle: Annotated[Path, typer.Argument(help="Folder of the bundle; exported first where there is none.")] = Path(
        "moebius-bundle"
    ),
    fp16: Annotated[bool, typer.Option("--fp16", help="Engines of the graphs typed in half precision.")] = False,
    fp32: Annotated[bool, typer.Option("--fp32", help="Engines of the float32 graphs.")] = False,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Engines of the graphs typed in bfloat16 (Ampere and up).")
    ] = False,
    int8: Annotated[
        bool, typer.Option("--int8", help="Engines of the graphs that `moebius-export int8` wrote.")
    ] = False,
    fp8: Annotated[
        bool,
        typer.Option("--fp8", help="Engines of what `moebius-export int8 --target tensorrt-fp8` wrote (Ada and up)."),
    ] = False,
    backend: Annotated[str | None, typer.Option(help="tensorrt or tensorrt-rtx; default: what is installed.")] = None,
    sm: Annotated[
        str | None,
        typer.Option(help="Compute capabilities to build for, such as 86,89,120 (tensorrt-rtx; no GPU needed)."),
    ] = None,
    graphs: Annotated[str, typer.Option(help="Graphs to build.")] = "unet,vae_encoder,vae_decoder",
    workspace: Annotated[
        str | None, typer.Option(help="Most scratch memory of the builder, such as 512MiB or 2GiB.")
    ] = None,
    opt_level: Annotated[int | None, typer.Option(help="0 (quick build) to 5 (longest search).")] = None,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of kernel timings, read and written: later builds are quicker.")
    ] = None,
    min_batch: Annotated[
        int | None, typer.Option(help="Fewest pictures of a run (bundles with an open batch).")
    ] = None,
    opt_batch: Annotated[int | None, typer.Option(help="Pictures of the run to be fastest for.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Most pictures of a run.")] = None,
    hardware_compatibility: Annotated[
        str, typer.Option(help="none, ampere+ (any GPU from Ampere on; slower) or same-cc (TensorRT 10.9 and up).")
    ] = "none",
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Engines that later TensorRT of the same major version loads.")
    ] = False,
    strip_weights: Annotated[
        bool,
        typer.Option("--strip-weights", help="Small engines without weights, which must be refitted at each load."),
    ] = False,
    tf32: Annotated[
        bool,
        typer.Option("--tf32", help="Let float32 products round their factors to 10 bits (Ampere and up): faster."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Build also what the forecast says cannot fit.")] = False,
) -> None:
    """Builds TensorRT engines of a bundle, with a passport that says where they belong."""
    from moebius_export.plugins.local_lambda import enabled
    from moebius_export.trt.options import (
        Batches,
        BuildOptions,
        Tuning,
        parse_graphs,
        parse_size,
        parse_sms,
        precision_of,
    )

    precision = precision_of({"fp16": fp16, "fp32": fp32, "bf16": bf16, "int8": int8, "fp8": fp8})
    named = next((known for known in _BACKENDS if known == backend), None)
    if backend is not None and named is None:
        raise InputError(f"--backend {backend}: expected one of {', '.join(_BACKENDS)}")
    options = BuildOptions(
        precision=precision,
        backend=named,
        sms=parse_sms(sm) if sm is not None else (),
        graphs=parse_graphs(graphs),
        batches=Batches(min_batch, opt_batch, max_batch),
        tuning=Tuning(
            workspace=parse_size(workspace) if workspace is not None else None,
            opt_level=opt_level,
            timing_cache=timing_cache,
            hardware_compatibility=hardware_compatibility,  # type: ignore[arg-type]  # checked with the library's
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
        f"{result.folder}: {len(passport.engines)} engine(s) of {passport.precision} for {where}, "
        f"{size / 1e6:,.0f} MB, "
        f"{sum(engine.build_seconds for engine in passport.engines.values()):.0f} s"
    )


def _run(path: Path, options: BuildOptions, device: Device | None) -> Result:
    """Builds with a bar for each graph, without a terminal with lines; notes and the forecast are printed as well."""
    from moebius_export.trt.build import build_engines, ready
    from moebius_export.trt.builder import ParseError
    from moebius_export.trt.prepare import ensure_bundle, ensure_precision

    columns = (
        TextColumn("{task.description:<12}"),
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
        prepared: list[TaskID] = []
        said: set[str] = set()

        def prepare(graph: str, stage: str) -> None:
            if line is not None:
                line(f"{graph}, {stage}")
                return
            prepared[:] = prepared or [bars.add_task("prepare", total=None, phase="")]
            kind = f"{graph}: {stage.partition(':')[0]}"
            if kind not in said:  # a line for each kind of work, the bar for each piece of it
                said.add(kind)
                bars.console.print(console.one_line(kind))
            bars.update(prepared[0], phase=console.one_line(f"{graph}: {stage}")[:60])

        bundle = ensure_precision(ensure_bundle(path, prepare), options, prepare, console.warn)
        for task in prepared:
            bars.update(task, total=100, completed=100, phase="done")
            bars.stop_task(task)
        try:
            return build_engines(bundle, options, device, show, found)
        except ParseError as error:
            for problem in error.problems:
                console.err.print(console.one_line(problem))
            raise


def _shown(bars: Progress, line: Stages | None) -> Callable[[Event], None]:
    """Shows events as bars, or in `line` where there is no terminal."""
    from moebius_export.trt.events import Built, Note, Step
    from moebius_export.trt.forecast import Forecast

    tasks: dict[str, TaskID] = {}

    def show(event: Event) -> None:
        if isinstance(event, Note):
            console.warn(event.text)
        elif isinstance(event, Forecast):
            console.out.print(_table(event))
            for advice in event.advice:
                console.warn(f"this may not fit: {advice}")
        elif isinstance(event, Step) and line is not None:
            done = "" if event.share is None else f", {event.share:.0%}"
            line(f"{event.graph}: {event.phase}{done}")
        elif isinstance(event, Step):
            if event.graph not in tasks:
                tasks[event.graph] = bars.add_task(event.graph, total=None, phase="")
            share = None if event.share is None else 100 * event.share
            total = None if share is None else 100
            bars.update(tasks[event.graph], completed=share or 0, total=total, phase=console.one_line(event.phase)[:50])
        elif isinstance(event, Built):
            needs = "" if event.device_memory is None else f", activations {_size(event.device_memory)} as built"
            words = f"{_size(event.size)} in {event.seconds:.1f} s{needs}"
            if event.graph in tasks:
                bars.update(tasks[event.graph], completed=100, total=100, phase="done")
                bars.stop_task(tasks[event.graph])
            console.out.print(f"{event.graph:<12} {words}")

    return show


def _table(forecast: Forecast) -> Table:
    """What the engines will need, and what there is."""
    table = Table("memory forecast", box=None, header_style="bold")
    for heading in ("weights", "activations", "sum"):
        table.add_column(heading, justify="right")
    for one in forecast.needs:
        row = (one.weights, one.activations, one.weights + one.activations)
        table.add_row(one.graph, *map(_size, row))
    table.add_row("building, at most one at a time", "", "", _size(forecast.building))
    limit = "what is free, at most" if forecast.workspace is None else f"{_size(forecast.workspace)}, counted above"
    table.add_row("  builder's scratch memory", "", "", limit)
    table.add_row("running, all loaded", "", "", _size(forecast.running))
    table.add_row("running, loaded in turn", "", "", _size(forecast.in_turn))
    free = "not known: no GPU here" if forecast.free is None else _size(forecast.free)
    table.add_row(f"free on {forecast.device}" if forecast.device else "free", "", "", free)
    return table


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """A SIGTERM ends the build as Ctrl-C does, so that nothing is left behind."""

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
