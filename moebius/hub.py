"""Weights from a Hugging Face repository, or from a mirror of it, through huggingface_hub and its cache.

The mirror (`HF_ENDPOINT`) and offline mode (`HF_HUB_OFFLINE`) are read when a file is asked for, so a program
may set them after it has imported huggingface_hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from moebius.errors import CheckpointError
from moebius.sources import HubSource, LocatedFile, Progress, choose_weights

if TYPE_CHECKING:
    from types import ModuleType

_TIMEOUT = 10.0  # seconds to wait for the list of files
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OFFLINE = "offline mode (HF_HUB_OFFLINE) is on"


def fetch_weights(source: HubSource, progress: Progress | None = None) -> LocatedFile:
    """The weights file of a repository's folder, downloaded unless the cache has it.

    When the hub cannot be reached, what the cache holds of the same revision serves, and `origin` says so.

    Raises:
        CheckpointError: repository, revision or folder unknown, access refused, no network and not in the
            cache, download cut short, or no room for it.
    """
    hub = _library()
    with _plain_errors(source):
        files, trouble = ({}, _OFFLINE) if offline() else _listing(hub, source)
        inside = [_name(path) for path in files if _parent(path) == source.folder]
        if trouble:
            chosen, published = _chosen_from_cache(hub, source, trouble), None
        elif not inside:
            raise CheckpointError(f"{_text(source)}: the repository has no folder {source.folder or '/'!r}")
        elif source.file and source.file not in inside:
            raise CheckpointError(f"{_text(source)}: the repository has no such file")
        else:
            chosen = source.file or choose_weights(inside, _text(source))
            published = files[_join(source.folder, chosen)]
        if progress:
            progress(f"{trouble}; taking it from the cache" if trouble else f"fetching {chosen} of {source.repo}")
        file = hub.hf_hub_download(
            source.repo,
            _join(source.folder, chosen),
            revision=source.revision,
            endpoint=endpoint(),
            local_files_only=bool(trouble),
        )
    path = Path(file)
    commit = path.parents[len(Path(source.folder).parts)].name
    origin = f"hub:{_join(source.repo, _join(source.folder, chosen))}@{commit}"
    if trouble and trouble != _OFFLINE:
        origin += "; the hub was not reachable, taken from the cache"
    return LocatedFile(path, origin, published or _hash_in_cache(path))


def fetch_file(source: HubSource, name: str) -> Path | None:
    """One small file beside the weights, such as a `config.json`; None where the repository has none.

    Raises:
        CheckpointError: as `fetch_weights`; also when it is not known, offline, whether there is such a file.
    """
    hub, path = _library(), _join(source.folder, name)
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _plain_errors(source):
        try:
            file = hub.hf_hub_download(
                source.repo, path, revision=source.revision, endpoint=endpoint(), local_files_only=offline()
            )
        except LocalEntryNotFoundError:
            # The cache also remembers which files do not exist.
            known = hub.try_to_load_from_cache(source.repo, path, revision=source.revision)
            if known is hub._CACHED_NO_EXIST:
                return None
            raise
        except EntryNotFoundError:
            return None
    return Path(file)


def offline() -> bool:
    """Whether the environment forbids network access, as huggingface_hub reads it."""
    value = os.environ.get("HF_HUB_OFFLINE", os.environ.get("TRANSFORMERS_OFFLINE", ""))
    return value.upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """The hub's address, or that of the mirror in `HF_ENDPOINT`."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def _library() -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            "weights from a hub need the package huggingface_hub; install moebius-edge[export], or name a local file"
        ) from error
    return huggingface_hub


def _listing(hub: ModuleType, source: HubSource) -> tuple[dict[str, str | None], str]:
    """The repository's files with their published SHA-256; and why, if the hub cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = hub.HfApi(endpoint=endpoint()).model_info(
            source.repo, revision=source.revision or "main", timeout=_TIMEOUT, files_metadata=True
        )
        return {one.rfilename: one.lfs.sha256 if one.lfs else None for one in info.siblings or []}, ""
    except HfHubHTTPError as error:
        if _status(error) < 500:
            raise
        return {}, f"{endpoint()} answered with HTTP status {_status(error)}"
    except Exception as error:  # each version of huggingface_hub brings another HTTP library with errors of its own
        return {}, f"{endpoint()} cannot be reached ({type(error).__name__}: {_first_line(error)})"


def _chosen_from_cache(hub: ModuleType, source: HubSource, trouble: str) -> str:
    """The name of the weights file that the cache holds of the asked folder and revision."""
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    with suppress(LocalEntryNotFoundError, FileNotFoundError, NotADirectoryError):
        # No pattern, so no file: only the cached revision's folder is looked up.
        snapshot = hub.snapshot_download(
            source.repo, revision=source.revision, local_files_only=True, allow_patterns=[]
        )
        folder = Path(snapshot, source.folder)
        names = [entry.name for entry in folder.iterdir() if entry.is_file()]
        if source.file is None:
            return choose_weights(names, f"the cached folder {folder}")
        if source.file in names:
            return source.file
    raise CheckpointError(
        f"{_text(source)}: {trouble}, and the cache {constants.HF_HUB_CACHE} does not hold it; "
        "run once with network access, set HF_ENDPOINT to a mirror, or name a local copy"
    )


def _hash_in_cache(path: Path) -> str | None:
    """The SHA-256 that the hub published for a cached file: the cache names a large file's content by it.

    Only the first link counts; a cache may link the content on to a store with names of another kind.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


@contextmanager
def _plain_errors(source: HubSource) -> Iterator[None]:
    """Turns what huggingface_hub raises into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
    except errors.GatedRepoError as error:
        reason = "access must be granted first: accept the terms on its page, then `hf auth login`"
        raise CheckpointError(f"{_text(source)}: {reason}") from error
    except errors.RepositoryNotFoundError as error:
        reason = f"{endpoint()} has no repository {source.repo}, or it is private (then `hf auth login`)"
        raise CheckpointError(f"{_text(source)}: {reason}") from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{_text(source)}: no revision {source.revision or 'main'} there") from error
    except errors.LocalEntryNotFoundError as error:
        why = _OFFLINE if offline() else f"{endpoint()} cannot be reached"
        reason = f"{why}, and the cache does not hold it; run once with network access"
        raise CheckpointError(f"{_text(source)}: {reason}") from error
    except errors.HfHubHTTPError as error:
        reason = f"{endpoint()} answered with HTTP status {_status(error)}; try again later or set HF_ENDPOINT"
        raise CheckpointError(f"{_text(source)}: {reason}") from error
    except OSError as error:
        reason = f"download failed: {error.strerror or _first_line(error)}; free space, or try again"
        raise CheckpointError(f"{_text(source)}: {reason}") from error
    except Exception as error:  # see _listing
        reason = f"download failed: {type(error).__name__}: {_first_line(error)}; try again"
        raise CheckpointError(f"{_text(source)}: {reason}") from error


def _status(error: Exception) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0))


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no reason given")[:300]


def _text(source: HubSource) -> str:
    path = _join(source.repo, _join(source.folder, source.file or ""))
    return f"hub:{path}" + (f"@{source.revision}" if source.revision else "")


def _join(folder: str, name: str) -> str:
    return "/".join(part for part in (folder, name) if part)


def _parent(path: str) -> str:
    return path.rpartition("/")[0]


def _name(path: str) -> str:
    return path.rpartition("/")[2]
