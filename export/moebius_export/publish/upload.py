"""Uploads a bundle to a repository of a Hugging Face hub, in one commit: all of it arrives, or nothing changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius_export.errors import ExportError
from moebius_export.publish.card import MARKER, licence_of, model_card, origin_repository
from moebius_export.publish.figures import report_tables
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.hub import HubName
from moebius_runtime.bundle.manifest import MANIFEST_NAME, read_manifest
from moebius_runtime.bundle.passport import ENGINES
from moebius_runtime.errors import BundleError
from moebius_runtime.files.hub_answers import OFFLINE, explain, quiet_retries
from moebius_runtime.files.hub_library import endpoint, hub_cache, import_hub, offline

CARD = "README.md"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class PushOptions:
    """How a bundle is pushed.

    Attributes:
        private: a new repository is private; an existing one stays as it is.
        licence: identifier of the weights' licence; None takes that of their origin.
        reports: files of `moebius-bench --json` and `moebius-export verify --json`, for the card.
        replace_card: replace a card that this command did not write.
        message: first line of the commit; None names the precisions.
    """

    private: bool = False
    licence: str | None = None
    reports: tuple[Path, ...] = ()
    replace_card: bool = False
    message: str | None = None


@dataclass(frozen=True)
class Pushed:
    """The commit, the number and size in bytes of the bundle's files, files that were deleted, and notes."""

    commit: str
    files: int
    size: int
    deleted: tuple[str, ...]
    notes: tuple[str, ...]


def card_of(bundle: Bundle, target: HubName, options: PushOptions) -> str:
    """The model card that `push` writes.

    Raises:
        ExportError: the licence of the weights is unknown, or a report is not one of this bundle.
    """
    tables = report_tables(bundle, options.reports)
    found: dict[str, str | None] = {}
    if options.licence is None:
        for weights in (bundle.manifest.model.unet, bundle.manifest.model.vae):
            if (repository := origin_repository(weights)) is not None and repository[0] not in found:
                found[repository[0]] = _stated_licence(*repository)
    return model_card(bundle, target, licence_of(bundle, options.licence, found), tables)


def push(bundle: Bundle, target: HubName, options: PushOptions, progress: Progress = lambda text: None) -> Pushed:
    """Checks every file of a bundle, and commits them with a model card to a repository, which is made if needed.

    Files of the bundle that the repository held before are replaced or deleted; other files stay. Engines are not
    pushed. An upload that was cut can be repeated: large files that arrived are not sent again.

    Args:
        bundle: a local one.
        target: the repository, and the branch as its revision.
        options: see `PushOptions`.
        progress: called with each stage and each retry.

    Raises:
        BundleError: a file is missing or damaged.
        ExportError: see `card_of`; or the hub refuses, cannot be reached, or is changed by someone else meanwhile.
    """
    hub = import_hub("pushing a bundle", "hub", "copy the folder")
    if offline():
        raise ExportError(f"{target}: {OFFLINE}; unset it to push")
    if re.fullmatch(r"[0-9a-f]{40}", target.revision or ""):
        raise ExportError(f"{target}: a commit cannot be changed; name a branch, or leave @REVISION out for main")
    for name, graph in bundle.manifest.graphs.items():
        for precision in graph.files:
            progress(f"checking {name} {precision}")
            bundle.model_file(name, precision)
    paths = {file: bundle.file(file) for file in bundle.manifest.files}
    card = card_of(bundle, target, options)
    address = endpoint()
    try:
        with quiet_retries(progress):
            return _pushed(hub.HfApi(endpoint=address), hub, bundle, paths, card, target, options, progress)
    except ExportError:
        raise
    except Exception as error:  # each version of huggingface_hub brings another HTTP library with errors of its own
        while isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # of one file's upload
        raise ExportError(f"{target}: {_why(error, target, address)}") from error


def _pushed(
    api: Any,
    hub: Any,
    bundle: Bundle,
    paths: dict[str, Path],
    card: str,
    target: HubName,
    options: PushOptions,
    progress: Progress,
) -> Pushed:
    branch, notes = target.revision or "main", []
    progress(f"opening {target.repo}")
    api.create_repo(target.repo, private=options.private or None, exist_ok=True)
    if target.revision is not None:
        api.create_branch(target.repo, branch=branch, exist_ok=True)
    there = api.model_info(target.repo, revision=branch)
    held = {one.rfilename for one in there.siblings or []}
    old = _listed(api, target, branch) if MANIFEST_NAME in held else set()
    deleted = sorted((old & held) - set(paths))
    operations = [hub.CommitOperationAdd(file, str(path)) for file, path in paths.items()]
    operations.append(hub.CommitOperationAdd(MANIFEST_NAME, str(bundle.path / MANIFEST_NAME)))
    operations += [hub.CommitOperationDelete(file) for file in deleted]
    if CARD in held and not options.replace_card and not _is_ours(api, target, branch):
        notes.append(f"the repository's own {CARD} stays; with --replace-card the card of this bundle takes its place")
    else:
        operations.append(hub.CommitOperationAdd(CARD, card.encode()))
    if (bundle.path / ENGINES).is_dir():
        notes.append(
            "engines are not pushed: they are code for one kind of GPU and one version of TensorRT; build them where "
            f"they run: moebius-export trt {target}"
        )
    size = sum(info.size for info in bundle.manifest.files.values())
    progress(f"uploading {len(paths)} files, {size / 1e6:,.0f} MB")
    done = api.create_commit(
        target.repo,
        operations,
        commit_message=options.message or f"Bundle: {', '.join(bundle.manifest.graphs['unet'].files)}",
        revision=branch,
        parent_commit=there.sha,
    )
    return Pushed(str(done.oid), len(paths), size, tuple(deleted), tuple(notes))


def _listed(api: Any, target: HubName, branch: str) -> set[str]:
    """The files that the repository's manifest lists; none if it is damaged, so that nothing is deleted by it."""
    path = Path(api.hf_hub_download(target.repo, MANIFEST_NAME, revision=branch))
    try:
        return set(read_manifest(path.parent).files)
    except BundleError:
        return set()


def _is_ours(api: Any, target: HubName, branch: str) -> bool:
    """Whether the repository's card is one that `push` wrote, or holds metadata alone, as a new repository's."""
    text = Path(api.hf_hub_download(target.repo, CARD, revision=branch)).read_text(encoding="utf-8", errors="replace")
    return MARKER in text or not re.sub(r"\A---\n.*?\n---\s*", "", text, count=1, flags=re.DOTALL).strip()


def _stated_licence(repository: str, commit: str | None) -> str | None:
    """The licence in the metadata of a repository's card; None where it cannot be had."""
    hub = import_hub("pushing a bundle", "hub", "copy the folder")
    if offline():
        return None
    try:
        with quiet_retries(None):
            data = hub.HfApi(endpoint=endpoint()).model_info(repository, revision=commit).card_data
    except Exception:  # see push; the caller asks for --license
        return None
    stated = None if data is None else data.get("license")
    return stated if isinstance(stated, str) else None


def _why(error: Exception, target: HubName, address: str) -> str:
    """Why a push failed and what to do, on one line."""
    text = " ".join(str(error).split())[:300]
    if isinstance(error, ValueError) and "Invalid metadata" in text:
        return f"the hub refuses the card ({text}); name a licence that it knows, or `other`, with --license"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (409, 412):
        return f"{address} answered with HTTP status {status}: the branch was changed meanwhile; run the command again"
    if status in (400, 402, 413, 422):
        return f"{address} answered with HTTP status {status} ({text}); nothing was changed in the repository"
    return str(explain(error, target, address, str(hub_cache()), "write"))
