"""`moebius-export precision`: writes mixed-precision graphs into a bundle, by a shipped, measured or edited plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.table import Table

from moebius_runtime import console
from moebius_runtime.bundle.copies import writable_folder
from moebius_runtime.bundle.manifest import Manifest
from moebius_runtime.commands.stages import Stages
from moebius_runtime.errors import InputError

if TYPE_CHECKING:
    from moebius_export.precision.error_report import ErrorReport
    from moebius_export.precision.plan import Plan
    from moebius_export.precision.planning import PlanOptions
    from moebius_runtime.bundle.bundle import Bundle


def precision(
    bundle: Annotated[
        Path,
        typer.Argument(
            help="Folder that `moebius-export onnx` wrote, with its fp32 files; hub:OWNER/REPO[@REVISION] is copied "
            "to ./REPO first."
        ),
    ],
    to: Annotated[str, typer.Option(help="fp16 or bf16.")] = "fp16",
    vae: Annotated[
        str, typer.Option(help="Type that the VAE computes in: fp32, or fp16 or bf16 where measurements allow it.")
    ] = "fp32",
    data: Annotated[
        Path | None, typer.Option(help="Folder with the folders images and masks, paired by stem. Default: drawn.")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option(min=1, max=1000, help="Pictures to measure on; default 1, for a search 2.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Inference steps per picture; default 4, for a search 20.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first picture and its noise.")] = 1,
    search: Annotated[
        bool,
        typer.Option(
            "--search", help="Measure which layers need fp32 instead of using the shipped plan: minutes to hours."
        ),
    ] = False,
    plan: Annotated[
        Path | None, typer.Option(help="Apply this file of --save-plan instead of the shipped plan.")
    ] = None,
    save_plan: Annotated[
        Path | None,
        typer.Option(help="Write the result of the search to a file for other bundles of this network (--plan)."),
    ] = None,
    error: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Search: relative error that lower types may add to a step; default 3e-3, bf16 2.4e-2.",
        ),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(min=1, help="Search: parts of the U-Net that are tried alone; default 32.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(min=1, help="Search: recorded runs that each trial is measured on; default 2."),
    ] = None,
    extra_weights: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Search: share of bytes that weights kept in fp32 for their error may add; default 0.01.",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="LocalLambda: keep its nodes as functions, for TensorRT's plugin (--target tensorrt, fp16)."),
    ] = None,
    reapply: Annotated[
        bool, typer.Option("--reapply", help="Apply the plans in the bundle, edited or not; measure nothing.")
    ] = False,
    only: Annotated[bool, typer.Option("--only", help="Remove the files of other precisions from the bundle.")] = False,
    report: Annotated[
        Path | None,
        typer.Option(help="Compare the new files with the fp32 files module by module; write the result here as JSON."),
    ] = None,
) -> None:
    """Decides which layers keep float32 and writes mixed-precision files into the bundle.

    The default is the shipped plan for the released network (fixed rules for other networks), checked by the ranges of
    a few steps. --search and the options marked "Search" measure the layers of this bundle instead.
    Exit code 1 where `--vae fp16` or `--vae bf16` fails its check.
    """
    from moebius_export.graph.kinds import FloatType, LowType
    from moebius_export.precision.kept_functions import Keepable
    from moebius_export.precision.planning import PlanOptions
    from moebius_export.precision.quick import quick_options
    from moebius_runtime.files import check_writable

    numbers = {"evaluations": evaluations, "samples": samples, "extra_weights": extra_weights}
    given = {"error": error, **numbers}
    of_search = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    search = search or bool(of_search)
    if search and (reapply or plan is not None):
        named = ", ".join(of_search) or "--search"
        raise InputError(
            f"{named} searches, and {'--reapply' if reapply else '--plan'} does not: leave one of them out"
        )
    if reapply and plan is not None:
        raise InputError("--reapply applies the plans in the bundle, --plan applies a file: leave one of them out")
    if save_plan is not None:
        if not (search or reapply):
            raise InputError(
                "--save-plan writes the result of a search: add --search, or --reapply if a search made these plans"
            )
        check_writable(save_plan)
    for option, value, choices in (("--to", to, get_args(LowType)), ("--vae", vae, get_args(FloatType))):
        if value not in choices:
            raise InputError(f"{option} {value}: expected one of {', '.join(choices)}")
    if keep is not None and keep not in get_args(Keepable):
        raise InputError(f"--keep {keep}: expected {', '.join(get_args(Keepable))}")
    if reapply and keep is not None:
        raise InputError("--reapply applies the plans unchanged, with the functions that they keep: leave --keep out")
    if report is not None:
        if only:
            raise InputError(
                "--report compares with the fp32 files, which --only leaves out: run it without --only first"
            )
        check_writable(report)
    if reapply and ((data is not None and report is None) or vae != "fp32"):
        raise InputError("--reapply applies the plans unchanged: leave --data and --vae out, or edit the plans")
    counts: dict[str, Any] = {"pictures": pictures, "steps": steps, **numbers}
    options = (PlanOptions if search or reapply else quick_options)(
        to=to,  # type: ignore[arg-type]
        vae=vae,  # type: ignore[arg-type]
        data=data,
        seed=seed,
        error=error,
        keep=(keep,) if keep is not None else (),  # type: ignore[arg-type]
        **{name: value for name, value in counts.items() if value is not None},
    )
    bundle, copied = writable_folder(bundle)
    if copied:
        console.err.print(f"copied to {bundle}")
    type_bundle(bundle, options, only=only, reapply=reapply, report=report, search=search, shipped=plan, save=save_plan)


def type_bundle(
    path: Path,
    options: PlanOptions,
    *,
    only: bool = False,
    reapply: bool = False,
    report: Path | None = None,
    search: bool = False,
    shipped: Path | None = None,
    save: Path | None = None,
) -> Manifest:
    """Writes mixed-precision files into a bundle and prints their plans; progress goes to the error stream.

    Args:
        path: of the bundle.
        options: of the plans.
        only: remove the files of other precisions.
        reapply: apply the plans in the bundle.
        report: file for the errors of modules (`moebius_export.precision.error_report`); None measures none.
        search, shipped: as for `moebius_export.precision.quick.make_plans`.
        save: file for the plan, for other bundles of the network.

    Raises:
        MoebiusError: as `make_plans` and `moebius_export.precision.write.write_typed`.
    """
    from moebius_export.precision.error_report import measure_errors, write_report
    from moebius_export.precision.quick import make_plans
    from moebius_export.precision.write import plans_of, write_typed
    from moebius_runtime.bundle.bundle import Bundle

    bundle = Bundle.open(path)
    with Stages("precision") as progress:
        if reapply:
            plans = plans_of(bundle, options.to)
        else:
            plans = make_plans(bundle, options, progress, console.warn, search=search, shipped=shipped)
        if save is not None:
            _save_plan(bundle, plans["unet"], save)
        manifest = write_typed(bundle, plans, only=only, progress=progress)
        errors = None if report is None else measure_errors(Bundle.open(path), options, progress)
    console.out.print(plan_table(plans.values()))
    for plan in plans.values():
        if "budget" in plan.errors and plan.errors["plan"] > plan.errors["budget"]:
            console.warn(
                f"{plan.graph}: the plan's error {plan.errors['plan']:.1e} is over its budget "
                f"{plan.errors['budget']:.1e}; give more --evaluations, or a larger --error"
            )
        if not reapply and plan.graph == "unet" and plan.measured.pictures < options.pictures:
            console.warn(
                f"{options.data} holds {plan.measured.pictures} pictures, fewer than --pictures {options.pictures}"
            )
    if report is not None and errors is not None:
        write_report(errors, report)
        console.out.print(error_table(errors))
        console.out.print(f"{report}: every module's error")
    files = [graph.files[options.to] for graph in manifest.graphs.values()]
    typed = sum(manifest.files[name].size for name in {name for file in files for name in file.paths})
    size = sum(file.size for file in manifest.files.values())
    console.out.print(f"{path}: {size / 1e6:,.0f} MB, of which {options.to} {typed / 1e6:,.0f} MB")
    return manifest


def _save_plan(bundle: Bundle, plan: Plan, path: Path) -> None:
    """Writes the modules that a search kept in float32; the U-Net's plan names all of them."""
    from moebius_export.graph.opened import Opened, opened
    from moebius_export.precision.shipped import shipped_from, write_shipped

    model = bundle.manifest.model
    if plan.keep:
        raise InputError("--save-plan: search without --keep, the file serves bundles with and without it")
    graph = Opened(opened(bundle.model_file("unet")))
    there = "unet_conditional" in bundle.manifest.graphs
    conditional = Opened(opened(bundle.model_file("unet_conditional"))) if there else None
    weights = f"random test weights ({model.unet.origin})" if model.unet.stand_in else model.unet.origin
    network = f"{model.preset}, {model.parameters:,} U-Net parameters"
    write_shipped(shipped_from(plan, graph, network, f"a search with {weights}", conditional), path)


