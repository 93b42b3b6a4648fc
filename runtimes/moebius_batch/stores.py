"""Files of sources and destinations: local paths by the runtime's own functions, URLs by fsspec (extra `cloud`)."""

from __future__ import annotations

import glob
import os
import re
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moebius_batch.errors import StoreError
from moebius_batch.keys import CONTROL
from moebius_batch.store_errors import CLOUD, reason, refusals
from moebius_runtime.errors import InputError, OutputError, RuntimeUnavailableError
from moebius_runtime.files import atomic_write, open_plain, read_plain

MAX_PICTURE = 1 << 30
"""Bytes of one picture or table."""

# Stores where an object appears when it is complete, so that no temporary name is needed.
_WHOLE_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}
# What tells two versions of a file of the same size apart: keys of fsspec's info, best first.
_STAMPS = (
    *("ETag", "etag", "generation", "md5Hash", "VersionId", "checksum", "mtime"),
    *("LastModified", "last_modified", "updated", "modified", "modify", "created"),
)


@dataclass(frozen=True)
class Entry:
    """A file of a store.

    Attributes:
        name: below the listed folder, with `/`.
        size: in bytes, or -1 where the store does not give it.
        stamp: of its version: kind and value, such as `mtime 1700000000000000000` (nanoseconds) or `etag 0f3a`; or "".
    """

    name: str
    size: int
    stamp: str = ""

    def is_now(self, now: Entry | None, read: int) -> bool:
        """Whether a file of which `read` bytes were read, and that is `now` in its store, is still this one.

        Sizes and stamps that a store does not give are not compared, nor stamps of two kinds.
        """
        if now is None or self.size not in (-1, read):
            return False
        comparable = self.stamp.partition(" ")[0] == now.stamp.partition(" ")[0]
        return not comparable or now.stamp == self.stamp


class Store(ABC):
    """Reads and writes files by their full path or URL."""

    @abstractmethod
    def kind(self, url: str) -> Literal["file", "folder"] | None:
        """What there is at a path or URL."""

    @abstractmethod
    def listing(self, url: str) -> list[Entry]:
        """All files below a folder, sorted by name, without hidden ones and those of a job's own folder."""

    @abstractmethod
    def entry(self, url: str) -> Entry | None:
        """A file by its full path or URL, as a listing has it; None where there is no file."""

    @abstractmethod
    def read(self, url: str, entry: Entry | None = None, limit: int = MAX_PICTURE) -> bytes:
        """The bytes of a file.

        Raises:
            InputError: there is no such file, it may not be read, is over `limit`, differs from `entry`, or changed
                while it was read.
            StoreError: the store fails as a whole.
        """

    @abstractmethod
    def write(self, url: str, data: bytes) -> None:
        """Writes a file whole or not at all; raises `StoreError`."""

    @abstractmethod
    def put(self, url: str, local: Path) -> None:
        """Copies a local file there, whole or not at all; raises `StoreError`."""

    @abstractmethod
    def get(self, url: str, local: Path) -> None:
        """Copies a file to a local one; errors as `read`."""

    @abstractmethod
    def append(self, url: str, data: bytes) -> bool:
        """Appends to a file where the store can; returns whether it can."""

    @abstractmethod
    def remove(self, url: str) -> None:
        """Removes a file or folder with all in it; nothing happens where there is none."""

    def clear(self, url: str) -> None:
        """Removes temporary files that a killed process left of a file that it was writing."""
        return None


