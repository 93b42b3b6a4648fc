"""What the commands share: exit codes, errors on one line, progress on the error stream."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any, BinaryIO, cast

import typer
from rich.console import Console
from rich.text import Text

from moebius_runtime.errors import InputError


class StdoutLostError(Exception):
    """Standard output takes no more: its disk is full, or its reader has gone."""


class _Stream:
    """A text stream that is lost for good at its first error, so that the interpreter's last flush is quiet.

    What is lost on standard output raises `StdoutLostError`. A lost error stream is no reason to stop.
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
    """A console over `_Stream`."""

    @property
    def file(self) -> IO[str]:
        """The stream that is printed to."""
        return cast("IO[str]", _Stream(super().file, 2 if self.stderr else 1))

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file


_MAX_STDIN = 1 << 30


def read_stdin() -> bytes:
    """All of standard input, for a picture that is given as `-`.

    Raises:
        InputError: it is a terminal or closed, cannot be read, or holds over 1 GiB.
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
    """Standard output for a picture's bytes; `InputError` where it is a terminal or closed."""
    if sys.stdout is None or sys.stdout.isatty():
        raise InputError("standard output is a terminal or closed, which takes no picture; redirect it, or name a file")
    return sys.stdout.buffer


def write_binary(stream: BinaryIO, data: bytes) -> None:
    """Writes a picture's bytes to standard output; `StdoutLostError` where it does not take all of them."""
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

# The base of usage errors. Typer brings Click along in some versions and depends on it in others.
_UsageProblem: type[Any] = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def run(app: typer.Typer, mendable: tuple[type[Exception], ...]) -> None:
    """Runs a command line and leaves with its exit code.

    Errors of `mendable` types are the user's to mend: one line, and the type's `exit_code` (2 where it has none). So
    are wrong options (2) and too little memory (2). Interrupted is 130. A standard output that takes no more is 1,
    or 141 where its reader has gone, as other Unix tools do. Anything else is a bug and keeps its traceback.
    """
    for descriptor in range(3):  # a file that is opened must not become a standard stream that was closed
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
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
        code = INTERRUPTED
    except StdoutLostError as lost:
        if isinstance(lost.__cause__, BrokenPipeError):
            return 128 + 13  # as if by SIGPIPE: the reader wanted no more
        reason = getattr(lost.__cause__, "strerror", None) or lost.__cause__
        _error(f"cannot write to standard output: {reason}; files that were written before are whole")
        return 1
    if code == INTERRUPTED:  # typer makes an exit code of it, too
        err.print("interrupted; nothing half-written was left behind")
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
