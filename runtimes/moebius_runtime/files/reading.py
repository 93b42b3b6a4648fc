"""Reading files: only plain ones, by hash, mapped into memory, and by a name that every library takes."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_CHUNK = 1 << 20


def open_plain(path: str | Path) -> BinaryIO:
    """Opens a plain file for reading. Pipes and devices are refused: they can block or never end.

    Raises:
        OSError: there is no such file, it cannot be read, or it is not plain; `strerror` holds the reason.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "a NUL character in its name")
    mode = os.stat(path).st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is not a plain file")
    return open(path, "rb")


def read_plain(path: str | Path, limit: int) -> bytes:
    """Returns the content of a plain file of at most `limit` bytes.

    Raises:
        OSError: as `open_plain`, or the file is larger; `strerror` gives the reason.
    """
    with open_plain(path) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        size = f"{limit >> 20} MiB" if limit >> 20 else f"{limit >> 10} KiB"
        raise OSError(errno.EFBIG, f"over {size}")
    return data


def sha256_file(path: str | Path) -> str:
    """Returns the hex SHA-256 of a plain file, read in pieces of 1 MiB; errors as `open_plain`."""
    digest = hashlib.sha256()
    with open_plain(path) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


class MappedFile:
    """A plain file mapped into memory, read-only. `view` is its content and is valid until `close`.

    Mapped pages belong to the system's file cache, which frees them when memory is short. The mapping stays valid when
    the file is replaced or removed, as by `atomic_write`. If the file is truncated while it is mapped, the process ends
    (SIGBUS), as with any mapped file.

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
        for start in range(0, len(self.view), _CHUNK):  # in pieces, so that Ctrl-C can interrupt it
            digest.update(self.view[start : start + _CHUNK])
        return digest.hexdigest()

    def close(self) -> None:
        """Ends the mapping. A buffer of it that is still in use keeps it alive until that buffer is freed."""
        with suppress(BufferError):
            self.view.release()
            self._map.close()


@contextmanager
def native_path(path: Path) -> Iterator[str]:
    """A UTF-8 name of `path`, for libraries that accept only UTF-8. It is valid inside the block.

    A path that is UTF-8 is returned unchanged. For any other, Linux can name the folder by its descriptor.

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
