"""`moebius-bench inpaint`: the command."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moebius_runtime import console
from moebius_runtime.bundle.manifest import Precision
from moebius_runtime.errors import InputError
from moebius_runtime.files import atomic_write, check_writable

_CLASSICAL = ("mean", "telea", "ns")


def inpaint(
    bundles: Annotated[
        list[Path] | None,
        typer.Argument(help="Bundles to evaluate, with the classical methods: folders, or hub:OWNER/REPO."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Source of pictures; repeatable. Default: the held-out parts of scenes:24 and photographs."),
    ] = None,
    real: Annotated[Path | None, typer.Option(help="Folder of pictures in place of --data; with --mask.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Folder of their masks, paired by stem.")] = None,
    size: Annotated[int, typer.Option(min=64, help="Side of the pictures, in pixels.")] = 512,
    masks: Annotated[
        str, typer.Option("--masks", "--holes", help="Masks to draw: small, painted, or training (the paper's).")
    ] = "small",
    classical: Annotated[
        str, typer.Option(help="Classical methods, of mean, telea and ns; empty for none.")
    ] = "mean,telea,ns",
    vae: Annotated[
        bool, typer.Option(help="Also encode and decode the true picture: the upper bound for the network.")
    ] = True,
    runtime: Annotated[str, typer.Option(help="Runtime of moebius-inpaint.")] = "ort-cpu",
    precision: Annotated[str, typer.Option(help="Precisions of the bundle, separated by commas.")] = "fp32",
    mode: Annotated[str, typer.Option(help="As in moebius-inpaint.")] = "best",
    steps: Annotated[int | None, typer.Option(min=1, help="Default: the bundle's.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="Share of the steps that are run. Default: the mode's or the bundle's.")
    ] = None,
    start: Annotated[str | None, typer.Option(help="pixels or cells, as in moebius-inpaint.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(min=0, help="Default: the bundle's.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of masks and noise.")] = 0,
    reference: Annotated[
        str | None, typer.Option(help="Compare with the pictures of this method, such as fp32, in place of the truth.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all scores, as JSON.")] = None,
    sheet: Annotated[
        Path | None, typer.Option(help="PNG file for the pictures, cut around their masked regions.")
    ] = None,
) -> None:
    """Inpaints held-out pictures with bundles and classical methods; PSNR and SSIM inside the masked regions."""
    if (real is None) != (mask is None):
        raise InputError("--real and --mask go together: the folder of pictures and that of their masks")
    if real is not None and data:
        raise InputError("--data with --real: name one set of pictures")
    for path in (json_file, sheet):
        if path is not None:
            check_writable(path)
    from moebius_bench.paper.inpainting import (
        Method,
        autoencoder,
        contact_sheet,
        evaluate,
        folder_cases,
        held_out_cases,
        mean_colour,
        network,
        summaries,
    )
    from moebius_bench.paper.inpainting import (
        classical as classical_method,
    )
    from moebius_runtime import InpaintPipeline
    from moebius_runtime.pipeline import make_options

    chosen = [name for name in classical.split(",") if name]
    if unknown := [name for name in chosen if name not in _CLASSICAL]:
        raise InputError(f"--classical {unknown[0]}: expected some of {', '.join(_CLASSICAL)}")
    methods = [Method(name, mean_colour if name == "mean" else classical_method(name)) for name in chosen]
    options = {
        "mode": mode,
        "steps": steps,
        "strength": strength,
        "start": start,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    given = {name: value for name, value in options.items() if value is not None}
    for bundle in bundles or []:
        for index, kind in enumerate(precision.split(",")):
            prefix = "" if len(bundles or []) == 1 else f"{bundle.resolve().name} "
            pipeline = InpaintPipeline.from_bundle(bundle, runtime=runtime, precision=cast(Precision, kind))
            pipeline.check(make_options(**given))
            if vae and index == 0:
                methods.append(Method(f"{prefix}vae", autoencoder(pipeline), sees_truth=True))
            methods.append(Method(prefix + kind, network(pipeline, **given)))
    if not methods:
        raise InputError("nothing to fill with; name a bundle, or methods with --classical")
    texts = data or ["scenes:24", "photographs"]
    if real is not None and mask is not None:
        cases = folder_cases(real, mask)
        described: dict[str, Any] = {"real": str(real), "mask": str(mask)}
    else:
        cases = held_out_cases(texts, size, masks, seed)
        described = {"data": texts, "masks": masks, "size": size}
    columns = (TextColumn("{task.description:<20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err) as bars:
        bar = bars.add_task("", total=len(cases) * len(methods))
        scores, pictures = evaluate(
            cases, methods, reference, lambda case, method: bars.update(bar, advance=1, description=method)
        )
    against = "the truth" if reference is None else reference
    title = f"inside the masked region, against {against}"
    table = Table(
        "method",
        "pictures",
        "number",
        "PSNR",
        "median",
        "SSIM",
        "median",
        "MAE",
        "seconds",
        title=title,
    )
    rows = list(summaries(scores))
    for row in rows:
        table.add_row(
            row.method,
            row.kind,
            str(row.pictures),
            f"{row.psnr:.2f}",
            f"{row.psnr_median:.2f}",
            f"{row.ssim:.3f}",
            f"{row.ssim_median:.3f}",
            f"{row.mae:.2f}",
            f"{row.seconds:.2f}",
        )
    console.out.print(table)
    if sheet is not None:
        with atomic_write(sheet) as stream:
            contact_sheet(cases, pictures).save(stream, "PNG")
    if json_file is not None:
        content = {
            "schema_version": 1,
            "against": against,
            **described,
            "bundles": [str(bundle) for bundle in bundles or []],
            "runtime": runtime,
            "options": given,
            "summaries": [_finite(row._asdict()) for row in rows],
            "scores": [_finite(asdict(score)) for score in scores],
        }
        with atomic_write(json_file) as stream:
            stream.write(json.dumps(content, indent=1, allow_nan=False).encode())


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Infinite values (the PSNR of equal pictures), which JSON has not, as null."""
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in values.items()}
