"""The cache folder of the user, and blobs in it with an upper bound on their total size."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from moebius_runtime.errors import InputError, OutputError
from moebius_runtime.files import atomic_write, open_plain


def cache_folder() -> Path:
    """Returns `MOEBIUS_CACHE`, else `moebius-edge` in the user's cache folder. It may not exist yet.

    Raises:
        InputError: the user has no home folder.
    """
    if chosen := os.environ.get("MOEBIUS_CACHE"):
        return Path(chosen)
    try:
        if sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or "")
            if not base.is_absolute():  # the XDG specification ignores a relative path
                base = Path.home() / ".cache"
    except RuntimeError as error:
        raise InputError(f"no home folder to keep files in ({error}); set MOEBIUS_CACHE to a folder") from error
    return base / "moebius-edge"


class Store:
    """Blobs by name in one folder. When they exceed `limit` bytes together, the least recently used are deleted.

    The blobs are compiled code. Therefore a file that another user owns or may write is not read.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def read(self, name: str) -> bytes | None:
        """Returns a blob, or None if there is none or it may not be used."""
        path = self.folder / name
        try:
            if not _own(self.folder) or not _own(path) or path.stat().st_size > self.limit:
                return None
            with open_plain(path) as stream:
                data = stream.read(self.limit + 1)
            os.utime(path)
        except OSError:
            return None
        return data if len(data) <= self.limit else None

    def write(self, name: str, data: bytes) -> str | None:
        """Writes a blob whole or not at all. Returns the reason if it was not written, else None."""
        if len(data) > self.limit:
            return f"{len(data) >> 20} MiB are over the limit of {self.limit >> 20} MiB"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _own(self.folder):
                return f"{self.folder} belongs to, or can be written by, another user"
            with atomic_write(self.folder / name) as stream:
                stream.write(data)
            os.chmod(self.folder / name, 0o600)
        except (OSError, OutputError) as error:
            return str(error)
        self._trim(name)
        return None

    def _trim(self, newest: str) -> None:
        """Deletes the oldest blobs over the limit. Blobs that another process deletes meanwhile are ignored."""
        found = []
        with suppress(OSError):
            for path in self.folder.iterdir():
                with suppress(OSError):
                    if stat.S_ISREG((status := path.stat()).st_mode):
                        found.append((path.name != newest, -status.st_mtime, status.st_size, path))
        room = self.limit
        for old, _, size, path in sorted(found):  # the newest blob first, then by age
            room -= size
            if old and room < 0:
                with suppress(OSError):
                    path.unlink()


class CachedBlob:
    """One blob of a store, which is written only when it has changed."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._known: str | None = None  # SHA-256 of the blob on the disk

    def read(self) -> bytes | None:
        """See `Store.read`."""
        data = self._store.read(self._name)
        self._known = None if data is None else hashlib.sha256(data).hexdigest()
        return data

    def write(self, data: bytes) -> str | None:
        """See `Store.write`."""
        digest = hashlib.sha256(data).hexdigest()
        if digest == self._known:
            return None
        problem = self._store.write(self._name, data)
        self._known = digest if problem is None else None
        return problem


Kept = CachedBlob  # the name in version 0.1


def _own(path: Path) -> bool:
    """Whether only this user can have written the file. On Windows the system protects the user's folder."""
    if sys.platform == "win32":
        return True
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022  # noqa: TID251
