"""`moebius-export int8`: calibrates, chooses the quantized nodes, and writes files with their plans."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from moebius_runtime import console
from moebius_runtime.commands.stages import Stages
from moebius_runtime.errors import InputError

if TYPE_CHECKING:
    from moebius_calibration.plan import Int8Plan
    from moebius_runtime.bundle.bundle import Bundle
    from moebius_runtime.bundle.manifest import GraphName


def int8(
    bundle: Annotated[
        Path,
        typer.Argument(
            help="Folder that `moebius-export onnx` wrote, with its fp32 files; hub:OWNER/REPO[@REVISION] is copied "
            "to ./REPO first."
        ),
    ],
    target: Annotated[
        str,
        typer.Option(
            help="tensorrt (Q/DQ pairs), tensorrt-fp8 (Q/DQ pairs in E4M3, for Ada and newer), or ort-cpu (INT8 "
            "operators)."
        ),
    ] = "tensorrt",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with the folders images and masks, paired by stem; default: drawn pictures."),
    ] = None,
    pictures: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Number of pictures to calibrate on; default 2, with --search 8."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Inference steps of each picture; all are calibrated on. Default 10, with --search 20; of a bundle "
            "for sampler lcm what it recommends.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture and its noise.")] = 1,
    observer: Annotated[
        str,
        typer.Option(
            help="minmax, minmean, percentile, entropy, mse, or auto: that of the placement, with --search the one of "
            "least error."
        ),
    ] = "auto",
    error: Annotated[
        float, typer.Option(min=0, help="Error budget: largest relative L2 error of a graph's output in a run.")
    ] = 0.03,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Measure which layers can be INT8, and which observer: half an hour at full size."
        ),
    ] = False,
    placement: Annotated[
        Path | None, typer.Option(help="Apply this file of --save-placement in place of the shipped placement.")
    ] = None,
    save_placement: Annotated[
        Path | None,
        typer.Option(help="Write the nodes that the search chose to a file for other bundles of this network."),
    ] = None,
    psnr: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="With --search: least PSNR in dB inside the mask of a whole picture, against fp32; default 35.",
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of recorded runs that each trial is evaluated on.")
    ] = 2,
    state: Annotated[
        Path | None,
        typer.Option(help="File for the statistics after each picture, from which a stopped calibration resumes."),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="INT8 weights, float activations: small files; for --target tensorrt."),
    ] = False,
    reapply: Annotated[
        bool, typer.Option("--reapply", help="Write the files again from the plans in the bundle, without measuring.")
    ] = False,
    untimed: Annotated[
        bool,
        typer.Option(
            "--untimed",
            help="For ort-cpu: do not time the layers here, where those that are slower in INT8 than in fp32 stay in "
            "float; for a bundle that other machines run.",
        ),
    ] = False,
    only: Annotated[
        bool,
        typer.Option(
            "--only", help="Leave out the files of other precisions; for ort-cpu, of graphs with an INT8 file."
        ),
    ] = False,
) -> None:
    """Calibrates on whole trajectories and writes INT8 or FP8 files; what they would harm or not speed up stays float.

    The quantized nodes come from the placement that is shipped for the released network. For other networks they are
    all nodes of the U-Net that gain by the cost model. For ort-cpu each layer is timed on this machine first, and those
    that INT8 does not make faster stay in float. One evaluation checks the result against --error; exit code 1
    means that a search is needed. For ort-cpu each graph of the VAE gets an INT8 file only where it is within --error
    and faster on this machine. --search measures the layers of this bundle instead; --psnr implies it.
    """
    from moebius_calibration.calibrate import Calibrator
    from moebius_calibration.choice.graphs import main_graph, same_node
    from moebius_calibration.files.machine import decision, slower, time_graph
    from moebius_calibration.files.timing import compare_all, without_slower
    from moebius_calibration.files.write import PRECISION, plans_of, write_int8
    from moebius_calibration.options import Int8Options
    from moebius_calibration.placed import PICTURES, STEPS, PlacedCalibrator
    from moebius_calibration.plan import Observer, Target
    from moebius_calibration.report import plan_table, print_findings
    from moebius_calibration.weights_only import weight_plans
    from moebius_export.trajectories.scenes import default_steps
    from moebius_runtime.backends import ort_integer
    from moebius_runtime.bundle.bundle import Bundle
    from moebius_runtime.bundle.copies import writable_folder
    from moebius_runtime.files import check_writable

    for option, value, choices in (
        ("--target", target, get_args(Target)),
        ("--observer", observer, (*get_args(Observer), "auto")),
    ):
        if value not in choices:
            raise InputError(f"{option} {value}: expected one of {', '.join(choices)}")
    if untimed and target != "ort-cpu":
        raise InputError(
            f"--untimed is an option of --target ort-cpu, and the target is {target}: leave one of them out"
        )
    if reapply and (data is not None or state is not None or weights_only):
        raise InputError(
            "--reapply writes the files from the plans in the bundle: leave out --data, --state and --weights-only"
        )
    search = search or psnr is not None
    if placement is not None and (search or reapply or weights_only):
        raise InputError("--placement is applied without a search, --reapply or --weights-only: leave one of them out")
    if search and (reapply or weights_only):
        if psnr is None:
            raise InputError("--search has no meaning with --reapply or --weights-only: leave one of them out")
        search = False  # --psnr alone is ignored there, as in version 0.1
    if save_placement is not None and not (search or reapply):
        raise InputError("--save-placement writes what a search found: add --search, or --reapply after one")
    for path in (state, save_placement):
        if path is not None:
            check_writable(path)
    whole = search or weights_only
    bundle, copied = writable_folder(bundle)
    if copied:
        console.err.print(f"copied to {bundle}")
    opened = Bundle.open(bundle)
    options = Int8Options(
        target=target,  # type: ignore[arg-type]
        data=data,
        pictures=pictures or (8 if whole else PICTURES),
        steps=steps or default_steps(opened.manifest, 20 if whole else STEPS),
        seed=seed,
        observer=None if observer == "auto" else observer,  # type: ignore[arg-type]
        error=error,
        psnr=35.0 if psnr is None else psnr,
        samples=samples,
        state=state,
    )
    if target == "ort-cpu" and ort_integer.saturates():
        console.warn(ort_integer.SATURATES)
    timed = {}
    with Stages("int8") as progress:
        works = None
        if target == "ort-cpu" and not (reapply or weights_only or untimed):
            progress("time each layer in fp32 and INT8", 0, 0)
            timed = time_graph(opened, main_graph(opened))
            found = {same_node(node): reason for node, reason in slower(timed).items()}
            options = replace(options, slower=found)
        if reapply:
            plans = plans_of(opened, options.target)
        elif weights_only:
            plans = weight_plans(opened, options, progress)
        else:
            calibrator = (
                Calibrator(opened, options, progress)
                if search
                else PlacedCalibrator(opened, options, progress, console.warn, placement)
            )
            plans, works = calibrator.run(), calibrator.works
        if save_placement is not None:
            _save_placement(opened, plans, save_placement)
        manifest = write_int8(opened, plans, works, progress, only=only and (reapply or target != "ort-cpu"))
        compared = {}
        if target == "ort-cpu" and not (only and reapply):
            progress("time fp32 and INT8", 0, 0)
            compared = compare_all(opened := Bundle.open(bundle), plans)
            kept = plans if reapply else without_slower(plans, compared)
            if only or kept != plans:
                plans = kept
                manifest = write_int8(opened, plans, works, progress, only=only)
    if timed:
        console.out.print(decision(timed))
    console.out.print(plan_table(plans.values()))
    if reapply:
        console.out.print("files written from the plans; nothing was measured, the errors are those of the calibration")
    else:
        print_findings(plans.values())
    for name, times in compared.items():
        if plans[name].chosen:  # else its verdict has the times
            (console.out.print if times.ratio > 1 else console.warn)(f"{name}: {times.message}")
    size = sum(file.size for file in manifest.files.values())
    named = PRECISION[options.target]
    files = {path for info in manifest.graphs.values() if (f := info.files.get(named)) for path in f.paths}
    written = sum(manifest.files[path].size for path in files)
    console.out.print(f"{bundle}: {size / 1e6:,.0f} MB, of which {named} {written / 1e6:,.0f} MB")


def _save_placement(bundle: Bundle, plans: Mapping[GraphName, Int8Plan], path: Path) -> None:
    """Writes the nodes that a search chose as a placement file."""
    from moebius_calibration.placement import placement_from, write_placement
    from moebius_export.graph.opened import Opened, opened

    model, plan = bundle.manifest.model, plans["unet"]
    weights = f"random test weights ({model.unet.origin})" if model.unet.stand_in else model.unet.origin
    measured = plan.calibration
    derived = f"a search with {weights}, {measured.data} pictures, {measured.steps} steps, seed {measured.seed}"
    unet = Opened(opened(bundle.model_file("unet")))
    there = "unet_conditional" in bundle.manifest.graphs
    conditional = Opened(opened(bundle.model_file("unet_conditional"))) if there else None
    network = f"{model.preset}, {model.parameters:,} U-Net parameters"
    write_placement(placement_from(plans, unet, network, derived, conditional), path)
