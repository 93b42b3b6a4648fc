"""Files written whole or not at all, and read only where they are plain files."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from moebius_runtime.errors import OutputError

_CHUNK = 1 << 20


def open_plain(path: str | Path) -> BinaryIO:
    """A plain file, open for reading. Pipes and devices, which could be waited for or read without end, are refused.

    Raises:
        OSError: there is no such file, it cannot be read, or it is not a plain one; `strerror` says which.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a NUL character in its name")
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a plain file")
    return open(path, "rb")


def sha256_file(path: str | Path) -> str:
    """Hex SHA-256 of a plain file, read in pieces of 1 MiB; `OSError` as `open_plain`."""
    digest = hashlib.sha256()
    with open_plain(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class MappedFile:
    """A plain file mapped into memory, read-only. `view` is its content; it is valid until `close`.

    Mapped pages are clean pages of the system's file cache, which it takes back whenever memory is short. A mapping
    stays whole when its file is replaced or removed, as `atomic_write` does it; a file that is cut while it is mapped
    ends the process (SIGBUS), as with any mapped file.

    Raises:
        OSError: as `open_plain`, or the file is empty, or cannot be mapped.
    """

    def __init__(self, path: str | Path) -> None:
        with open_plain(path) as stream:
            if not os.fstat(stream.fileno()).st_size:
                raise OSError(errno.EINVAL, "it is empty")
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.view = memoryview(self._map)

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self.view)

    def sha256(self) -> str:
        """Hex SHA-256 of the content."""
        digest = hashlib.sha256()
        for start in range(0, len(self.view), _CHUNK):  # in pieces, so that an interrupt ends it
            digest.update(self.view[start : start + _CHUNK])
        return digest.hexdigest()

    def close(self) -> None:
        """Ends the mapping. Whoever still holds a buffer of it keeps it alive: it then ends with that buffer."""
        with suppress(BufferError):
            self.view.release()
            self._map.close()


@contextmanager
def native_path(path: Path) -> Iterator[str]:
    """A name of `path` that is valid UTF-8, for libraries that take no other; it holds inside the block.

    A path that is UTF-8 is returned unchanged. Of another one, Linux names the folder by its descriptor.

    Raises:
        OSError: the path is not UTF-8 and this system has no other name for it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        pass
    else:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        if not Path(f"/proc/self/fd/{folder}").exists():
            raise OSError(errno.EILSEQ, "its path is not UTF-8; rename the folder")
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


@contextmanager
def atomic_write(path: str | Path, *, follow_links: bool = False) -> Iterator[BinaryIO]:
    """A binary stream whose content appears at `path` when the block ends well, and nowhere when it does not.

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
        raise OutputError(
            f"cannot write {target}: {error.strerror or error}. Nothing was left behind; free some space or "
            "choose another folder."
        ) from error
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def check_writable(path: str | Path, *, follow_links: bool = False) -> None:
    """Checks, before any work is done for it, whether `atomic_write` could begin a file at `path`; errors as there."""
    target = _target(Path(path), follow_links)
    temporary, stream = _temporary(target)
    stream.close()
    temporary.unlink()


def _target(path: Path, follow_links: bool) -> Path:
    """The file to replace, which is a plain one or not there yet."""
    try:
        target = Path(os.path.realpath(path)) if follow_links and path.is_symlink() else path
        if follow_links and target.is_symlink():
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return target
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {path}: {reason}. Choose an existing, writable folder.") from error
    if stat.S_ISDIR(mode) or (stat.S_ISLNK(mode) and target.is_dir()):
        raise OutputError(f"cannot write {path}: it is a folder. Choose the name of a file.")
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OutputError(f"cannot write {path}: it is a device or a pipe. Choose the name of a file.")
    return target


def _take_over_permissions(stream: BinaryIO, target: Path) -> None:
    """Gives a new file the owner, group and permissions of the plain file that it will replace, if there is one.

    Where the group cannot be kept, the new group gets no right that others lack: it may hold other people.
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
                os.fchown(stream.fileno(), old.st_uid, old.st_gid)
            except OSError:
                with suppress(OSError):
                    os.fchown(stream.fileno(), -1, old.st_gid)
        if os.fstat(stream.fileno()).st_gid != old.st_gid:
            mode &= ~0o070 | (mode & 0o007) << 3
        os.fchmod(stream.fileno(), mode)


def _temporary(target: Path) -> tuple[Path, BinaryIO]:
    """A new file beside `target`. Unlike `mkstemp`'s it is as readable as the umask lets any new file be."""
    temporary = target.parent / f".{target.name[:40]}.{secrets.token_hex(8)}.part"
    try:
        return temporary, open(temporary, "xb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OutputError(f"cannot write {target}: {reason}. Choose an existing, writable folder.") from error
