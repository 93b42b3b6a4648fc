"""Writing files whole or not at all, and the one form of error for files and folders that cannot be written."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moebius_runtime.errors import OutputError

CHOOSE = "Choose an existing, writable folder."
NOTHING_LEFT = "Nothing was left behind; free some space or choose another folder."


def cannot_write(path: str | Path, error: object, advice: str = CHOOSE) -> OutputError:
    """The error for a path that cannot be written: which path, why, and what to do.

    Args:
        path: the file or folder.
        error: an exception, whose text by the system is taken where it has one; or the reason as text.
        advice: what to do, a sentence.
    """
    return OutputError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}. {advice}")


@contextmanager
def atomic_write(path: str | Path, *, follow_links: bool = False) -> Iterator[BinaryIO]:
    """A binary stream whose content is at `path` after the block; if the block raises, nothing is written.

    The bytes go to a temporary file of the same folder, are flushed to the disk and renamed onto `path`. A file that
    is replaced keeps its permissions and, where that is allowed, its owner and group.

    Args:
        path: the file.
        follow_links: write the file that a link at `path` leads to; else the link itself is replaced.

    Raises:
        OutputError: the folder is missing or not writable, `path` is a folder or not a plain file, or the disk is full.
    """
    target = _target(Path(path), follow_links)
    temporary, stream = _temporary(target)
    try:
        with stream:
            _take_over_permissions(stream, target)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise cannot_write(target, error, NOTHING_LEFT) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_writable(path: str | Path, *, follow_links: bool = False) -> None:
    """Checks before any work whether `atomic_write` could begin a file at `path`; raises the same errors."""
    target = _target(Path(path), follow_links)
    temporary, stream = _temporary(target)
    stream.close()
    temporary.unlink()


def _target(path: Path, follow_links: bool) -> Path:
    """The file to replace, which is a plain one or does not exist yet."""
    try:
        target = Path(os.path.realpath(path)) if follow_links and path.is_symlink() else path
        if follow_links and target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise cannot_write(path, error) from error
    if stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and target.is_dir()):
        raise cannot_write(path, "it is a folder", "Choose the name of a file.")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise cannot_write(path, "it is a device or a pipe", "Choose the name of a file.")
    return target


def _take_over_permissions(stream: BinaryIO, target: Path) -> None:
    """Gives a new file the owner, group and permissions of the plain file that it will replace, if there is one.

    If the group cannot be kept, the new group gets only the rights of everybody, because its members may differ.
    """
    if sys.platform == "win32":
        return
    with suppress(FileNotFoundError):
        old = os.lstat(target)
        if not stat.S_ISREG(old.st_mode):
            return
        mode = stat.S_IMODE(old.st_mode) & 0o777
        new = os.fstat(stream.fileno())
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            try:
                os.fchown(stream.fileno(), old.st_uid, old.st_gid)  # noqa: TID251
            except OSError:
                with suppress(OSError):
                    os.fchown(stream.fileno(), -1, old.st_gid)  # noqa: TID251
        if os.fstat(stream.fileno()).st_gid != old.st_gid:
            mode &= ~0o070 | (mode & 0o007) << 3
        os.fchmod(stream.fileno(), mode)  # noqa: TID251


def _temporary(target: Path) -> tuple[Path, BinaryIO]:
    """Creates a new file next to `target`. Its permissions follow the umask, unlike those of `mkstemp`."""
    temporary = target.parent / f".{target.name[:40]}.{secrets.token_hex(8)}.part"
    try:
        return temporary, open(temporary, "xb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise cannot_write(target, error) from error
