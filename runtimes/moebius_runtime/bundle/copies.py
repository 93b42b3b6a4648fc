"""Bundles of a hub for commands that need a folder: to hand it to other processes, or to write into it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.hub import hub_name, remote_files
from moebius_runtime.bundle.manifest import MANIFEST_NAME, Precision
from moebius_runtime.errors import InputError
from moebius_runtime.files import link_file, placed_whole

_EDITED = 1 << 20  # bytes: smaller files, such as plans, may be edited, so they get a copy of their own


def fetched_folder(path: str | Path, precisions: Iterable[Precision]) -> Path:
    """Returns the folder of a bundle, after fetching what it takes to run it if it is one of a hub.

    Args:
        path: a folder, which is returned unopened, or a bundle of a hub.
        precisions: whose graphs are fetched; of a graph without such a file, fp32 or its first one.

    Raises:
        MoebiusError: as `Bundle.open` and `Bundle.model_file`.
    """
    if hub_name(path) is None:
        return Path(path)
    bundle = Bundle.open(path)
    for precision in precisions:
        for graph in bundle.manifest.graphs:
            bundle.model_file(graph, bundle.precision_of(graph, (precision, "fp32")))
    return bundle.path


def writable_folder(path: str | Path) -> tuple[Path, bool]:
    """Returns a bundle's folder that a command may change, and whether it is a new copy.

    A bundle of a hub is fetched whole and copied to a folder of the repository's name in the current folder, because
    a commit does not change. Any other path is returned unopened.

    Raises:
        InputError: that folder exists already.
        MoebiusError: as `Bundle.open` and `Bundle.file`; the folder cannot be written.
    """
    source = hub_name(path)
    if source is None and remote_files(path) is None:
        return Path(path), False
    bundle = Bundle.open(path)
    assert bundle.remote is not None
    name = source.repo.partition("/")[2] if source else bundle.path.name.partition("@")[0].rpartition("--")[2]
    out = Path(name)
    if out.exists() or out.is_symlink():
        raise InputError(
            f"{bundle.name} is copied to the folder {out} before it is changed, and there is one already; name that "
            f"folder in place of {bundle.name}, or remove it"
        )
    files = {file: bundle.file(file) for file in bundle.manifest.files}
    with placed_whole(out) as folder:
        for file, held in (*files.items(), (MANIFEST_NAME, bundle.path / MANIFEST_NAME)):
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if held.stat().st_size < _EDITED:
                target.write_bytes(held.read_bytes())
            else:
                link_file(held, target)
    return out, True
