"""`moebius-export`: from weights to a bundle. Heavy imports sit inside the commands, so that `--help` is quick."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from moebius_export.cli_doctor import doctor
from moebius_export.cli_int8 import int8
from moebius_export.cli_precision import precision as precision_command
from moebius_export.cli_precision import type_bundle
from moebius_export.cli_trt import trt
from moebius_runtime import console
from moebius_runtime.errors import InputError, MoebiusError
from moebius_runtime.manifest import Rewrite

if TYPE_CHECKING:
    from moebius_export.precision.kinds import LowType

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """From the PyTorch checkpoint to a bundle that a device runs without PyTorch."""


@app.command()
def onnx(
    out: Annotated[Path, typer.Option(help="Folder of the bundle; an older bundle there is replaced.")],
    weights: Annotated[
        str | None,
        typer.Option(
            help="Released weights: places2 (scenes, the default), celebahq or ffhq (portraits), pretrained; or "
            "hub:OWNER/REPO/FOLDER\\[@REVISION], a file or folder, shipped:small, or stand-in\\[:SEED]. With --preset "
            "small the default is shipped:small."
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="The autoencoder's weights: as --weights. Default: hub:hustvl/PixelHacker/vae; with --preset small, "
            "shipped:small/vae."
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Sizes of the network: full, small or tiny.")] = "full",
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            help="The bundle's default guidance scale. Default: the paper's for released weights, 2.5 for places2 and "
            "pretrained and 2.0 for celebahq and ffhq; the preset's for others, 2.5 or, with --preset small, 1.0.",
        ),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32, and what is typed from it by measured plans: fp32,fp16 or fp32,bf16. Without fp32, "
            "the fp32 files are left out in the end."
        ),
    ] = "fp32",
    batch: Annotated[int, typer.Option(help="Pictures per run, fixed in the graphs.")] = 1,
    dynamic_batch: Annotated[bool, typer.Option(help="Leave the number of pictures open instead.")] = False,
    fuse: Annotated[
        bool,
        typer.Option("--fuse/--no-fuse", help="Rewrite the network to an equal, cheaper one, or leave it as written."),
    ] = True,
    rules: Annotated[
        str | None, typer.Option(help="Only these rewrites: fold_batch_norms,share_prefix, ... Default: all.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="ort-cpu (default), tensorrt or generic: what the fused λ operators are written for."),
    ] = None,
    lowering: Annotated[
        Path | None,
        typer.Option(help="File of `moebius-export tune`: how they are written, in place of the shipped choice."),
    ] = None,
) -> None:
    """Exports the U-Net and the VAE to ONNX, compares each file with PyTorch, and writes the bundle."""
    typed = _typed_precisions(precision)
    from moebius.load import default_sources
    from moebius_export.bundle import STAGES, ExportOptions, export_onnx
    from moebius_export.lowering import DEFAULT_TARGET, TARGETS, lowering_of
    from moebius_export.precision.planning import PlanOptions
    from moebius_export.rules import RULE_NAMES

    own = default_sources(preset)
    weights, vae = weights or own[0], vae or own[1]
    for option, value in (("--rules", rules), ("--target", target), ("--lowering", lowering)):
        if value is not None and not fuse:
            raise InputError(f"{option} {value} means nothing with --no-fuse; leave one of them out")
    chosen = () if not fuse else RULE_NAMES if rules is None else tuple(rules.split(","))
    named = next((known for known in TARGETS if known == (target or DEFAULT_TARGET)), None)
    if named is None:
        raise InputError(f"--target {target}: expected one of {', '.join(TARGETS)}")
    body = None if lowering is None else lowering_of(lowering, named)
    options = ExportOptions(weights, vae, preset, batch, dynamic_batch, chosen, named, body, guidance_scale)
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console.err) as bars:
        tasks: dict[str, TaskID] = {}

        def show(graph: str, stage: str) -> None:
            for name, task in tasks.items():
                if name != graph:
                    bars.update(task, completed=len(STAGES), stage="done")
                    bars.stop_task(task)
            if graph not in tasks:
                tasks[graph] = bars.add_task(graph, total=len(STAGES), stage=stage)
            done = STAGES.index(stage) if stage in STAGES else 0
            bars.update(tasks[graph], completed=done, stage=stage)

        manifest = export_onnx(out, options, show)
        for task in tasks.values():
            bars.update(task, completed=len(STAGES), stage="done")
    for low in typed:
        manifest = type_bundle(out, PlanOptions(to=low), only=low == typed[-1] and "fp32" not in precision.split(","))
    for name, parity in manifest.parity.items():
        console.out.print(f"{name:<17} relative error {parity.relative_error:.1e} against PyTorch")
    if manifest.rewrites:
        console.out.print(_rewrites_table(manifest.rewrites))
    size = sum(file.size for file in manifest.files.values())
    console.out.print(
        f"{out}: {manifest.model.parameters:,} U-Net parameters, {size / 1e6:,.0f} MB, "
        f"{time.perf_counter() - started:.0f} s; default guidance scale {manifest.defaults.guidance_scale:g}"
    )
    if manifest.stand_in:
        console.warn("stand-in weights are random numbers: the picture inside the mask will be noise")


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(help="Folder that `moebius-export onnx` wrote.")],
    weights: Annotated[
        str | None, typer.Option(help="Where PyTorch's weights are, if not where the bundle's came from.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="The autoencoder's weights: as --weights.")] = None,
    precision: Annotated[str | None, typer.Option(help="Such as fp32,fp16; default: all of the bundle.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Inference steps of the trajectory and the picture.")] = 4,
    full: Annotated[bool, typer.Option("--full", help="As many steps as the bundle's default (20).")] = False,
    seed: Annotated[int, typer.Option(help="Of inputs, picture and noise.")] = 1,
    budget: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE in place of a limit of the table; may be repeated.")
    ] = None,
    bisect: Annotated[bool, typer.Option("--bisect", help="Name the first wrong tensor of a wrong file.")] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML page with pictures.")] = None,
) -> None:
    """Compares every file of a bundle with PyTorch: weights, outputs, latents step by step, and a whole picture.

    Exit code 1 where a check failed or could not be run.
    """
    from typing import get_args

    from moebius_export.verify import VerifyOptions
    from moebius_export.verify import verify as run_verification
    from moebius_export.verify.budgets import parse_changes
    from moebius_export.verify.page import write_page
    from moebius_export.verify.results import write_json
    from moebius_export.verify.wording import render
    from moebius_runtime.files import check_writable
    from moebius_runtime.manifest import Precision

    wanted = None if precision is None else tuple(dict.fromkeys(precision.split(",")))
    if unknown := set(wanted or ()) - set(get_args(Precision)):
        raise InputError(f"--precision {', '.join(sorted(unknown))}: expected some of {', '.join(get_args(Precision))}")
    options = VerifyOptions(
        weights=weights,
        vae=vae,
        precisions=wanted,  # type: ignore[arg-type]
        steps=None if full else steps,
        seed=seed,
        bisect=bisect,
        budgets=parse_changes(budget or []),
    )
    for path in (json, html):
        if path is not None:
            check_writable(path)
    with console.err.status("verify") as status:
        report = run_verification(bundle, options, lambda text: status.update(console.one_line(text)))
    console.out.print(render(report))
    if json is not None:
        write_json(report, json)
    if html is not None:
        write_page(report, html)
    raise typer.Exit(report.exit_code)


@app.command()
def tune(
    bundle: Annotated[Path, typer.Argument(help="Folder that `moebius-export onnx` wrote, fused.")],
    out: Annotated[Path, typer.Option(help="File to write the lowerings to; an older one there is replaced.")] = Path(
        "lowerings.json"
    ),
    rounds: Annotated[int, typer.Option(help="Runs of each candidate, 2 or more.")] = 5,
) -> None:
    """Measures the lowerings of Local-λ on this machine, in the bundle's U-Net, and writes the best to a file.

    Each candidate runs in turn with the present choice, on ONNX Runtime's CPU and without compiled kernels, and is
    kept only where it is faster by more than the present choice's own repeats differ. Exit code 1 where a candidate's
    output was not the present one's.
    """
    from moebius_export.lowering import DEFAULT_TARGET, shipped, write_lowerings
    from moebius_export.tune import tune as run_tuning
    from moebius_export.tune import tuning_table
    from moebius_runtime.files import check_writable
    from moebius_runtime.kernels import library_path

    check_writable(out)
    if library_path() is not None:
        console.warn(
            "with compiled kernels this node is one kernel; the choice matters where they are not built, and is "
            "measured without them"
        )
    columns = (TextColumn("tune"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console.err) as bars:
        task = bars.add_task("", total=None)
        result = run_tuning(
            bundle, rounds, lambda done, total, what: bars.update(task, completed=done, total=total, description=what)
        )
    console.out.print(tuning_table(result))
    for note in (*result.notes, *(f"{row.name}: {row.refused}" for row in result.refused)):
        console.warn(note)
    tiles = shipped()[DEFAULT_TARGET].tiles | result.chosen.tiles
    chosen = result.chosen.model_copy(update={"tiles": tiles})
    write_lowerings({**shipped(), DEFAULT_TARGET: chosen}, out)
    words = "the present choice stays" if result.chosen == result.present else "a faster choice was found"
    console.out.print(f"{out}: {words}. Export with it: moebius-export onnx --out BUNDLE --lowering {out}")
    raise typer.Exit(1 if result.refused else 0)


app.command()(precision_command)
app.command()(doctor)
app.command()(trt)
app.command()(int8)


def _typed_precisions(text: str) -> list[LowType]:
    """The precisions of `--precision` that are typed from fp32."""
    names = list(dict.fromkeys(text.split(",")))
    if unknown := set(names) - {"fp32", "fp16", "bf16"}:
        raise InputError(f"--precision {', '.join(sorted(unknown))}: expected some of fp32, fp16, bf16")
    if "fp32" not in names and len(names) > 1:
        raise InputError(f"--precision {text}: with two typed precisions keep fp32 too, which both are made from")
    return [low for low in ("fp16", "bf16") if low in names]


def _rewrites_table(rewrites: Sequence[Rewrite]) -> Table:
    """What each rule did: how often it fired, and a call's GMAC before and after it."""
    table = Table("graph", "rewrite", box=None, header_style="bold")
    for heading in ("fired", "GMAC before", "after"):
        table.add_column(heading, justify="right")
    for rewrite in rewrites:
        macs = ["?" if macs is None else f"{macs / 1e9:.6g}" for macs in (rewrite.macs_before, rewrite.macs_after)]
        table.add_row(rewrite.graph, rewrite.name, str(rewrite.count), *macs)
    return table


def main() -> None:
    """Entry point of `moebius-export`."""
    console.run(app, (MoebiusError,))


if __name__ == "__main__":
    main()
