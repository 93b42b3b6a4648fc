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
from functools import cache
from pathlib import Path
from typing import Any, Literal

from moebius_batch.errors import StoreError
from moebius_batch.keys import CONTROL
from moebius_runtime.errors import InputError, MoebiusError, OutputError, RuntimeUnavailableError, one_line
from moebius_runtime.files import atomic_write, open_plain, read_plain

MAX_PICTURE = 1 << 30
"""Bytes of one picture or table."""

# Stores where an object appears when it is complete, so that no temporary name is needed.
_WHOLE_OBJECTS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss", "memory"}
_CREDENTIALS = ("NoCredentials", "PartialCredentials", "CredentialRetrieval", "DefaultCredentials", "TokenRetrieval")
_UNREACHABLE = ("EndpointConnection", "ConnectTimeout", "ConnectionError", "ConnectionRefused", "ClientConnector")
_CLOUD = "pip install 'moebius-edge[cloud]'"


@dataclass(frozen=True)
class Entry:
    """A file of a store: name below the listed folder with `/`, size in bytes, and a stamp of its version, or ""."""

    name: str
    size: int
    stamp: str = ""


class Store(ABC):
    """Reads and writes files by their full path or URL."""

    @abstractmethod
    def kind(self, url: str) -> Literal["file", "folder"] | None:
        """What there is at a path or URL."""

    @abstractmethod
    def listing(self, url: str) -> list[Entry]:
        """All files below a folder, sorted by name, without hidden ones and those of a job's own folder."""

    @abstractmethod
    def read(self, url: str, entry: Entry | None = None, limit: int = MAX_PICTURE) -> bytes:
        """The bytes of a file.

        Raises:
            InputError: there is no such file, it may not be read, is over `limit`, or differs from `entry`.
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
            raise InputError(f"cannot read {url}: {_reason(error)}; name a readable file or folder") from error
        return "folder" if stat.S_ISDIR(mode) else "file"

    def listing(self, url: str) -> list[Entry]:
        """See `Store.listing`."""
        found = []

        def unreadable(error: OSError) -> None:
            raise StoreError(f"cannot list {error.filename}: {_reason(error)}; make it readable") from error

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
                    found.append(Entry(relative, status.st_size, str(status.st_mtime_ns)))
        return sorted(found, key=lambda entry: entry.name)

    def read(self, url: str, entry: Entry | None = None, limit: int = MAX_PICTURE) -> bytes:
        """See `Store.read`."""
        try:
            data = read_plain(url, limit)
            stamp = str(os.stat(url).st_mtime_ns)
        except OSError as error:
            raise InputError(f"cannot read {url}: {_reason(error)}") from error
        if entry is not None and (len(data) != entry.size or entry.stamp not in ("", stamp)):
            raise _changed(url)
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
            raise InputError(f"cannot read {url}: {_reason(error)}") from error

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
            raise StoreError(f"cannot remove {url}: {_reason(error)}") from error

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
            raise StoreError(
                f"cannot write {url}: {_reason(error)}; choose another --out or free some space"
            ) from error


class RemoteStore(Store):
    """URLs of one protocol through fsspec. Settings come from fsspec's configuration and each library's environment."""

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        try:
            import fsspec
        except ImportError as error:
            raise RuntimeUnavailableError(f"{protocol}:// needs fsspec. Install it: {_CLOUD}") from error
        with _refusals(f"{protocol}://", StoreError):
            try:
                self._fs: Any = fsspec.filesystem(protocol)
            except ValueError as error:
                raise InputError(
                    f"{protocol}:// is no protocol of fsspec; expected a path, or a URL such as s3://BUCKET/FOLDER"
                ) from error

    def kind(self, url: str) -> Literal["file", "folder"] | None:
        """See `Store.kind`."""
        with _refusals(url, StoreError):
            self._fs.invalidate_cache()
            try:
                return "folder" if self._fs.info(url)["type"] == "directory" else "file"
            except FileNotFoundError:
                return None

    def listing(self, url: str) -> list[Entry]:
        """See `Store.listing`."""
        with _refusals(url, StoreError):
            self._fs.invalidate_cache()
            root = self._fs._strip_protocol(url).rstrip("/") + "/"
            found = []
            for path, info in self._fs.find(url, detail=True).items():
                name = path.removeprefix(root)
                parts = name.split("/")
                if info["type"] == "file" and not any(part[:1] in ("", ".") or part == CONTROL for part in parts):
                    found.append(Entry(name, int(info["size"] or 0), str(info.get("ETag") or "")))
        return sorted(found, key=lambda entry: entry.name)

    def read(self, url: str, entry: Entry | None = None, limit: int = MAX_PICTURE) -> bytes:
        """See `Store.read`. A failing web server is an `InputError`: a table's other pictures come from others."""
        with _refusals(url, InputError, InputError if self._protocol in ("http", "https") else StoreError):
            web = self._protocol in ("http", "https")  # where not every server gives a size
            size = entry.size if entry else 0 if web else self._fs.info(url).get("size") or 0
            data = b"" if size > limit else bytes(self._fs.cat_file(url))
            if max(size, len(data)) > limit:
                raise InputError(f"cannot read {url}: it is over {limit >> 20} MiB")
        if entry is not None and len(data) != entry.size:
            raise _changed(url)
        return data

    def write(self, url: str, data: bytes) -> None:
        """See `Store.write`."""
        self._placed(url, lambda place: self._fs.pipe_file(place, data))

    def put(self, url: str, local: Path) -> None:
        """See `Store.put`."""
        self._placed(url, lambda place: self._fs.put_file(str(local), place))

    def get(self, url: str, local: Path) -> None:
        """See `Store.get`."""
        with _refusals(url, InputError):
            self._fs.get_file(url, str(local))

    def append(self, url: str, data: bytes) -> bool:
        """See `Store.append`."""
        return False

    def remove(self, url: str) -> None:
        """See `Store.remove`."""
        with _refusals(url, StoreError):
            self._fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self._fs.rm(url, recursive=True)

    def _placed(self, url: str, write: Callable[[str], object]) -> None:
        with _refusals(url, StoreError):
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


