"""Explains failed requests to a hub, and bounds and reports the retries of huggingface_hub."""

from __future__ import annotations

import errno
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol
from urllib.parse import urlsplit

from moebius_runtime.errors import InputError

Progress = Callable[[str], None]

OFFLINE = "offline mode (HF_HUB_OFFLINE) is on"
_TRANSIENT = (408, 425, 429)  # and 500 to 599: another answer is likely later
_RETRIES = 3  # of a request that fails before a file's first byte: 1 + 2 + 4 seconds
_LONGEST_TRY = 60.0  # seconds after which a request that fails again is not tried once more; its timeout may be 60
_RESUMPTIONS = 20  # of one file's download; the library alone resumes for ever as long as some bytes come
_LONGEST_WAIT = 60.0  # seconds that a hub may ask to wait before the next try
_WAIT = re.compile(r"(?:Waiting|Retrying in) (\d+(?:\.\d+)?)s")
_RETRY = re.compile(r"\[Retry \d+/\d+\]|[Tt]rying to resume")
_STATUS = re.compile(r"HTTP Error (\d{3})")


class Repository(Protocol):
    """A repository of a hub, as OWNER/REPO, and the requested revision; None means `main`."""

    @property
    def repo(self) -> str:
        """OWNER/REPO."""

    @property
    def revision(self) -> str | None:
        """A branch, a tag or a commit."""


@dataclass(frozen=True)
class Trouble:
    """Why a request failed and what to do. `passing`: the cache may be used instead."""

    what: str
    advice: str
    passing: bool

    def __str__(self) -> str:
        return f"{self.what}; {self.advice}"


class GaveUp(Exception):  # noqa: N818 (not an error of its own: it carries one)
    """Ends a request that the library would keep retrying."""

    def __init__(self, what: str, status: int = 0) -> None:
        super().__init__(what)
        self.status = status


def check_endpoint(address: str) -> str:
    """Checks that the hub's address is valid, and returns it.

    Raises:
        InputError: it has no `http://` or `https://`, or no host.
    """
    try:
        parts = urlsplit(address)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a broken IPv6 address
        good = False
    if not good or any(char.isspace() for char in address):
        bare = address.partition("://")[2] or address
        guess = f"https://{bare}" if re.fullmatch(r"[\w.-]+(:\d+)?(/[\w./-]*)?", bare) else "https://hf-mirror.com"
        raise InputError(
            f"HF_ENDPOINT is {address!r}; expected an address with https:// or http://, such as {guess}. "
            "Unset it for https://huggingface.co"
        )
    return address


def explain(
    error: BaseException, source: Repository, address: str, cache: str, access: Literal["read", "write"] = "read"
) -> Trouble:
    """Translates an exception of huggingface_hub into a reason and advice.

    Args:
        error: the exception.
        source: the repository that was asked for.
        address: the hub's.
        cache: folder of huggingface_hub's cache.
        access: what the request needed the right to do.
    """
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # that file is not in the cache either; this is why it was not fetched
    local = "or name a local copy"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return Trouble(OFFLINE, f"run once with network access, {local}", True)
    if isinstance(error, errors.GatedRepoError):
        what = f"access to {source.repo} must be granted first"
        return Trouble(what, f"accept the terms on {address}/{source.repo}, then run `hf auth login`", False)
    if isinstance(error, errors.RepositoryNotFoundError):
        what = f"{address} has no repository {source.repo}, or it is private"
        return Trouble(what, f"check its name, run `hf auth login` if it is private, {local}", False)
    if isinstance(error, errors.RevisionNotFoundError):
        what = f"{address} has no revision {source.revision or 'main'} there"
        return Trouble(what, "leave @REVISION out for the newest, or name a commit of the repository", False)
    if isinstance(error, errors.HFValidationError):
        return Trouble(f"{source.repo} is no name of a repository ({first_line(error)})", "check it", False)
    status = error.status if isinstance(error, GaveUp) else _status(error)
    if status:
        return _of_status(status, error, source, address, access)
    if isinstance(error, GaveUp):
        return Trouble(f"{address} {error}", f"try again later, set HF_ENDPOINT to a mirror, {local}", True)
    if isinstance(error, errors.FileMetadataError | ValueError | TypeError | KeyError | AttributeError):
        what = f"{address} did not answer as a hub does ({type(error).__name__}; an HTML page or nothing, perhaps)"
        advice = "check HF_ENDPOINT, the proxy (HTTPS_PROXY), and whether this network asks to log in on a web page"
        return Trouble(what, f"{advice}, {local}", True)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"download failed: {error.strerror} in {cache}"
        return Trouble(what, "free some space there, or set HF_HOME to a folder that has it", False)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        what = f"download failed: {error.filename}: {error.strerror}"
        return Trouble(what, f"make the cache {cache} writable, or set HF_HOME to a folder that is", False)
    if isinstance(error, OSError) and "onsistency check" in str(error):
        what = f"download failed: {address} sent another number of bytes than it announced"
        return Trouble(what, f"try again, set HF_ENDPOINT to a mirror, {local}", True)
    what = f"{address} cannot be reached ({type(error).__name__}: {first_line(error)})"
    advice = f"check the network and its proxy (HTTPS_PROXY), set HF_ENDPOINT to a mirror, {local}"
    return Trouble(what, advice, True)