def plan_table(plans: Iterable[Plan]) -> Table:
    """A row per graph: its errors, its largest value, and the reasons why nodes stay float32."""
    columns = ("graph", "nodes low", "fp32", "largest", "blunt", "plan", "fp32 because")
    table = Table(*columns, box=None, header_style="bold")
    for plan in plans:
        kinds = Counter(node.type for node in plan.nodes.values())
        why = Counter(node.reason.partition(":")[0] for node in plan.nodes.values() if node.type == "fp32")
        largest = max((node.largest for node in plan.nodes.values() if node.largest is not None), default=None)
        table.add_row(
            plan.graph,
            str(sum(kinds.values()) - kinds["fp32"]),
            str(kinds["fp32"]),
            "" if largest is None else f"{largest:,.1f}",
            *(f"{plan.errors[name]:.1e}" if name in plan.errors else "" for name in ("blunt", "plan")),
            ", ".join(f"{reason} {count}" for reason, count in why.most_common()),
        )
    return table


def error_table(report: ErrorReport, rows: int = 8) -> Table:
    """The modules with the largest error of their own, in the graph's order, and the output of each graph."""
    table = Table("graph", "module", "type", box=None, header_style="bold")
    for heading in ("own error", "so far"):
        table.add_column(heading, justify="right")
    for graph, modules in report.graphs.items():
        worst = sorted(modules, key=lambda row: -row.own)[:rows]
        for row in modules:  # in the graph's order
            if row in worst or row is modules[-1]:
                end = " (output)" if row is modules[-1] else ""
                table.add_row(graph, f"{row.module}{end}", row.type, f"{row.own:.1e}", f"{row.error:.1e}")
    return table
