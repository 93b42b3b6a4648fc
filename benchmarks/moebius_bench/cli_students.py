"""`moebius-bench students`: the architectures of the paper's table 2, counted."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moebius_runtime import console
from moebius_runtime.errors import InputError


def students(
    preset: Annotated[str, typer.Option(help="Preset of the networks: full, small or tiny.")] = "full",
    json_file: Annotated[Path | None, typer.Option("--json", help="File for all figures, as JSON.")] = None,
) -> None:
    """Counts parameters and MACs of the students of the paper's table 2, with the figures of the paper."""
    from moebius_export.network.torch_runtime import import_torch

    if json_file is not None and not json_file.parent.is_dir():
        raise InputError(f"{json_file}: its folder does not exist; make it first")
    import_torch()
    from moebius_bench.paper.students import count_students, students_table, to_json
    from moebius_bench.report.text_report import wide
    from moebius_runtime.files import atomic_write

    rows = count_students(preset, lambda text: console.err.print(text, style="dim"))
    wide(console.out).print(students_table(rows, preset), soft_wrap=False)
    if json_file is not None:
        with atomic_write(json_file) as stream:
            stream.write(to_json(rows, preset).encode())
        console.err.print(f"written: {json_file}", style="dim")