def _of_status(status: int, error: BaseException, source: Repository, address: str, access: str) -> Trouble:
    answered, other = f"{address} answered with HTTP status {status}", "set HF_ENDPOINT to a mirror"
    if status == 429:
        wait = _retry_after(error)
        what = f"{answered} (too many requests)"
        logged_in = "run `hf auth login` for a higher limit"
        return Trouble(what, f"try again in {wait}, {logged_in}, {other}, or name a local copy", True)
    if status in _TRANSIENT or status >= 500:
        what = f"{answered} (a fault of the hub, not of this machine)"
        return Trouble(what, f"try again in some minutes, {other}, or name a local copy", True)
    if status == 401:
        what = f"{answered}: it does not accept the access token"
        return Trouble(what, "run `hf auth login` again, or unset HF_TOKEN and run `hf auth logout`", False)
    if status == 403:
        what = f"{answered}: access to {source.repo} is refused"
        return Trouble(what, f"use a token that may {access} it (`hf auth login`), or check the proxy", False)
    if status in (404, 410):
        what = f"{answered}: there is no {source.repo}, or not this file or revision of it"
        hint = "check the name" if address == "https://huggingface.co" else "check the name, or unset HF_ENDPOINT"
        return Trouble(what, f"{hint}, or name a local copy", False)
    return Trouble(answered, "check HF_ENDPOINT and the proxy (HTTPS_PROXY), or name a local copy", False)


def is_missing(error: BaseException) -> bool:
    """Whether the hub reports that the file does not exist; a plain mirror does so by status only."""
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError):
        return error.__cause__ is not None and is_missing(error.__cause__)
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return False
    return isinstance(error, errors.EntryNotFoundError) or _status(error) in (404, 410)


def first_line(error: BaseException) -> str:
    """The first line of an exception's text that is not blank, at most 300 characters."""
    return next((line for line in str(error).splitlines() if line.strip()), "no reason given")[:300]


@contextmanager
def quiet_retries(progress: Progress | None) -> Iterator[None]:
    """Reports each retry of huggingface_hub in this thread as one line of `progress`, and bounds the retries.

    Raises:
        GaveUp: inside the block, after too many retries, or if the hub asks for a long wait.
    """
    import huggingface_hub.utils.logging  # noqa: F401 (adds the library's handler, which is to be quiet)

    logger, own = logging.getLogger("huggingface_hub"), threading.get_ident()

    def others(record: logging.LogRecord) -> bool:
        return record.thread != own or record.levelno < logging.WARNING  # the user asked for what is below

    handlers = list(logger.handlers)
    counter = _Retries(own, progress or (lambda _: None))
    for handler in handlers:
        handler.addFilter(others)
    logger.addHandler(counter)
    try:
        yield
    finally:
        logger.removeHandler(counter)
        for handler in handlers:
            handler.removeFilter(others)


class _Retries(logging.Handler):
    """Counts the retries that one thread's requests log, and reports each as one line.

    The library offers no other way to bound its retries. `logging` lets what a handler raises through to the caller,
    which here is the library's retry loop.
    """

    def __init__(self, thread: int, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._thread, self._progress = thread, progress
        self._cause, self._status = "", 0
        self._retries = self._resumptions = 0
        self._started = time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread != self._thread:
            return
        text = record.getMessage()
        if "thrown while requesting" in text:  # the reason, logged on a line of its own before the retry
            self._cause = text.partition(" thrown while requesting")[0].strip("'\" ")[:200]
            found = _STATUS.search(text)
            self._status = int(found[1]) if found else 0
            return
        if not _RETRY.search(text):
            if "Max retries exceeded" not in text:  # which the library raises as well
                self._progress(text.splitlines()[0] if text else "")
            return
        wait = float(found[1]) if (found := _WAIT.search(text)) else 1.0
        resumed = "resume" in text
        self._retries += not resumed
        self._resumptions += resumed
        cause = f"the download stopped ({text.splitlines()[0].rpartition(': ')[2]})" if resumed else self._cause
        if wait > _LONGEST_WAIT:
            raise GaveUp(f"asks to wait {wait:.0f} s before the next request", self._status)
        late = not resumed and time.monotonic() - self._started > _LONGEST_TRY
        if late or self._retries > _RETRIES or self._resumptions > _RESUMPTIONS:
            tries = f"{self._retries or self._resumptions} tries"
            raise GaveUp(f"cannot be reached or fails ({cause}, {tries})", self._status)
        self._progress(f"{cause or 'a request failed'}; trying again in {wait:.0f} s")


def _status(error: BaseException) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", None) or 0)


def _retry_after(error: BaseException) -> str:
    """How long the hub asks to wait, from its `Retry-After` header or the retry that was given up."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    seconds = str(headers.get("Retry-After", ""))
    if found := re.search(r"wait (\d+) s", str(error)):
        seconds = found[1]
    return f"{seconds} seconds" if re.fullmatch(r"\d{1,6}", seconds) else "some minutes"
