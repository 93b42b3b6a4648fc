"""What the commands share: exit codes, errors on one line, progress on the error stream."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

out = Console(highlight=False, soft_wrap=True, markup=False)
err = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

# The base of usage errors. Typer brings Click along in some versions and depends on it in others.
_UsageProblem: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(app: typer.Typer, mendable: tuple[type[Exception], ...]) -> None:
    """Runs a command line and leaves with its exit code.

    Errors of `mendable` types are the user's to mend: one line, and the type's `exit_code` (2 where it has none). So
    are wrong options (2) and too little memory (2). Anything else is a bug and keeps its traceback.
    """
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs as errors what it raises as well
    sys.exit(_exit_code(lambda: app(standalone_mode=False), mendable))


def _exit_code(command: Callable[[], object], mendable: tuple[type[Exception], ...]) -> int:
    try:
        code = command()  # what typer.Exit carries, also for --help; None where the command just ends
    except mendable as error:
        _error(str(error))
        return int(getattr(error, "exit_code", 2))
    except _UsageProblem as problem:
        if type(problem).__name__ == "NoArgsIsHelpError":
            problem.show()
        else:
            _error(f"{problem.format_message().rstrip('.')}; see --help")
        return 2
    except MemoryError:
        _error("not enough memory; close other programs, or give smaller pictures")
        return 2
    except (KeyboardInterrupt, typer.Abort):
        err.print("interrupted; nothing half-written was left behind")
        return 130
    return code if isinstance(code, int) else 0


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps what is not Python off the error stream: libtiff writes there of damage that Pillow raises as well."""
    try:
        saved = os.dup(2)
    except OSError:  # the process was started without an error stream
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def warn(message: str) -> None:
    """A line of its own on the error stream."""
    err.print(Text.assemble(("note: ", "bold yellow"), one_line(message)))


def _error(message: str) -> None:
    err.print(Text.assemble(("error: ", "bold red"), one_line(message)))


def one_line(message: str) -> str:
    """On one line, and without characters that a terminal would obey: file names and files can hold any."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in " ".join(message.splitlines())
    )
