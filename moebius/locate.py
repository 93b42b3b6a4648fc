"""The weights file that a source string names: found on this machine, or downloaded."""

from __future__ import annotations

from pathlib import Path

from moebius import hub
from moebius.errors import CheckpointError
from moebius.sources import (
    FORMS,
    HubSource,
    LocatedFile,
    Progress,
    ShippedSource,
    StandInSource,
    choose_weights,
    is_ema_name,
    parse_source,
)


def locate(text: str, progress: Progress | None = None) -> LocatedFile:
    """The weights file that a hub, shipped or local source names, downloaded first where need be.

    Raises:
        CheckpointError: it is not there, is ambiguous, or cannot be fetched.
    """
    source = parse_source(text)
    if isinstance(source, StandInSource):
        raise CheckpointError(f"weights {text!r} are drawn, not read; expected a file, folder or hub source")
    if isinstance(source, HubSource):
        located = hub.fetch_weights(source, progress)
    elif isinstance(source, ShippedSource):
        located = LocatedFile(_locate_local(source.path).path, text)
    else:
        located = _locate_local(source.path)
    if is_ema_name(located.path.name):
        return LocatedFile(located.path, f"{located.origin}; EMA file", located.sha256)
    return located


def _locate_local(path: Path) -> LocatedFile:
    try:
        if path.is_dir():
            path /= choose_weights([entry.name for entry in path.iterdir() if entry.is_file()], f"folder {path}")
        if not path.exists():
            raise CheckpointError(f"weights {path}: no such file or folder; expected {FORMS}")
        if not path.is_file():
            raise CheckpointError(f"weights {path}: not a regular file; expected {FORMS}")
    except OSError as error:
        raise CheckpointError(f"weights {path}: {error.strerror or error}; expected {FORMS}") from error
    return LocatedFile(path, str(path))
