"""`moebius-bench tradeoff`: the command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from moebius_runtime import console
from moebius_runtime.commands.options import PrecisionName
from moebius_runtime.errors import InputError
from moebius_runtime.files import atomic_write, check_writable


def tradeoff(
    bundle: Annotated[Path, typer.Argument(help="Bundle to measure.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of pictures, or scenes:N or photographs (held-out parts); repeatable. Default: scenes:24 and "
            "photographs."
        ),
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of pictures in place of --data; with --mask.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Folder of their masks, paired by stem.")] = None,
    size: Annotated[int, typer.Option(min=64, help="Side of the pictures of --data, in pixels.")] = 512,
    masks: Annotated[str, typer.Option(help="Masks to draw: small, or training (the paper's).")] = "small",
    pictures: Annotated[
        int | None, typer.Option(min=1, help="Number of pictures, evenly chosen. Default: all of them.")
    ] = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(
            help="MODE or MODE,OPTION=VALUE,..., such as best,steps=8,sampler=unipc; repeatable. Default: every mode, "
            "and best with single options."
        ),
    ] = None,
    runtime: Annotated[str, typer.Option(help="Runtime of moebius-inpaint.")] = "ort-cpu",
    precision: Annotated[PrecisionName | None, typer.Option(help="Precision of the U-Net.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU. Default: the physical cores.")] = None,
    perceptual: Annotated[bool, typer.Option(help="Also measure the perceptual distance (extra `quality`).")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the masks.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="File for a page with the Pareto front.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file for the pictures, cut around their masked regions.")
    ] = None,
) -> None:
    """Measures time against quality inside the mask, for modes and single options."""
    if (real is None) != (mask is None):
        raise InputError("--real and --mask go together: the folder of pictures and that of their masks")
    if real is not None and data:
        raise InputError("--data with --real: name one set of pictures")
    for path in (json_file, html_file, sheet):
        if path is not None:
            check_writable(path)
    from moebius_bench.measure.machine import describe_machine
    from moebius_bench.paper.imagenet_features import ImageNetDistance
    from moebius_bench.paper.inpainting import contact_sheet, folder_cases, held_out_cases
    from moebius_bench.report.text_report import wide
    from moebius_bench.tradeoff.measure import Tradeoff, measure
    from moebius_bench.tradeoff.page import page, table
    from moebius_bench.tradeoff.variants import chosen_variants
    from moebius_runtime import InpaintPipeline

    distance = ImageNetDistance() if perceptual else None
    pipeline = InpaintPipeline.from_bundle(
        bundle, runtime, threads=threads, memory="fast", precision=None if precision is None else precision.value
    )
    variants, notes = chosen_variants(variant or [], pipeline)
    if real is not None and mask is not None:
        cases = folder_cases(real, mask)
        described = {"pictures": str(real), "masks": str(mask)}
    else:
        texts = data or ["scenes:24", "photographs"]
        cases = held_out_cases(texts, size, masks, seed)
        described = {"data": ", ".join(texts), "masks": f"{masks}, seed {seed}", "size": f"{size}x{size}"}
    if pictures is not None and pictures < len(cases):
        cases = [cases[index * len(cases) // pictures] for index in range(pictures)]
    if pipeline.manifest.stand_in:
        notes.append("random test weights (stand-in): times are valid, pictures and their distances mean nothing")
    machine = describe_machine()
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err) as bars:
        bar = bars.add_task("", total=len(cases) * len(variants))
        rows, made = measure(
            pipeline,
            cases,
            variants,
            distance,
            lambda case, name: bars.update(bar, advance=1, description=name),
        )
    result = Tradeoff(
        bundle=bundle.resolve().name,
        runtime=pipeline.backend.describe(),
        machine=machine,
        data=described,
        pictures=len(cases),
        quality="Distances are means over the pictures, inside the mask; times are medians. The perceptual distance is "
        "that of LPIPS without learned weights, on features of EfficientNet-Lite0.",
        rows=rows,
        notes=notes,
    )
    for note in notes:
        console.warn(note)
    wide(console.out).print(table(result), soft_wrap=False)
    for path, text in ((json_file, result.model_dump_json(indent=1)), (html_file, None)):
        if path is not None:
            with atomic_write(path) as stream:
                stream.write((page(result) if text is None else text).encode())
    if sheet is not None:
        with atomic_write(sheet) as stream:
            contact_sheet(cases, made).save(stream, "PNG")
