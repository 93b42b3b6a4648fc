"""Bundles in a repository of a Hugging Face hub, `hub:OWNER/REPO[@REVISION]`, and in the cache of huggingface_hub.

The files are downloaded by huggingface_hub into its own cache, one by one, when they are first needed. That cache keeps
a file as a link from `snapshots/COMMIT/` into `blobs/`, which ONNX Runtime 1.24 refuses (later versions follow only
some of these links). Therefore a bundle is put together in a folder of its own, `MOEBIUS_CACHE/bundles/...`, of hard
links to the blobs, or of copies where the file system has no hard links. `blob_of` decides which links of the cache are
followed; the folder itself holds none, so that everything that reads a bundle keeps refusing links that leave it.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebius_runtime.bundle.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES
from moebius_runtime.errors import BundleError, InputError
from moebius_runtime.files import link_file, open_plain
from moebius_runtime.files.cache import cache_folder
from moebius_runtime.files.hub_answers import OFFLINE, Trouble, explain, is_missing, quiet_retries
from moebius_runtime.files.hub_library import endpoint, hub_cache, import_hub, offline
from moebius_runtime.files.writing import cannot_write

_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}"
_NAME = re.compile(rf"hub:(?P<repo>{_PART}/{_PART})(?:@(?P<revision>{_PART}(?:/{_PART}){{0,4}}))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # SHA-1 of a file in git, SHA-256 of one in large file storage
_REPOSITORY = re.compile(rf"models--(?P<owner>{_PART}?)--(?P<name>{_PART})")
_ROOM = "Free some space there, or set MOEBIUS_CACHE to a writable folder with room."


@dataclass(frozen=True)
class HubName:
    """A repository of a hub as OWNER/REPO, and a branch, tag or commit; no revision means `main`."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"hub:{self.repo}" + (f"@{self.revision}" if self.revision else "")


def hub_name(path: str | Path) -> HubName | None:
    """Returns the repository that `hub:OWNER/REPO[@REVISION]` names; None for anything that does not begin so.

    Raises:
        InputError: it begins with `hub:` and is malformed.
    """
    text = str(path).replace(os.sep, "/")
    if not text.startswith("hub:"):
        return None
    match = _NAME.fullmatch(text)
    if match is None or ".." in text:
        raise InputError(
            f"bundle {text[:200]!r}: expected hub:OWNER/REPO or hub:OWNER/REPO@REVISION, such as hub:me/moebius-int8@v1"
        )
    return HubName(match["repo"], match["revision"])


def blob_of(snapshot: Path, file: str) -> Path:
    """Returns the plain file that holds the content of a file of a snapshot, after following the cache's links.

    Accepted are a file inside the snapshot, one of the repository's `blobs/HASH`, and one of the cache's shared
    `blobs/HA/HASH`. Every link on the way is resolved, so a blob that is itself a link to elsewhere is refused.

    Args:
        snapshot: `CACHE/models--OWNER--REPO/snapshots/COMMIT`.
        file: a plain relative path, as the manifest checks them.

    Raises:
        BundleError: the file is missing, not a plain file, or its links lead elsewhere.
    """
    root = snapshot.resolve()
    repository, cache = root.parents[1], root.parents[2]
    path = root / file
    try:
        target = path.resolve(strict=True)
        inside = target.is_relative_to(root)
        own = target.parent == repository / "blobs" and _BLOB.fullmatch(target.name)
        shared = target.parent == cache / "blobs" / target.name[:2] and _BLOB.fullmatch(target.name)
        if not (inside or own or shared):
            raise BundleError(
                f"{path} is a link to {target}, outside of the cache's blobs; nothing was read. Do not use this "
                "bundle unless you know why."
            )
        open_plain(target).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{path}: {reason}; expected a file of the hub's cache. Download it again.") from error
    return target


