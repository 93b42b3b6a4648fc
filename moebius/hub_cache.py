"""What the cache of huggingface_hub holds of a repository's folder, read without the network.

The layout is huggingface_hub's documented one: `models--OWNER--REPO/refs/REVISION` names a commit,
`snapshots/COMMIT/...` holds links to `blobs/HASH`. Its own `scan_cache_dir` leaves out a whole repository when one
link of it is broken, which is just when the other revisions are needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moebius.errors import CheckpointError
from moebius.sources import SUFFIXES, HubSource, choose_weights

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_BRANCH = "main"


@dataclass(frozen=True)
class CachedWeights:
    """A weights file in the cache, with content behind its link, and the commit that it belongs to."""

    commit: str
    path: Path


@dataclass(frozen=True)
class Found:
    """What the cache holds of a source.

    `asked` is the asked revision's commit, None where the cache does not know the revision, and `folder` the asked
    folder of it. `weights` are that revision's, or None. `others` are those of the other revisions, newest in the
    cache first.
    """

    asked: str | None
    folder: Path | None
    weights: CachedWeights | None
    others: tuple[CachedWeights, ...]

    def best(self, source: HubSource) -> CachedWeights | None:
        """The weights to take without a network.

        Those of the asked revision; where no revision was asked for and `main` is not complete, the only other ones
        that there are. Among several others the choice is the user's.
        """
        if self.weights is None and source.revision in (None, _BRANCH) and len(self.others) == 1:
            return self.others[0]
        return self.weights

    def beside(self, name: str) -> Path | None:
        """A file of the asked revision's folder, whether or not the weights lie there."""
        path = self.folder / name if self.folder else None
        return path if path is not None and path.is_file() else None


def find(cache: Path, source: HubSource) -> Found:
    """The weights that the cache holds of a source, by revision. Hidden, empty and dangling entries do not count.

    Raises:
        CheckpointError: the asked revision's folder holds several checkpoints, or only parts of one.
    """
    repository = cache / f"models--{source.repo.replace('/', '--')}"
    asked = _commit_of(repository, source.revision or _BRANCH)
    weights, others = None, []
    snapshots = dict(_snapshots(repository, source.folder))
    for commit, folder in snapshots.items():
        try:
            name = _weights_in(folder, source)
        except CheckpointError:
            if commit == asked:
                raise
            name = None
        if name is None:
            continue
        if commit == asked:
            weights = CachedWeights(commit, folder / name)
        else:
            others.append(CachedWeights(commit, folder / name))
    others.sort(key=lambda one: (-one.path.lstat().st_mtime, one.commit))
    return Found(asked, snapshots.get(asked or ""), weights, tuple(others))


def published_hash(path: Path) -> str | None:
    """The SHA-256 that the hub published for a cached file: the cache names a large file's content by it.

    Only the first link counts; a cache may link the content on to a store with names of another kind.
    """
    name = Path(os.readlink(path)).name if path.is_symlink() else ""
    return name if _SHA256.fullmatch(name) else None


def blob_of(path: Path) -> Path:
    """The file that holds the content of a cached file: the end of its links. Deleting it makes room for a new one."""
    return Path(os.path.realpath(path))


def _commit_of(repository: Path, revision: str) -> str | None:
    if _COMMIT.fullmatch(revision):
        return revision
    try:
        text = (repository / "refs" / revision).read_text(encoding="ascii", errors="replace").strip()
    except OSError:  # no such reference, or one that cannot be read
        return None
    return text if _COMMIT.fullmatch(text) else None


def _snapshots(repository: Path, folder: str) -> Iterator[tuple[str, Path]]:
    """(commit, the asked folder in it) of every snapshot that has it."""
    try:
        commits = sorted(entry.name for entry in (repository / "snapshots").iterdir() if _COMMIT.fullmatch(entry.name))
    except OSError:
        return
    for commit in commits:
        path = repository / "snapshots" / commit / folder
        if path.is_dir():
            yield commit, path


def _weights_in(folder: Path, source: HubSource) -> str | None:
    """The name of the weights file in a snapshot's folder; None where there is none with content."""
    try:
        names = [entry.name for entry in folder.iterdir() if entry.is_file() and entry.stat().st_size]
    except OSError:
        return None
    if source.file is not None:
        return source.file if source.file in names else None
    if not any(Path(name).suffix in SUFFIXES for name in names):
        return None
    return choose_weights(names, f"the cached folder {folder}")
