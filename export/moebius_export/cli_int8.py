"""`moebius-export int8`: calibrates on trajectories, searches, and writes INT8 files with their plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table

from moebius_runtime import console, kernels
from moebius_runtime.errors import InputError

if TYPE_CHECKING:
    from moebius_calibration.plan import Int8Plan


def int8(
    bundle: Annotated[Path, typer.Argument(help="Folder that `moebius-export onnx` wrote, with its fp32 files.")],
    target: Annotated[
        str,
        typer.Option(
            help="tensorrt (Q/DQ pairs), tensorrt-fp8 (the same in E4M3, for Ada and newer), or ort-cpu (layers in "
            "bytes, for processors with VNNI)."
        ),
    ] = "tensorrt",
    data: Annotated[
        Path | None, typer.Option(help="Folder with folders images and masks, paired by stem; default: drawn ones.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, max=100_000, help="How many pictures to calibrate on.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Inference steps of each: all are calibrated on.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of the first picture and noise.")] = 1,
    observer: Annotated[
        str, typer.Option(help="minmax, minmean, percentile, entropy, mse, or auto: the one with the least error.")
    ] = "auto",
    error: Annotated[float, typer.Option(min=0, help="Most relative error of a graph's output in a run.")] = 0.03,
    psnr: Annotated[
        float, typer.Option(min=0, max=100, help="Least dB inside the mask of a whole picture, against fp32.")
    ] = 35.0,
    samples: Annotated[int, typer.Option(min=1, max=1000, help="Recorded runs that each trial is judged on.")] = 2,
    evaluations: Annotated[
        int, typer.Option(min=1, help="With more products than this, those of a module are tried together.")
    ] = 400,
    any_gain: Annotated[
        bool, typer.Option("--any-gain", help="Try also layers that the cost model sees no gain in.")
    ] = False,
    one_timestep: Annotated[
        bool, typer.Option("--one-timestep", help="Calibrate on each picture's first timestep alone, to compare.")
    ] = False,
    state: Annotated[
        Path | None, typer.Option(help="File for the statistics after each picture; a stopped run goes on from it.")
    ] = None,
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Weights as bytes, activations in float: for size; target tensorrt.")
    ] = False,
    reapply: Annotated[
        bool, typer.Option("--reapply", help="Take the plans in the bundle as they are now; no error is measured.")
    ] = False,
    only: Annotated[
        bool, typer.Option("--only", help="Leave the files of other precisions out; for ort-cpu those of the U-Net.")
    ] = False,
) -> None:
    """Calibrates on whole trajectories, keeps in float what INT8 harms or does not speed up, and writes the files."""
    from moebius_calibration.calibrate import Calibrator, Int8Options, main_graph
    from moebius_calibration.plan import Observer, Target
    from moebius_calibration.timing import compare
    from moebius_calibration.weights_only import weight_plans
    from moebius_calibration.write import PRECISION, plans_of, write_int8
    from moebius_runtime.bundle import Bundle
    from moebius_runtime.files import check_writable

    for option, value, choices in (
        ("--target", target, get_args(Target)),
        ("--observer", observer, (*get_args(Observer), "auto")),
    ):
        if value not in choices:
            raise InputError(f"{option} {value}: expected one of {', '.join(choices)}")
    if reapply and (data is not None or state is not None or weights_only):
        raise InputError(
            "--reapply takes the plans as they are: leave --data, --state and --weights-only out, or edit the plans"
        )
    if state is not None:
        check_writable(state)
    options = Int8Options(
        target=target,  # type: ignore[arg-type]
        data=data,
        pictures=pictures,
        steps=steps,
        seed=seed,
        observer=None if observer == "auto" else observer,  # type: ignore[arg-type]
        error=error,
        psnr=psnr,
        samples=samples,
        evaluations=evaluations,
        any_gain=any_gain,
        one_timestep=one_timestep,
        state=state,
    )
    opened = Bundle.open(bundle)
    if target == "ort-cpu" and (words := kernels.in_words()) != kernels.BYTE_PRODUCTS:
        from moebius_runtime.backends import ort_integer

        console.warn(
            f"this machine's kernels: {words}. INT8 is fast with AVX512-VNNI only: expect 1.2 to 1.5 times the speed "
            "of fused fp32 in a layer with other kernels, less without any. The files are exact everywhere"
            + (f". {ort_integer.SATURATES}" if ort_integer.saturates() else "")
        )
    with console.err.status("int8") as status:

        def say(what: str, done: int, total: int) -> None:
            status.update(console.one_line(f"{what}: {done} of {total}" if total else what))

        works = None
        if reapply:
            plans = plans_of(opened, options.target)
        elif weights_only:
            plans = weight_plans(opened, options, say)
        else:
            calibrator = Calibrator(opened, options, say)
            plans, works = calibrator.run(), calibrator.works
        manifest = write_int8(opened, plans, works, say, only=only)
        compared = None
        if target == "ort-cpu" and not only and any(plan.chosen for plan in plans.values()):
            say("time fp32 and INT8 in turn", 0, 0)
            compared = compare(Bundle.open(bundle), main_graph(opened))
    console.out.print(plan_table(plans.values()))
    if reapply:
        console.out.print("written as the plans say now; their errors are those of the search, nothing was measured")
    else:
        _print_findings(plans.values())
    if compared is not None:
        (console.out.print if compared.ratio > 1 else console.warn)(compared.in_words)
    size = sum(file.size for file in manifest.files.values())
    named = PRECISION[options.target]
    files = {path for info in manifest.graphs.values() if (f := info.files.get(named)) for path in f.paths}
    written = sum(manifest.files[path].size for path in files)
    console.out.print(f"{bundle}: {size / 1e6:,.0f} MB, of which {named} {written / 1e6:,.0f} MB")


def _print_findings(plans: Collection[Int8Plan]) -> None:
    """Fronts, verdicts, and what the whole picture showed."""
    from moebius_calibration.plan import choice_of

    for plan in plans:
        if plan.front:
            console.out.print(front_table(plan))
    for plan in plans:
        if not plan.chosen:
            console.warn(f"{plan.graph}: {plan.verdict}")
        elif plan.verdict:
            console.out.print(f"{plan.graph}: {plan.verdict}")
        if plan.psnr is not None and plan.graph.startswith("unet"):
            form = choice_of(plan.target).upper()
            console.out.print(f"whole picture, {form} against fp32: {plan.psnr:.1f} dB inside the mask")


def plan_table(plans: Iterable[Int8Plan]) -> Table:
    """A row per graph: what is in bytes, its errors, and what keeps nodes in float."""
    table = Table("graph", "observer", "bytes", "float", "all", "plan", "float because", box=None, header_style="bold")
    for plan in plans:
        why = Counter(
            plan.reasons.get(node, "edited").partition(":")[0] for node, c in plan.nodes.items() if c == "float"
        )
        table.add_row(
            plan.graph,
            plan.observer,
            str(len(plan.chosen)),
            str(len(plan.nodes) - len(plan.chosen)),
            *(f"{plan.errors[name]:.1e}" if name in plan.errors else "" for name in ("all", "plan")),
            ", ".join(f"{reason} {count}" for reason, count in why.most_common()),
        )
    return table


def front_table(plan: Int8Plan) -> Table:
    """The Pareto front of a graph's search."""
    table = Table(f"{plan.graph}: layers", box=None, header_style="bold")
    for heading in ("error", "us saved (model)", "share of their GMAC"):
        table.add_column(heading, justify="right")
    for point in plan.front:
        table.add_row(str(point.layers), f"{point.error:.1e}", f"{point.gain:,.1f}", f"{point.share:.0%}")
    return table