@dataclass
class HubFiles:
    """The files of a bundle at one commit of a repository. They are fetched when they are first used.

    Attributes:
        source: the repository; None for a snapshot that was named by its path, of which nothing is downloaded.
        name: what the user named, for messages and commands.
        commit: 40 hexadecimal digits.
        snapshot: folder of the commit in the cache of huggingface_hub.
        folder: the bundle's own folder of plain files.
        notes: what the user should know, such as that the hub could not be reached.
    """

    source: HubName | None
    name: str
    commit: str
    snapshot: Path
    folder: Path = field(init=False)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        root = self.snapshot.resolve()
        match = _REPOSITORY.fullmatch(root.parents[1].name)
        repo = f"{match['owner']}--{match['name']}" if match else root.parents[1].name
        place = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]  # two caches may hold one name and commit
        self.folder = cache_folder() / "bundles" / f"{repo}@{self.commit[:12]}-{place}"

    def checked(self, file: str, check: Callable[[str], Path]) -> Path:
        """Returns a file's path after fetching it, where it is not there, and checking it.

        A cached file that is damaged is downloaded again, once.

        Args:
            file: a name among the manifest's files.
            check: returns the path of a file in `folder`, or raises `BundleError` if it is not the manifest's.

        Raises:
            BundleError: it cannot be fetched, or is not the manifest's.
        """
        fresh = not (self.folder / file).is_file() and self._provide(file)
        try:
            return check(file)
        except BundleError as error:
            damaged = error
        for again in () if fresh else (False, True):  # the cache's copy, then the hub's
            if again and self.source is None:
                raise damaged
            if again and offline():
                raise BundleError(
                    f"{self.name}: {file} is damaged in the cache {self.snapshot}, and {OFFLINE}; run once with "
                    "network access, which downloads it again"
                ) from damaged
            self._provide(file, again)
            try:
                return check(file)
            except BundleError as error:
                damaged = error
        (self.folder / file).unlink(missing_ok=True)
        raise BundleError(
            f"{self.name}: {file} at {self.commit[:12]} is not the file that the manifest names (size or SHA-256 "
            "differ), so it was tampered with, or a mirror changed it; it was not used. Do not use this bundle unless "
            "you know why."
        ) from damaged

    def place_manifest(self) -> None:
        """Puts the manifest into the folder; errors as `checked`."""
        self._provide(MANIFEST_NAME)

    def _provide(self, file: str, again: bool = False) -> bool:
        """Puts a file into the folder. Returns True if it was downloaded just now."""
        fresh = self.source is not None and _download(self.source, self.name, self.commit, file, again)
        _place(blob_of(self.snapshot, file), self.folder / file)
        return fresh


def remote_files(path: str | Path) -> HubFiles | None:
    """Returns the files of `hub:OWNER/REPO[@REVISION]` or of a snapshot folder of the hub's cache; else None.

    The manifest is in `folder` afterwards. A revision is resolved to its commit first, so that all files are of one
    commit. If the hub is unreachable or fails, the cached commit of the revision is taken, with a note.

    Raises:
        InputError: a malformed name, or the extra `hub` is not installed.
        BundleError: repository or revision are unknown, access is refused, there is no bundle, or no network.
        OutputError: the folder cannot be written.
    """
    source = hub_name(path)
    files = _snapshot_files(Path(path)) if source is None else _hub_files(source)
    if files is not None:
        files.place_manifest()
    return files


def _snapshot_files(path: Path) -> HubFiles | None:
    """A snapshot folder of the hub's cache, if its manifest is a link. Without links it is a bundle as any other."""
    manifest = path / MANIFEST_NAME
    try:
        if not manifest.is_symlink():
            return None
        root = path.resolve()
    except (OSError, RuntimeError, ValueError):  # ValueError: a NUL in the name
        return None
    if root.parent.name != "snapshots" or not _COMMIT.fullmatch(root.name):
        return None
    if not _REPOSITORY.fullmatch(root.parents[1].name):
        return None
    return HubFiles(None, str(path), root.name, root)


def _hub_files(source: HubName) -> HubFiles:
    hub = import_hub("bundles of a hub", "hub", "name a local folder")
    notes: list[str] = []
    manifest = None
    if _COMMIT.fullmatch(source.revision or ""):  # a commit never changes, so a cached one needs no request
        manifest = _cached(hub, source, MANIFEST_NAME, source.revision)
    if manifest is None:
        manifest = _manifest(hub, source, notes)
    return HubFiles(source, str(source), manifest.parent.name, manifest.parent, notes)


