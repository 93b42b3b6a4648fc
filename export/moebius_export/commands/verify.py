"""The command `moebius-export verify`. Imports PyTorch only when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius_runtime import console
from moebius_runtime.errors import InputError


def verify(
    bundle: Annotated[
        Path, typer.Argument(help="Folder that `moebius-export onnx` wrote, or hub:OWNER/REPO[@REVISION].")
    ],
    weights: Annotated[
        str | None, typer.Option(help="PyTorch's weights, if they are not at the origin in the manifest.")
    ] = None,
    vae: Annotated[str | None, typer.Option(help="Weights of the autoencoder, as --weights.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precisions, such as fp32,fp16. Default: all of the bundle.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Inference steps of the trajectory and the picture.")] = 4,
    full: Annotated[bool, typer.Option("--full", help="Use the bundle's default number of steps (20).")] = False,
    seed: Annotated[int, typer.Option(help="Seed of inputs, picture and noise.")] = 1,
    budget: Annotated[list[str] | None, typer.Option(help="NAME=VALUE replaces a limit; may be repeated.")] = None,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Name the first wrong tensor of each file that fails.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as one HTML page with pictures.")] = None,
) -> None:
    """Compares every file of a bundle with PyTorch: weights, outputs, latents after each step, and a whole picture.

    Exit code 1 if a check failed or could not be run.
    """
    from typing import get_args

    from moebius_export.verify import VerifyOptions
    from moebius_export.verify import verify as run_verification
    from moebius_export.verify.budgets import parse_changes
    from moebius_export.verify.messages import render
    from moebius_export.verify.page import write_page
    from moebius_export.verify.results import write_json
    from moebius_runtime.bundle.manifest import Precision
    from moebius_runtime.files import check_writable

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
