"""`moebius-export`: from weights to a bundle. Heavy imports sit inside the commands, so that `--help` is quick."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moebius.errors import CheckpointError
from moebius_runtime import console
from moebius_runtime.errors import InputError, MoebiusError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _commands() -> None:
    """From the PyTorch checkpoint to a bundle that a device runs without PyTorch."""


@app.command()
def onnx(
    out: Annotated[Path, typer.Option(help="Folder of the bundle; an older bundle there is replaced.")],
    weights: Annotated[
        str, typer.Option(help="hub:OWNER/REPO/FOLDER[@REVISION], a file or folder, or stand-in[:SEED].")
    ] = "hub:hustvl/Moebius/ft_places2",
    vae: Annotated[str, typer.Option(help="The autoencoder's weights: as --weights.")] = "hub:hustvl/PixelHacker/vae",
    preset: Annotated[str, typer.Option(help="Sizes of the network: full, small or tiny.")] = "full",
    precision: Annotated[str, typer.Option(help="fp32; other precisions come with a later version.")] = "fp32",
    batch: Annotated[int, typer.Option(help="Pictures per run, fixed in the graphs.")] = 1,
    dynamic_batch: Annotated[bool, typer.Option(help="Leave the number of pictures open instead.")] = False,
) -> None:
    """Exports the U-Net and the VAE to ONNX, compares each file with PyTorch, and writes the bundle."""
    if precision != "fp32":
        raise InputError(f"--precision {precision}: this version of moebius-edge writes fp32 only; leave it out")
    from moebius_export.bundle import STAGES, ExportOptions, export_onnx

    options = ExportOptions(weights, vae, preset, batch, dynamic_batch)
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
    for name, parity in manifest.parity.items():
        console.out.print(f"{name:<17} relative error {parity.relative_error:.1e} against PyTorch")
    size = sum(file.size for file in manifest.files.values())
    console.out.print(
        f"{out}: {manifest.model.parameters:,} U-Net parameters, {size / 1e6:,.0f} MB, "
        f"{time.perf_counter() - started:.0f} s"
    )
    if manifest.stand_in:
        console.warn("stand-in weights are random numbers: the picture inside the mask will be noise")


def main() -> None:
    """Entry point of `moebius-export`."""
    console.run(app, (MoebiusError, CheckpointError))


if __name__ == "__main__":
    main()