class LocalStore(Store):
    """Local paths. A folder that a link would lead out of the destination is the destination's check."""

    def kind(self, url: str) -> Literal["file", "folder"] | None:
        """See `Store.kind`."""
        try:
            mode = os.stat(url).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise InputError(f"cannot read {url}: {reason(error)}; name a readable file or folder") from error
        return "folder" if stat.S_ISDIR(mode) else "file"

    def listing(self, url: str) -> list[Entry]:
        """See `Store.listing`."""
        found = []

        def unreadable(error: OSError) -> None:
            raise StoreError(f"cannot list {error.filename}: {reason(error)}; make it readable") from error

        for folder, inner, names in os.walk(url, onerror=unreadable):
            linked = {name for name in inner if os.path.islink(os.path.join(folder, name))}
            inner[:] = [name for name in inner if name[0] != "." and name != CONTROL and name not in linked]
            for name in names:
                path = os.path.join(folder, name)
                if name[0] == ".":
                    continue
                try:
                    status = os.stat(path)
                except OSError:  # a broken link, or gone since
                    continue
                if stat.S_ISREG(status.st_mode):
                    relative = os.path.relpath(path, url).replace(os.sep, "/")
                    found.append(Entry(relative, status.st_size, mtime(status)))
        return sorted(found, key=lambda entry: entry.name)

    def entry(self, url: str) -> Entry | None:
        """See `Store.entry`."""
        try:
            status = os.stat(url)
        except (OSError, ValueError):
            return None
        return Entry("", status.st_size, mtime(status)) if stat.S_ISREG(status.st_mode) else None

    def read(self, url: str, entry: Entry | None = None, limit: int = MAX_PICTURE) -> bytes:
        """See `Store.read`."""
        before = entry or self.entry(url)
        try:
            data = read_plain(url, limit)
        except OSError as error:
            raise InputError(f"cannot read {url}: {reason(error)}") from error
        if before is not None and not before.is_now(self.entry(url), len(data)):
            raise changed(url, entry)
        return data

    def write(self, url: str, data: bytes) -> None:
        """See `Store.write`."""
        with self._writing(url), atomic_write(url) as stream:
            stream.write(data)

    def put(self, url: str, local: Path) -> None:
        """See `Store.put`."""
        with self._writing(url), atomic_write(url) as stream, open_plain(local) as source:
            while chunk := source.read(1 << 20):
                stream.write(chunk)

    def get(self, url: str, local: Path) -> None:
        """See `Store.get`."""
        try:
            with open_plain(url) as source, open(local, "wb") as stream:
                while chunk := source.read(1 << 20):
                    stream.write(chunk)
        except OSError as error:
            raise InputError(f"cannot read {url}: {reason(error)}") from error

    def append(self, url: str, data: bytes) -> bool:
        """See `Store.append`."""
        with self._writing(url), open(url, "ab") as stream:
            stream.write(data)
        return True

    def remove(self, url: str) -> None:
        """See `Store.remove`."""
        try:
            if os.path.isdir(url) and not os.path.islink(url):
                shutil.rmtree(url)
            else:
                os.unlink(url)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise StoreError(f"cannot remove {url}: {reason(error)}") from error

    def clear(self, url: str) -> None:
        """See `Store.clear`; the names are those of `atomic_write`."""
        folder, name = os.path.split(url)
        for path in Path(folder).glob(f".{glob.escape(name[:40])}.*.part"):
            path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self, url: str) -> Iterator[None]:
        try:
            os.makedirs(os.path.dirname(url) or ".", exist_ok=True)
            yield
        except OutputError as error:
            raise StoreError(str(error)) from error
        except (OSError, ValueError) as error:
            raise StoreError(f"cannot write {url}: {reason(error)}; choose another --out or free some space") from error


