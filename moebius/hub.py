"""Weights from a Hugging Face repository, or from a mirror of it, through huggingface_hub and its cache.

The mirror (`HF_ENDPOINT`) and offline mode (`HF_HUB_OFFLINE`) are read when a file is asked for, so a program
may set them after it has imported huggingface_hub. Timeouts are the library's (`HF_HUB_ETAG_TIMEOUT`,
`HF_HUB_DOWNLOAD_TIMEOUT`: seconds without a byte, 10 by default), its retries are bounded by `moebius.hub_answers`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moebius.errors import CheckpointError
from moebius.hub_answers import OFFLINE, Trouble, check_endpoint, explain, first_line, is_missing, quiet_retries
from moebius.hub_cache import CachedWeights, blob_of, find, published_hash
from moebius.sources import HubSource, LocatedFile, Progress, choose_weights

if TYPE_CHECKING:
    from types import ModuleType

_LISTED = 3
_OFFLINE = Trouble(OFFLINE, "run once with network access, or name a local copy", True)


@dataclass(frozen=True)
class _Listing:
    """A revision's commit, and its files with their published SHA-256."""

    commit: str | None
    files: dict[str, str | None]


def fetch_weights(source: HubSource, progress: Progress | None = None) -> LocatedFile:
    """The weights file of a repository's folder, downloaded unless the cache has it.

    When the hub cannot be reached or fails, what the cache holds of the same revision serves. Where no revision was
    asked for and the cache's newest one is not complete, its only complete one serves. `origin` says both.

    Raises:
        CheckpointError: repository, revision or folder unknown, access refused, no network and not in the
            cache, download cut short, or no room for it.
    """
    if offline():
        return _from_cache(source, _OFFLINE, progress)
    hub, address = _library(), endpoint()
    try:
        with quiet_retries(progress):
            listing = _listing(hub, source, address)
            path = _chosen(listing, source)
            if progress:
                progress(f"fetching {_name(path)} of {source.repo}")
            file = _download(hub, source, path)
    except CheckpointError:
        raise
    except Exception as error:  # each version of huggingface_hub brings another HTTP library with errors of its own
        return _from_cache(source, _refusal(source, error), progress, error)
    commit = _commit_of(file, source)
    if listing.commit in (commit, None):
        return LocatedFile(file, _origin(source, file, commit), listing.files[path] or published_hash(file))
    return _from_cache(source, _not_delivered(address, path, listing), progress)


