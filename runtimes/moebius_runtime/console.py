"""Terminal input and output of all commands: exit codes, errors on one line, notes on the error stream."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Annotated, Any, BinaryIO, cast

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from moebius_runtime.errors import InputError
from moebius_runtime.errors import one_line as one_line


class StdoutLostError(Exception):
    """Standard output cannot be written any more: its disk is full, or its reader has exited."""


class _Stream:
    """A text stream that discards everything after its first error, so that the interpreter's last flush is silent.

    An error of standard output raises `StdoutLostError`. An error of the error stream is ignored.
    """

    def __init__(self, stream: IO[str], descriptor: int) -> None:
        self._stream, self._descriptor = stream, descriptor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._guarded(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._guarded(lambda: self._stream.flush())

    def _guarded(self, work: Callable[[], int | None]) -> int:
        try:
            return work() or 0
        except OSError as error:
            discard(self._descriptor)
            if self._descriptor == 1:
                raise StdoutLostError(error) from error
            return 0


class _Console(Console):
    """A rich console that writes to a `_Stream`."""

    @property
    def file(self) -> IO[str]:
        """The stream to print to."""
        return cast("IO[str]", _Stream(super().file, 2 if self.stderr else 1))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


_MAX_STDIN = 1 << 30


def read_stdin() -> bytes:
    """Reads all of standard input, for a picture given as `-`.

    Raises:
        InputError: it is a terminal or closed, cannot be read, or is larger than 1 GiB.
    """
    stream = sys.stdin
    if stream is None or stream.isatty():
        raise InputError("standard input is a terminal or closed; expected a picture, as in `COMMAND - < PICTURE`")
    try:
        data = stream.buffer.read(_MAX_STDIN + 1)
    except OSError as error:
        raise InputError(f"cannot read standard input: {error.strerror}; expected a picture") from error
    if len(data) > _MAX_STDIN:
        raise InputError(f"standard input holds over {_MAX_STDIN >> 30} GiB; expected one picture")
    return data


def binary_stdout() -> BinaryIO:
    """Returns standard output for a picture's bytes; raises `InputError` if it is a terminal or closed."""
    if sys.stdout is None or sys.stdout.isatty():
        raise InputError("standard output is a terminal or closed, which takes no picture; redirect it, or name a file")
    return sys.stdout.buffer


def write_binary(stream: BinaryIO, data: bytes) -> None:
    """Writes a picture's bytes to standard output; raises `StdoutLostError` if that fails."""
    try:
        stream.write(data)
        stream.flush()
    except OSError as error:
        discard(1)
        raise StdoutLostError(error) from error


def discard(descriptor: int) -> None:
    """Points a standard stream to the null device."""
    with suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)


out = _Console(highlight=False, soft_wrap=True, markup=False)
err = _Console(stderr=True, highlight=False, soft_wrap=True, markup=False)

INTERRUPTED = 130


def _print_version(wanted: bool) -> None:
    if wanted:
        from moebius_runtime.version import own_version

        version = own_version()
        out.print(f"moebius-edge {version}" if version else "moebius-edge, from a checkout that is not installed")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
]
"""The type of the parameter `version` that every command has."""


def default_group(command: str) -> type[TyperGroup]:
    """A command group with a default command: `moebius-bench BUNDLE` means `moebius-bench run BUNDLE`."""

    class DefaultGroup(TyperGroup):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            if args and args[0] not in (*self.commands, "--help", "--version"):
                args = [command, *args]
            return super().parse_args(ctx, args)

    return DefaultGroup


# The base class of usage errors. Some versions of Typer contain Click, others depend on it.
_UsageProblem: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(app: typer.Typer, user_errors: tuple[type[Exception], ...]) -> None:
    """Runs a command line and exits the process with its exit code.

    | end | exit code |
    | --- | --- |
    | an error of one of the `user_errors` types, printed on one line | the type's `exit_code`, or 2 |
    | wrong options, or too little memory | 2 |
    | interrupted | 130 |
    | standard output cannot be written | 1, or 141 if its reader has exited, as for other Unix tools |

    Any other exception is a bug and keeps its traceback.
    """
    for descriptor in range(3):  # else the next opened file would take the place of a closed standard stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs errors that it also raises
    sys.exit(_exit_code(lambda: app(standalone_mode=False), user_errors))


def _exit_code(command: Callable[[], object], user_errors: tuple[type[Exception], ...]) -> int:
    try:
        code = command()  # the code of typer.Exit, also for --help; None if the command returns
    except user_errors as error:
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
        code = INTERRUPTED
    except StdoutLostError as lost:
        if isinstance(lost.__cause__, BrokenPipeError):
            return 128 + 13  # as after SIGPIPE: the reader has exited
        reason = getattr(lost.__cause__, "strerror", None) or lost.__cause__
        _error(f"cannot write to standard output: {reason}; files written before are complete")
        return 1
    if code == INTERRUPTED:  # typer can also return it as an exit code
        err.print("interrupted; no half-written file was left behind")
    return code if isinstance(code, int) else 0


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silences C libraries on the error stream: libtiff prints damage there that Pillow also raises."""
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
    """Prints a note, one line, to the error stream."""
    err.print(Text.assemble(("note: ", "bold yellow"), one_line(message)))


def _error(message: str) -> None:
    err.print(Text.assemble(("error: ", "bold red"), one_line(message)))