def _manifest(hub: Any, source: HubName, notes: list[str]) -> Path:
    """Downloads the manifest of the requested revision; the cached one, with a note, where the hub cannot be asked.

    Raises:
        BundleError: there is none, or the repository holds no bundle.
    """
    from huggingface_hub import constants

    trouble, cause = Trouble(OFFLINE, "run once with network access, or name a local copy", True), None
    if not offline():
        address = endpoint()
        try:
            with quiet_retries(notes.append):
                info = hub.HfApi(endpoint=address).model_info(
                    source.repo,
                    revision=source.revision or "main",
                    timeout=float(constants.HF_HUB_ETAG_TIMEOUT),
                    files_metadata=True,
                )
                _check_listing(source, {one.rfilename: one.size for one in info.siblings or []})
                manifest = Path(_hf_download(hub, source, MANIFEST_NAME, source.revision or "main", address))
        except BundleError:
            raise
        except Exception as error:  # each version of huggingface_hub brings another HTTP library with errors of its own
            trouble, cause = explain(error, source, address, str(hub_cache())), error
        else:
            if manifest.parent.name == info.sha:
                return manifest
            what = f"{address} lists {MANIFEST_NAME} at {str(info.sha)[:12]} and does not deliver it"
            trouble = Trouble(what, "try again later", True)
    cached = _cached(hub, source, MANIFEST_NAME, source.revision) if trouble.passing else None
    if cached is None:
        unknown = f", and the cache {hub_cache()} does not hold it" if trouble.passing else ""
        raise BundleError(f"{source}: {trouble.what}{unknown}; {trouble.advice}") from cause
    if trouble.what != OFFLINE:
        notes.append(f"{source}: {trouble.what}; the cached commit {cached.parent.name[:12]} is used")
    return cached


def _check_listing(source: HubName, files: dict[str, int | None]) -> None:
    """Refuses a repository without a manifest, or with one that would be refused after its download. Sizes in bytes."""
    if MANIFEST_NAME not in files:
        held = f"it holds {', '.join(sorted(files)[:3])[:200]}" if files else "it is empty"
        raise BundleError(
            f"{source}: the repository holds no bundle (no {MANIFEST_NAME}; {held}); expected one that "
            "`moebius-export push` wrote"
        )
    if (files[MANIFEST_NAME] or 0) > MAX_MANIFEST_BYTES:
        raise BundleError(
            f"{source}: its {MANIFEST_NAME} has {files[MANIFEST_NAME]} bytes, expected at most {MAX_MANIFEST_BYTES}; "
            "nothing was downloaded"
        )


def _hf_download(hub: Any, source: HubName, file: str, revision: str, address: str, again: bool = False) -> str:
    from huggingface_hub import constants

    path: str = hub.hf_hub_download(
        source.repo,
        file,
        revision=revision,
        endpoint=address,
        etag_timeout=constants.HF_HUB_ETAG_TIMEOUT,
        force_download=again,
    )
    return path


def _cached(hub: Any, source: HubName, file: str, revision: str | None) -> Path | None:
    """The path of a cached file in its snapshot, or None."""
    found = hub.try_to_load_from_cache(source.repo, file, revision=revision)
    path = Path(found) if isinstance(found, str) else None
    return path if path is not None and _COMMIT.fullmatch(path.parents[file.count("/")].name) else None


def _download(source: HubName, name: str, commit: str, file: str, again: bool) -> bool:
    """Downloads a file of a commit into the cache unless it is there. Returns True if it was downloaded.

    A connection that is cut is resumed where it stopped. After a killed process the complete files are kept.

    Args:
        source, commit: the repository, and 40 hexadecimal digits.
        name: what the user named.
        file: path in the repository.
        again: download it even if it is cached.

    Raises:
        BundleError: it cannot be downloaded.
    """
    hub = import_hub("bundles of a hub", "hub", "name a local folder")
    cached = _cached(hub, source, file, commit)
    if cached is not None and not again:
        return False
    if offline():
        raise BundleError(
            f"{name}: {OFFLINE}, and the cache {hub_cache()} does not hold {file}; run once with network access"
        )
    address = endpoint()
    try:
        if cached is not None and not cached.is_symlink():  # a cache without links: the library keeps what is there
            cached.unlink(missing_ok=True)
        with quiet_retries(None):
            _hf_download(hub, source, file, commit, address, again)
    except Exception as error:  # see _manifest; the library hides the reason of a failed forced download
        while isinstance(error, ValueError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if is_missing(error):
            raise BundleError(
                f"{name}: the repository has no {file} at {commit[:12]}, which its manifest lists; push the bundle "
                "again, or name another revision"
            ) from error
        raise BundleError(f"{name}: {file}: {explain(error, source, address, str(hub_cache()))}") from error
    return True


def _place(blob: Path, target: Path) -> None:
    """Puts a hard link to `blob`, or a copy, at `target`, whole or not at all; raises `OutputError`."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        link_file(blob, temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise cannot_write(target, error, _ROOM) from error
    finally:
        if os.path.lexists(temporary):  # also after a rename onto the same file, which does nothing
            temporary.unlink()
