"""`moebius-bench inpaint`: the command."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moebius_runtime import console
from moebius_runtime.errors import InputError
from moebius_runtime.files import atomic_write, check_writable

_CLASSICAL = ("mean", "telea", "ns")


def inpaint(
    bundles: Annotated[
        list[Path] | None, typer.Argument(help="Bundles whose networks fill, beside the others.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Repeatable. Default: scenes:24 and photographs, their held-out parts.")
    ] = None,
    size: Annotated[int, typer.Option(min=64, help="Pixels of a side.")] = 512,
    holes: Annotated[str, typer.Option(help="small, or training (the paper's).")] = "small",
    classical: Annotated[str, typer.Option(help="Of mean, telea, ns; empty for none.")] = "mean,telea,ns",
    runtime: Annotated[str, typer.Option(help="Of moebius-inpaint.")] = "ort-cpu",
    precision: Annotated[str, typer.Option(help="One or more of the bundle's precisions.")] = "fp32",
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the bundle's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="Default: the bundle's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of holes and noise.")] = 0,
    reference: Annotated[
        str | None, typer.Option(help="Compare with this method's pictures, such as fp32, in place of the truth.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Every score.")] = None,
    sheet: Annotated[Path | None, typer.Option(help="A PNG of the pictures around their holes.")] = None,
) -> None:
    """Fills holes of pictures that nothing was trained on; PSNR and SSIM inside of them, beside classical methods."""
    for path in (json_file, sheet):
        if path is not None:
            check_writable(path)
    from moebius_bench.inpainting import (
        Method,
        contact_sheet,
        evaluate,
        held_out_cases,
        mean_colour,
        network,
        summaries,
    )
    from moebius_bench.inpainting import (
        classical as classical_method,
    )
    from moebius_runtime import InpaintPipeline

    chosen = [name for name in classical.split(",") if name]
    if unknown := [name for name in chosen if name not in _CLASSICAL]:
        raise InputError(f"--classical {unknown[0]}: expected some of {', '.join(_CLASSICAL)}")
    methods = [Method(name, mean_colour if name == "mean" else classical_method(name)) for name in chosen]
    options = {"steps": steps, "guidance_scale": guidance_scale, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    for bundle in bundles or []:
        for kind in precision.split(","):
            label = kind if len(bundles or []) == 1 else f"{bundle.name} {kind}"
            pipeline = InpaintPipeline.from_bundle(bundle, runtime=runtime, precision=kind)
            methods.append(Method(label, network(pipeline, **given)))
    if not methods:
        raise InputError("nothing to fill with; name a bundle, or methods with --classical")
    cases = held_out_cases(data or ["scenes:24", "photographs"], size, holes, seed)
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err) as bars:
        bar = bars.add_task("", total=len(cases) * len(methods))
        scores, pictures = evaluate(
            cases, methods, reference, lambda case, method: bars.update(bar, advance=1, description=method)
        )
    against = "the truth" if reference is None else reference
    table = Table(
        "method", "pictures", "number", "PSNR", "median", "SSIM", "seconds", title=f"inside the hole, against {against}"
    )
    for row in summaries(scores):
        table.add_row(
            row.method,
            row.kind,
            str(row.pictures),
            f"{row.psnr:.2f}",
            f"{row.psnr_median:.2f}",
            f"{row.ssim:.3f}",
            f"{row.seconds:.2f}",
        )
    console.out.print(table)
    if sheet is not None:
        with atomic_write(sheet) as stream:
            contact_sheet(cases, pictures).save(stream, "PNG")
    if json_file is not None:
        content = {"against": against, "holes": holes, "size": size, "seed": seed}
        with atomic_write(json_file) as stream:
            stream.write(json.dumps(content | {"scores": [asdict(score) for score in scores]}, indent=1).encode())