def fetch_again(source: HubSource, damaged: Path, progress: Progress | None = None) -> Path:
    """Downloads a file of the cache again, over the one there, whose content is not what the hub published.

    Raises:
        CheckpointError: no network, or as `fetch_weights`. The message names the file that holds the content.
    """
    blob = blob_of(damaged)
    start = f"{blob} is damaged (its content is not what the hub published, {_text(source)})"
    if offline():
        raise CheckpointError(
            f"{start}, and {OFFLINE}; run once with network access, which downloads it again, or delete it"
        )
    hub, commit = _library(), _commit_of(damaged, source)
    if progress:
        progress(f"{blob} is damaged; downloading it again")
    try:
        if not damaged.is_symlink():  # a cache without links: the library leaves a file that is there
            damaged.unlink(missing_ok=True)
        with quiet_retries(progress):
            return _download(hub, source, _join(source.folder, damaged.name), revision=commit, again=True)
    except Exception as error:  # see fetch_weights; the library hides the reason of a failed forced download
        while isinstance(error, ValueError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        trouble = _trouble(source, error)
        raise CheckpointError(f"{start}, and cannot be downloaded again: {trouble}") from error


def fetch_file(source: HubSource, name: str, progress: Progress | None = None) -> Path | None:
    """One small file beside the weights, such as a `config.json`; None where there is none.

    Without a network, or where the hub fails, that is what lies beside the weights in the cache: such a file is
    optional, and none is asked for where the weights are there.

    Raises:
        CheckpointError: as `fetch_weights`, also where the cache has no weights that the file could lie beside.
    """
    if offline():
        return _file_from_cache(source, name, _OFFLINE)
    hub, address, path = _library(), endpoint(), _join(source.folder, name)
    try:
        with quiet_retries(progress):
            listing = _listing(hub, source, address)
            if path not in listing.files:
                return None
            file = _download(hub, source, path)
    except Exception as error:  # see fetch_weights
        if is_missing(error):
            return None
        return _file_from_cache(source, name, _refusal(source, error), error)
    if listing.commit in (_commit_of(file, source), None):
        return file
    return _file_from_cache(source, name, _not_delivered(address, path, listing))


def offline() -> bool:
    """Whether the environment forbids network access, as huggingface_hub reads it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """The hub's address, or that of the mirror in `HF_ENDPOINT`.

    Raises:
        CheckpointError: `HF_ENDPOINT` is no address.
    """
    return check_endpoint((os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"))


def _library() -> ModuleType:
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            "weights from a hub need the package huggingface_hub; install moebius-edge[export], or name a local file"
        ) from error
    except ValueError as error:  # it reads its environment here
        raise CheckpointError(
            f"huggingface_hub cannot use its settings ({first_line(error)}); check the variables HF_*, of which "
            "timeouts are whole seconds, and HF_ENDPOINT"
        ) from error
    return huggingface_hub


def _listing(hub: ModuleType, source: HubSource, address: str) -> _Listing:
    from huggingface_hub import constants

    info = hub.HfApi(endpoint=address).model_info(
        source.repo,
        revision=source.revision or "main",
        timeout=float(constants.HF_HUB_ETAG_TIMEOUT),
        files_metadata=True,
    )
    files = {one.rfilename: one.lfs.sha256 if one.lfs else None for one in info.siblings or []}
    return _Listing(info.sha, files)


def _chosen(listing: _Listing, source: HubSource) -> str:
    """The path of the weights file in the repository."""
    inside = [_name(path) for path in listing.files if _parent(path) == source.folder]
    if not inside:
        raise CheckpointError(f"{_text(source)}: the repository has no folder {source.folder or '/'!r}")
    if source.file and source.file not in inside:
        raise CheckpointError(f"{_text(source)}: the repository has no such file")
    return _join(source.folder, source.file or choose_weights(inside, _text(source)))


def _download(
    hub: ModuleType, source: HubSource, path: str, *, revision: str | None = None, again: bool = False
) -> Path:
    from huggingface_hub import constants

    file = hub.hf_hub_download(
        source.repo,
        path,
        revision=revision or source.revision,
        endpoint=endpoint(),
        etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
        force_download=again,
    )
    return Path(file)


def _trouble(source: HubSource, error: Exception) -> Trouble:
    from huggingface_hub import constants

    return explain(error, source, endpoint(), constants.HF_HUB_CACHE)


def _refusal(source: HubSource, error: Exception) -> Trouble:
    """Why a request failed, where the cache may serve instead.

    Raises:
        CheckpointError: it may not.
    """
    trouble = _trouble(source, error)
    if not trouble.passing:
        raise CheckpointError(f"{_text(source)}: {trouble}") from error
    return trouble


def _not_delivered(address: str, path: str, listing: _Listing) -> Trouble:
    """What happened where the library took another revision from its cache, which it does not report."""
    return Trouble(f"{address} lists {path} at {listing.commit} and does not deliver it", "try again later", True)


def _file_from_cache(source: HubSource, name: str, trouble: Trouble, error: Exception | None = None) -> Path | None:
    """The file beside the weights that `_from_cache` takes; where it takes none, that of the asked revision.

    Raises:
        CheckpointError: as `_cached`, where there is neither.
    """
    found = find(_cache_folder(), source)
    if found.best(source) is None and (path := found.beside(name)) is not None:
        return path
    path = _cached(source, trouble, error)[0].path.with_name(name)
    return path if path.is_file() else None


def _from_cache(
    source: HubSource, trouble: Trouble, progress: Progress | None, error: Exception | None = None
) -> LocatedFile:
    """The weights that the cache holds, with what `origin` has to say about it.

    Raises:
        CheckpointError: as `_cached`.
    """
    cached, notes = _cached(source, trouble, error)
    if trouble != _OFFLINE:
        notes = ["the hub was not reachable, taken from the cache", *notes]
    if progress:
        progress("; ".join([f"{trouble.what}, taking it from the cache", *notes[trouble != _OFFLINE :]]))
    origin = "; ".join([_origin(source, cached.path, cached.commit), *notes])
    return LocatedFile(cached.path, origin, published_hash(cached.path))


def _cached(source: HubSource, trouble: Trouble, error: Exception | None = None) -> tuple[CachedWeights, list[str]]:
    """The weights that the cache holds, and a note if they are another revision's than the asked one.

    Raises:
        CheckpointError: it holds none to take. The message names the complete revisions that it does hold.
    """
    cache = _cache_folder()
    found = find(cache, source)
    revision = source.revision or "main"
    known = f"{revision} is {found.asked} and not complete there" if found.asked else f"{revision} is unknown there"
    if (best := found.best(source)) is not None:
        return best, [] if best == found.weights else [f"the cache's only complete revision ({known})"]
    start = f"{_text(source)}: {trouble.what}, and the cache {cache} does not hold it"
    if found.others:
        others = " or ".join(_text(source, one.commit) for one in found.others[:_LISTED])
        start = f"{start} ({known}). It holds other revisions, name {others}"
    raise CheckpointError(f"{start}; {trouble.advice}") from error


def _cache_folder() -> Path:
    """Where huggingface_hub keeps its files; without it nothing was fetched, but a copied cache may lie there."""
    _library()
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _commit_of(file: Path, source: HubSource) -> str:
    """The commit in the path of a cached file."""
    return file.parents[len(Path(source.folder).parts)].name


def _origin(source: HubSource, file: Path, commit: str) -> str:
    return f"hub:{_join(source.repo, _join(source.folder, file.name))}@{commit}"


def _text(source: HubSource, revision: str | None = None) -> str:
    path, revision = _join(source.repo, _join(source.folder, source.file or "")), revision or source.revision
    return f"hub:{path}" + (f"@{revision}" if revision else "")


def _join(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]
