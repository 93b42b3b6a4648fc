"""The command `moebius-export doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from moebius_runtime import console

_STYLES = {"ok": "green", "missing": "yellow", "wrong": "bold red", "failed": "bold magenta"}


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Argument(help="Also check this bundle: its files and its engines. hub:OWNER/REPO is fetched whole."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the report as JSON.")] = None,
) -> None:
    """Reports what this machine can run, whether a bundle and its engines fit it, and commands that fix what does not.

    Exit code 1 if no runtime can run or the bundle is damaged. Needs only the base package.
    """
    from moebius_export.doctor import Sources, examine
    from moebius_export.doctor.rows import write_json
    from moebius_runtime.files import check_writable

    if json is not None:
        check_writable(json)
    with console.err.status("doctor") as status:
        report = examine(bundle, Sources(), lambda what: status.update(console.one_line(what)))
    for part in report.parts:
        console.out.print(Text(part.name, style="bold"))
        for row in part.rows:
            verdict = Text(f"  {row.verdict.value:<8}", style=_STYLES[row.verdict.value])
            console.out.print(verdict.append(f"{row.name}: {console.one_line(row.found)}", style="default"))
            if row.fix is not None:
                console.out.print(Text(f"          -> {console.one_line(row.fix)}", style="cyan"))
    can = ", ".join(report.usable) or "no runtime"
    console.out.print(Text(f"\n{can} can run here", style="bold"))
    if report.sound is False:
        console.out.print(Text(f"{bundle} is damaged, or holds damaged or foreign engines", style="bold red"))
    if json is not None:
        write_json(report, json)
    raise typer.Exit(report.exit_code)
