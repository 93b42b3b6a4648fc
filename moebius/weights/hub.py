"""Downloads weights from a Hugging Face repository or a mirror, through huggingface_hub and its cache.

Timeouts are the library's (`HF_HUB_ETAG_TIMEOUT`, `HF_HUB_DOWNLOAD_TIMEOUT`: seconds without a byte, 10 by default),
its retries are bounded by `moebius_runtime.files.hub_answers`. Bundles in a hub are `moebius_runtime.bundle.hub`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moebius.errors import CheckpointError
from moebius.weights.hub_cache import CachedWeights, blob_of, find, published_hash
from moebius.weights.sources import HubSource, LocatedFile, Progress, choose_weights
from moebius_runtime.errors import InputError
from moebius_runtime.files import hub_library
from moebius_runtime.files.hub_answers import OFFLINE, Trouble, explain, is_missing, quiet_retries
from moebius_runtime.files.hub_library import offline as offline

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
    """Finds the weights file of a repository's folder, and downloads it unless it is cached.

    If the hub is unreachable or fails, the cached copy of the same revision is used. If no revision was requested and
    the cache's newest one is incomplete, its only complete one is used. `origin` reports both.

    Raises:
        CheckpointError: repository, revision or folder are unknown, access is refused, the hub is unreachable and the
            file not cached, or the download fails.
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
    """Downloads a cached file again whose content differs from what the hub published.

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
    """Fetches an optional small file beside the weights, such as `config.json`; None if there is none.

    Without a network, or if the hub fails, the file beside the cached weights is used.

    Raises:
        CheckpointError: as `fetch_weights`, also if the cache has no weights.
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


def endpoint() -> str:
    """The hub's address, or that of the mirror in `HF_ENDPOINT`.

    Raises:
        CheckpointError: `HF_ENDPOINT` is not a valid address.
    """
    try:
        return hub_library.endpoint()
    except InputError as error:
        raise CheckpointError(str(error)) from error


def _library() -> ModuleType:
    try:
        return hub_library.import_hub("weights from a hub", "export", "name a local file")
    except InputError as error:
        raise CheckpointError(str(error)) from error


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
    """Explains a failed request after which the cache may be used.

    Raises:
        CheckpointError: the failure must be reported instead.
    """
    trouble = _trouble(source, error)
    if not trouble.passing:
        raise CheckpointError(f"{_text(source)}: {trouble}") from error
    return trouble


def _not_delivered(address: str, path: str, listing: _Listing) -> Trouble:
    """The library silently used another revision from its cache: explains this."""
    return Trouble(f"{address} lists {path} at {listing.commit} and does not deliver it", "try again later", True)


def _file_from_cache(source: HubSource, name: str, trouble: Trouble, error: Exception | None = None) -> Path | None:
    """The file beside the weights that `_from_cache` chooses, else the requested revision's.

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
    """Takes the weights from the cache, and notes in `origin` why.

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
    """The cached weights, and a note if they belong to another revision than the requested one.

    Raises:
        CheckpointError: there are none. The message names the complete revisions in the cache.
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
    """The cache folder of huggingface_hub."""
    _library()
    return hub_library.hub_cache()


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
