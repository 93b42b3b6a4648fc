"""`moebius-distill ablate`: compares combinations of losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moebius.errors import TrainingError
from moebius_runtime import console
from moebius_runtime.files import atomic_write, check_writable


def ablate_command(
    config: Annotated[Path, typer.Argument(help="Settings of a student's run.")],
    held_out: Annotated[Path, typer.Option(help="Folder of held-out latents, see `encode`.")],
    steps: Annotated[int, typer.Option(min=1, help="Training steps per combination.")] = 100,
    count: Annotated[int, typer.Option(min=1, help="Held-out samples to inpaint.")] = 32,
    sampler_steps: Annotated[int, typer.Option(min=1, help="Sampler steps per sample.")] = 10,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the table to this file.")] = None,
) -> None:
    """Trains one student per combination of losses and compares them on held-out pictures."""
    from moebius.distill.settings import load_settings

    settings = load_settings(config)
    if settings.train != "student" or settings.vae is None:
        raise TrainingError(f"{config}: expected `train: student` with a `vae`, which decodes the filled pictures")
    if json_file:
        check_writable(json_file)
    from moebius.data.encoded import EncodedStream
    from moebius.distill.ablation import COMBINATIONS, Row, ablate, evaluate
    from moebius.distill.loop.assembly import decoder

    decode, predicted = decoder(settings), settings.network.build().prediction_type

    def measure(student: object) -> tuple[float, float]:
        with EncodedStream(held_out, batch=min(8, count), seed=0) as stream:
            options = {"count": count, "steps": sampler_steps, "prediction_type": predicted}
            return evaluate(student, stream, decode, **options)  # type: ignore[arg-type]

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console.err) as bars:
        tasks = {name: bars.add_task(name, total=steps) for name, _, _ in COMBINATIONS}

        def on_row(row: Row) -> None:
            bars.console.print(f"{row.name}: error {row.error:.4f}, {row.psnr:.2f} dB in the masked region")

        rows = ablate(
            settings,
            steps,
            measure,
            on_step=lambda name, step: bars.update(tasks[name], completed=step),
            on_row=on_row,
        )
    table = Table("losses", "error", "PSNR in the masked region", "training")
    for row in rows:
        table.add_row(row.name, f"{row.error:.4f}", f"{row.psnr:.2f} dB", f"{row.seconds:.0f} s")
    console.out.print(table)
    if json_file:
        with atomic_write(json_file) as stream:
            stream.write(json.dumps({"steps": steps, "rows": [row._asdict() for row in rows]}, indent=1).encode())