class RemoteStore(Store):
    """URLs of one protocol through fsspec. Settings come from fsspec's configuration and each library's environment."""

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        try:
            import fsspec
        except ImportError as error:
            raise RuntimeUnavailableError(f"{protocol}:// needs fsspec. Install it: {CLOUD}") from error
        with refusals(f"{protocol}://", StoreError):
            try:
                self._fs: Any = fsspec.filesystem(protocol)
            except ValueError as error:
                raise InputError(
                    f"{protocol}:// is no protocol of fsspec; expected a path, or a URL such as s3://BUCKET/FOLDER"
                ) from error

    def kind(self, url: str) -> Literal["file", "folder"] | None:
        """See `Store.kind`."""
        with refusals(url, StoreError):
            self._fs.invalidate_cache()
            try:
                return "folder" if self._fs.info(url)["type"] == "directory" else "file"
            except FileNotFoundError:
                return None

    def listing(self, url: str) -> list[Entry]:
        """See `Store.listing`."""
        with refusals(url, StoreError):
            self._fs.invalidate_cache()
            root = self._fs._strip_protocol(url).rstrip("/") + "/"
            found = []
            for path, info in self._fs.find(url, detail=True).items():
                name = path.removeprefix(root)
                parts = name.split("/")
                if info["type"] == "file" and not any(part[:1] in ("", ".") or part == CONTROL for part in parts):
                    found.append(_entry(name, info))
        return sorted(found, key=lambda entry: entry.name)

    def entry(self, url: str) -> Entry | None:
        """See `Store.entry`."""
        with refusals(url, StoreError):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(url)
            except FileNotFoundError:
                return None
        return None if info["type"] == "directory" else _entry("", info)

    def read(self, url: str, entry: Entry | None = None, limit: int = MAX_PICTURE) -> bytes:
        """See `Store.read`. A failing web server is an `InputError`: a table's other pictures come from others."""
        web = self._protocol in ("http", "https")
        with refusals(url, InputError, InputError if web else StoreError):
            before = entry or (None if web else self.entry(url))  # a web server's answer is whole, and its size unknown
            size = before.size if before else 0
            data = b"" if size > limit else bytes(self._fs.cat_file(url))
            if max(size, len(data)) > limit:
                raise InputError(f"cannot read {url}: it is over {limit >> 20} MiB")
            if before is not None and not before.is_now(before if web else self.entry(url), len(data)):
                raise changed(url, entry)
        return data

    def write(self, url: str, data: bytes) -> None:
        """See `Store.write`."""
        self._placed(url, lambda place: self._fs.pipe_file(place, data))

    def put(self, url: str, local: Path) -> None:
        """See `Store.put`."""
        self._placed(url, lambda place: self._fs.put_file(str(local), place))

    def get(self, url: str, local: Path) -> None:
        """See `Store.get`."""
        with refusals(url, InputError):
            self._fs.get_file(url, str(local))

    def append(self, url: str, data: bytes) -> bool:
        """See `Store.append`."""
        return False

    def remove(self, url: str) -> None:
        """See `Store.remove`."""
        with refusals(url, StoreError):
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self._fs.rm(url, recursive=True)

    def _placed(self, url: str, write: Callable[[str], object]) -> None:
        with refusals(url, StoreError):
            if self._protocol in _WHOLE_OBJECTS:
                write(url)
                return
            folder, _, name = url.rpartition("/")
            temporary = f"{folder}/.{name[:40]}.{os.getpid()}.part"
            self._fs.makedirs(folder, exist_ok=True)
            try:
                write(temporary)
                self._fs.mv(temporary, url)
            except BaseException:
                self.remove(temporary)
                raise


def is_remote(url: str) -> bool:
    """Whether the text is a URL, as against a local path."""
    return re.match(r"[a-z][a-z0-9+.-]+://", url) is not None


def store_of(url: str) -> Store:
    """The store of a path or URL; raises `InputError` or `RuntimeUnavailableError` where there is none for it."""
    return _store(url.partition("://")[0] if is_remote(url) else "")


@cache
def _store(protocol: str) -> Store:
    return RemoteStore(protocol) if protocol else LocalStore()


def joined(url: str, name: str) -> str:
    """The path or URL of `name`, with `/`, below a folder."""
    return f"{url.rstrip('/')}/{name}" if is_remote(url) else os.path.join(url, *name.split("/"))


def normal(url: str) -> str:
    """A URL without a `/` at its end, or an absolute local path; `file://` becomes a path."""
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    if "::" in url and is_remote(url.replace("::", "://", 1)):
        raise InputError(f"{url}: chained URLs of fsspec are not read; give one path or URL")
    return url.rstrip("/") if is_remote(url) else os.path.abspath(url)


def changed(url: str, listed: object = None) -> InputError:
    """The error for a file that is not what it was: since the job listed it, or while it was read."""
    when = "since the job listed it" if listed else "while it was read"
    return InputError(f"{url} has changed {when}; leave the source alone while a job runs")


def mtime(status: os.stat_result) -> str:
    """The stamp of a local file."""
    return f"mtime {status.st_mtime_ns}"


def _entry(name: str, info: dict[str, Any]) -> Entry:
    """A file by fsspec's info. A listing and a single answer of one store can write its version in two ways."""
    kind = next((kind for kind in _STAMPS if info.get(kind) not in (None, "")), None)
    value = None if kind is None else info[kind]
    if isinstance(value, datetime | int | float):  # a time as an object or in seconds
        value = f"{value.timestamp() if isinstance(value, datetime) else value:.6f}"
    stamp = "" if kind is None else f"{kind.lower()} {value}".replace('"', "")
    size = info.get("size")  # which not every web server gives
    return Entry(name, -1 if size is None else int(size), stamp)
