"""Opens the data source that a text in a configuration or on the command line names."""

from __future__ import annotations

import re
from pathlib import Path

from moebius.data.photographs import MorePhotographSource, PhotographSource
from moebius.data.sources import FolderSource, JsonLinesSource, SceneSource, Source
from moebius.data.tars import TarSource
from moebius.errors import DataError

_SCENES = re.compile(r"scenes:([1-9][0-9]{0,8})(?::(0|[1-9][0-9]{0,8}))?")
_MORE = "photographs:"
_FORMS = (
    "scenes:COUNT[:SEED], photographs, photographs:FOLDER, a folder of pictures or of tars, a .jsonl or a .tar file"
)


def names_no_file(text: str) -> bool:
    """Whether a text names generated scenes or scikit-image's photographs, not a path."""
    return text == "photographs" or _SCENES.fullmatch(text) is not None


def has_held_out(text: str) -> bool:
    """Whether a text names a source with a part that is held out for evaluation: scenes and photographs."""
    return names_no_file(text) or text.startswith(_MORE)


def open_source(text: str, size: int, held_out: bool = False) -> Source:
    """Opens the source that a text names.

    Args:
        text: `scenes:COUNT` or `scenes:COUNT:SEED`; `photographs`, scikit-image's; `photographs:FOLDER`, those of other
            packages that were unpacked into a folder; or a path to a folder of pictures,
            to a folder of tars (any `*.tar` in it makes it one), to JSON lines (`.jsonl`) or to a tar (`.tar`).
        size: side of a scene in pixels.
        held_out: use the evaluation split of scenes or photographs. Files have none.

    Raises:
        DataError: none of these, files with `held_out`, or as the sources.
    """
    if match := _SCENES.fullmatch(text):
        return SceneSource(int(match[1]), size, int(match[2] or 0), held_out)
    if text == "photographs":
        return PhotographSource(held_out)
    if text.startswith(_MORE):
        return MorePhotographSource(text.removeprefix(_MORE), held_out)
    path = Path(text)
    if not text or "\0" in text or not path.exists():
        raise DataError(f"data {text}: no such file or folder; expected {_FORMS}")
    if held_out:
        raise DataError(f"data {text}: only scenes and photographs have a held-out part; keep yours in another folder")
    if path.is_dir():
        return TarSource([path]) if any(path.glob("*.tar")) else FolderSource(path)
    if path.suffix == ".jsonl":
        return JsonLinesSource(path)
    if path.suffix == ".tar":
        return TarSource([path])
    raise DataError(f"data {text}: a file of another kind; expected {_FORMS}")
