"""What is kept for the next start in the user's cache folder: whole files, owned by the user, within a size."""

from __future__ import annotations

import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from moebius_runtime.errors import InputError, OutputError
from moebius_runtime.files import atomic_write, open_plain


def cache_folder() -> Path:
    """`MOEBIUS_CACHE`, else `moebius-edge` in the user's cache folder. It need not exist.

    Raises:
        InputError: the user has no home folder.
    """
    if chosen := os.environ.get("MOEBIUS_CACHE"):
        return Path(chosen)
    try:
        if os.name == "nt":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or "")
            if not base.is_absolute():  # the standard says to ignore a relative one
                base = Path.home() / ".cache"
    except RuntimeError as error:
        raise InputError(f"no home folder to keep files in ({error}); set MOEBIUS_CACHE to a folder") from error
    return base / "moebius-edge"


class Store:
    """Blobs by name in one folder; the least recently used go when all together pass `limit` bytes.

    What compiled programs keep is code: a file of another user, or one that others may write, is not read.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit

    def read(self, name: str) -> bytes | None:
        """A blob, or None where there is none that may be used."""
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
        """Keeps a blob, whole or not at all. Returns why it was not kept, or None."""
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
        """Deletes the oldest blobs over the limit. What another process deletes meanwhile is passed over."""
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


class Kept:
    """One blob of a store, written only when it has changed."""

    def __init__(self, store: Store, name: str) -> None:
        self._store = store
        self._name = name
        self._known: str | None = None  # SHA-256 of what is on the disk

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


def _own(path: Path) -> bool:
    """Whether nobody but this user could have written it. Windows guards the user's folder by itself."""
    if os.name == "nt":
        return True
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & 0o022
