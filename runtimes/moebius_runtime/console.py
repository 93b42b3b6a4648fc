"""What the commands share: exit codes, errors on one line, progress on the error stream."""

from __future__ import annotations

import sys
from collections.abc import Callable

import typer
from rich.console import Console
from rich.text import Text

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def run(app: typer.Typer, mendable: tuple[type[Exception], ...]) -> None:
    """Runs a command line and leaves with its exit code.

    Errors of `mendable` types are the user's to mend: one line, and the type's `exit_code` (2 where it has none).
    Anything else is a bug and keeps its traceback.
    """
    sys.exit(_exit_code(lambda: app(), mendable))


def _exit_code(command: Callable[[], object], mendable: tuple[type[Exception], ...]) -> int | str | None:
    try:
        command()
    except SystemExit as leaving:  # typer's own: usage errors are 2, typer.Exit carries its code
        return leaving.code
    except mendable as error:
        err.print(Text.assemble(("error: ", "bold red"), " ".join(str(error).split())))
        return int(getattr(error, "exit_code", 2))
    except KeyboardInterrupt:
        err.print("interrupted; nothing half-written was left behind")
        return 130
    return 0


def warn(message: str) -> None:
    """A line of its own on the error stream."""
    err.print(Text.assemble(("note: ", "bold yellow"), message))
