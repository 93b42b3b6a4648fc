"""`moebius-export onnx`: the command. Heavy imports sit inside, so that `--help` is quick."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from moebius_export.commands.precision import type_bundle
from moebius_runtime import console
from moebius_runtime.bundle.manifest import Manifest, Rewrite
from moebius_runtime.bundle.passport import ENGINES
from moebius_runtime.errors import InputError

if TYPE_CHECKING:
    from moebius_export.graph.kinds import LowType


def onnx(
    out: Annotated[
        Path,
        typer.Option(
            help="Folder of the bundle. Of an older one there, engines and other precisions stay if they still hold."
        ),
    ],
    weights: Annotated[
        str | None,
        typer.Option(
            help="Released weights: places2 (scenes, the default), celebahq or ffhq (portraits), pretrained; or "
            "hub:OWNER/REPO/FOLDER\\[@REVISION], a file or folder, shipped:small, or stand-in\\[:SEED] (random test "
            "weights). With --preset small the default is shipped:small."
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            help="The autoencoder's weights: as --weights. Default: hub:hustvl/PixelHacker/vae; with --preset small, "
            "shipped:small/vae."
        ),
    ] = None,
    tiny_decoder: Annotated[
        str | None,
        typer.Option(
            help="Also export a tiny decoder of these weights, for --vae-decoder tiny and mode fast: "
            "hub:madebyollin/taesdxl for the released network, or a file of its sizes."
        ),
    ] = None,
    masked_decode: Annotated[
        bool,
        typer.Option(help="Also export the decoder in two parts, for --decode masked and modes balanced and fast."),
    ] = True,
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
            help="fp32, and mixed precision by a checked plan: fp32,fp16 or fp32,bf16. Without fp32, the fp32 files "
            "are removed at the end."
        ),
    ] = "fp32",
    batch: Annotated[int, typer.Option(help="Batch size, fixed in the graphs.")] = 1,
    dynamic_batch: Annotated[bool, typer.Option(help="Leave the batch size open instead.")] = False,
    fuse: Annotated[
        bool,
        typer.Option("--fuse/--no-fuse", help="Fuse layers by exact rewrites, or export the unfused network."),
    ] = True,
    rules: Annotated[
        str | None, typer.Option(help="Only these rewrites: fold_batch_norms,share_prefix, ... Default: all.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Target of the fused λ operators: ort-cpu (default), tensorrt, webgpu or generic. webgpu also writes "
            "standard operators only, without what that provider computes wrongly."
        ),
    ] = None,
    inline: Annotated[
        bool,
        typer.Option(
            "--inline",
            help="Write standard ONNX operators only, for OpenVINO, ncnn, TVM and other readers. The compiled kernels "
            "of ort-cpu need the functions, so that runtime is slower without them.",
        ),
    ] = False,
    lowering: Annotated[
        Path | None,
        typer.Option(help="File of `moebius-export tune` with the layout of these operators; default: shipped."),
    ] = None,
) -> None:
    """Exports the U-Net and the VAE to ONNX, compares each file with PyTorch, and writes the bundle."""
    typed = _typed_precisions(precision)
    from moebius.weights.load import default_sources
    from moebius_export.lowering.lowering import DEFAULT_TARGET, TARGETS, lowering_of
    from moebius_export.onnx_export.export import STAGES, ExportOptions, export_onnx
    from moebius_export.precision.quick import quick_options
    from moebius_export.rules import RULE_NAMES

    own = default_sources(preset)
    weights, vae = weights or own[0], vae or own[1]
    for option, value in (("--rules", rules), ("--target", target), ("--lowering", lowering)):
        if value is not None and not fuse:
            raise InputError(f"{option} {value} has no effect with --no-fuse; leave one of them out")
    chosen = () if not fuse else RULE_NAMES if rules is None else tuple(rules.split(","))
    named = next((known for known in TARGETS if known == (target or DEFAULT_TARGET)), None)
    if named is None:
        raise InputError(f"--target {target}: expected one of {', '.join(TARGETS)}")
    body = None if lowering is None else lowering_of(lowering, named)
    options = ExportOptions(
        *(weights, vae, preset, batch, dynamic_batch, chosen, named, body, guidance_scale),
        inline=inline,
        masked=masked_decode,
        tiny_decoder=tiny_decoder,
    )
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

        manifest = export_onnx(out, options, show, console.warn, two_processes=True)
        for task in tasks.values():
            bars.update(task, completed=len(STAGES), stage="done")
    for low in typed:
        only = low == typed[-1] and "fp32" not in precision.split(",")
        if only:
            engines = sorted(path.name for path in (out / ENGINES).glob("[!.]*"))
            others = {kind for graph in manifest.graphs.values() for kind in graph.files} - {"fp32", low}
            for removed in (
                *(f"{ENGINES}/{name}" for name in engines),
                *(f"the {kind} files" for kind in sorted(others)),
            ):
                console.warn(
                    f"{removed} of the earlier bundle: removed, since --precision {precision} keeps {low} alone"
                )
        manifest = type_bundle(out, quick_options(to=low), only=only)
    for name, parity in manifest.parity.items():
        console.out.print(f"{name:<17} relative error {parity.relative_error:.1e} against PyTorch")
    if manifest.rewrites:
        console.out.print(_rewrites_table(manifest.rewrites))
    size = sum(file.size for file in manifest.files.values())
    console.out.print(
        f"{out}: {manifest.model.parameters:,} U-Net parameters, {size / 1e6:,.0f} MB, "
        f"{time.perf_counter() - started:.0f} s; {_sampling(manifest)}"
    )
    if manifest.stand_in:
        console.warn("stand-in weights are random numbers: the masked region will be noise")


def _sampling(manifest: Manifest) -> str:
    """The bundle's guidance, and its sampler and steps where its network was distilled for them."""
    scale, defaults = f"{manifest.defaults.guidance_scale:g}", manifest.defaults
    if manifest.guidance is None:
        return f"default guidance scale {scale}"
    steps = f", sampler lcm, {defaults.num_inference_steps} steps" if defaults.sampler == "lcm" else ""
    return f"guidance distilled at {scale}{steps}"


def _typed_precisions(text: str) -> list[LowType]:
    """Returns the precisions of `--precision` below fp32."""
    names = list(dict.fromkeys(text.split(",")))
    if unknown := set(names) - {"fp32", "fp16", "bf16"}:
        raise InputError(f"--precision {', '.join(sorted(unknown))}: expected some of fp32, fp16, bf16")
    if "fp32" not in names and len(names) > 1:
        raise InputError(f"--precision {text}: two lower precisions need fp32 too, which both are made from")
    return [low for low in ("fp16", "bf16") if low in names]


def _rewrites_table(rewrites: Sequence[Rewrite]) -> Table:
    """A row per rule: how often it fired, and the GMAC of a call before and after it."""
    table = Table("graph", "rewrite", box=None, header_style="bold")
    for heading in ("fired", "GMAC before", "after"):
        table.add_column(heading, justify="right")
    for rewrite in rewrites:
        macs = ["?" if macs is None else f"{macs / 1e9:.6g}" for macs in (rewrite.macs_before, rewrite.macs_after)]
        table.add_row(rewrite.graph, rewrite.name, str(rewrite.count), *macs)
    return table
