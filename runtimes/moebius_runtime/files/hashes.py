"""Hashes of files that are computed once per change, also across processes.

Hashing the weights of a full-size bundle takes 1 to 4 s at every start. Therefore the hash of a large file is recorded
in the user's cache folder with the file's device, inode, size, time of modification and time of change. It is hashed
again when any of them differs.

Limits: whoever restores size and time of modification still changes the time of change, which only the system sets
(on Windows there is none, so such an exchange is not noticed there). Not noticed anywhere: bits that a disk flips in
place, and whoever may write the user's own cache folder. `rehash` computes every hash again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from moebius_runtime.errors import InputError
from moebius_runtime.files.cache import Store, cache_folder
from moebius_runtime.files.reading import sha256_file

_Stamp = list[int]

_LARGE = 1 << 20  # bytes: a smaller file is hashed sooner than its record is read
_SETTLED = 2_000_000_000  # ns: after a later change, another one can fall on the same tick of the file system's clock
_LIMIT = 1 << 20  # bytes of all records, about 300 B each


class FileHashes:
    """SHA-256 of files, computed again only if a file has changed since.

    Args:
        rehash: ignore what earlier processes recorded.
    """

    def __init__(self, *, rehash: bool = False) -> None:
        self._rehash = rehash
        self._known: dict[str, tuple[_Stamp, str]] = {}

    def sha256(self, path: Path) -> str:
        """Hex SHA-256 of a plain file; errors as `sha256_file`."""
        stamp = _stamp(path)  # taken before hashing: a change meanwhile is hashed again
        key = str(path)
        if key not in self._known and not self._rehash and stamp[2] >= _LARGE:
            found = _recorded(path)
            if found is not None:
                self._known[key] = found
        if key in self._known and self._known[key][0] == stamp:
            return self._known[key][1]
        digest = sha256_file(path)
        self._known[key] = (stamp, digest)
        if stamp[2] >= _LARGE and max(stamp[3:]) < time.time_ns() - _SETTLED:
            _record(path, stamp, digest)
        return digest


Hasher = Callable[[Path], str]
"""Returns the hex SHA-256 of a file."""


def _stamp(path: Path) -> _Stamp:
    """Device, inode, size, and times of modification and change, which differ after a file is written or replaced."""
    status = os.stat(path)
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _store() -> Store | None:
    try:
        return Store(cache_folder() / "hashes", _LIMIT)
    except InputError:  # no home folder: nothing is recorded
        return None


def _name(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()


def _recorded(path: Path) -> tuple[_Stamp, str] | None:
    """The record of a file, if this user wrote one. `Store` reads no file that another user could have written."""
    store = _store()
    data = None if store is None else store.read(_name(path))
    try:
        stamp, digest = json.loads(data or b"null")
    except (ValueError, TypeError, RecursionError):
        return None
    return (stamp, digest) if isinstance(stamp, list) and isinstance(digest, str) else None


def _record(path: Path, stamp: _Stamp, digest: str) -> None:
    """Records a hash. Where that fails, the next process hashes the file again."""
    if (store := _store()) is not None:
        store.write(_name(path), json.dumps([stamp, digest]).encode())