def _changed(url: str) -> InputError:
    return InputError(f"{url} has changed since the job listed it; leave the source alone while a job runs")


def _reason(error: BaseException) -> str:
    return one_line(str(getattr(error, "strerror", None) or error or type(error).__name__))[:300]


def _chain(error: BaseException | None) -> list[str]:
    """Names of the classes of an error and of those that it came from."""
    found: list[str] = []
    while error is not None and len(found) < 10:
        found.append(type(error).__name__)
        error = error.__cause__ or error.__context__
    return found


@contextmanager
def _refusals(url: str, missing: type[MoebiusError], failing: type[MoebiusError] = StoreError) -> Iterator[None]:
    """Turns whatever a store's library raises into one sentence.

    Args:
        url: for the message.
        missing: the error for a file that is not there or locked.
        failing: the error for all else.
    """
    try:
        yield
    except MoebiusError:
        raise
    except ImportError as error:
        raise RuntimeUnavailableError(f"{url}: {_reason(error)}. Install it: {_CLOUD}") from error
    except Exception as error:  # each library has its own classes
        names = " ".join(_chain(error))
        if isinstance(error, FileNotFoundError) and not any(name in names for name in _UNREACHABLE):
            raise missing(f"there is no {url}; check its name") from error
        if isinstance(error, PermissionError):
            raise missing(f"{url}: access denied ({_reason(error)}); check the credentials and their rights") from error
        if any(name in names for name in _CREDENTIALS):
            raise failing(
                f"{url}: no credentials were found ({_reason(error)}); set them as the store's own tools expect, such "
                "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
            ) from error
        if any(name in names for name in _UNREACHABLE):
            raise failing(f"{url} cannot be reached ({_reason(error)}); check the network and the endpoint") from error
        raise failing(f"{url}: the store fails ({type(error).__name__}: {_reason(error)})") from error
