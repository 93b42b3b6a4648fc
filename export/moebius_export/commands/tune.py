"""`moebius-export tune`: the command. Heavy imports sit inside, so that `--help` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from moebius_runtime import console


def tune(
    bundle: Annotated[Path, typer.Argument(help="Folder that `moebius-export onnx` wrote, fused; or hub:OWNER/REPO.")],
    out: Annotated[Path, typer.Option(help="File to write the lowerings to; an older one there is replaced.")] = Path(
        "lowerings.json"
    ),
    rounds: Annotated[int, typer.Option(help="Runs of each candidate, 2 or more.")] = 5,
) -> None:
    """Measures the lowerings of Local-λ on this machine, in the bundle's U-Net, and writes the best to a file.

    Each candidate alternates with the present choice, on ONNX Runtime's CPU without compiled kernels, and is
    kept only where it is faster by more than the present choice's own repeats differ. Exit code 1 where a candidate's
    output was not the present one's.
    """
    from moebius_export.lowering.lowering import DEFAULT_TARGET, shipped, write_lowerings
    from moebius_export.lowering.tune import tune as run_tuning
    from moebius_export.lowering.tune import tuning_table
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
