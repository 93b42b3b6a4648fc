"""A strip of before, mask and after, for people to look at."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from moebius_runtime.files import atomic_write
from moebius_runtime.masks import BoolArray
from moebius_runtime.pictures import Picture

_LONGEST_SIDE = 1024
_GAP = 8


def comparison_path(out: Path, *, whole: bool = False) -> Path:
    """Where the strip of a result goes: beside it, `NAME-comparison.png`; with `whole` the name keeps its suffix."""
    return out.with_name(f"{out.name if whole else out.stem}-comparison.png")


def save_comparison(before: Picture, mask: BoolArray, after: Picture, path: Path) -> None:
    """Writes before | mask | after to a PNG, each at most 1024 pixels long; the mask is red on the picture.

    Raises:
        OutputError: the file could not be written.
    """
    height, width = before.shape
    scale = min(1.0, _LONGEST_SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))  # Pillow's order: width, height

    def shrunk(picture: Picture) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return np.asarray(Image.fromarray(picture.to_rgb()).resize(size, Image.Resampling.LANCZOS))

    share = np.asarray(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).resize(size), np.float32)[..., None] / 255
    left, right = shrunk(before), shrunk(after)
    marked = (left * (1 - 0.6 * share) + np.array([255, 0, 0]) * 0.6 * share).round().astype(np.uint8)
    gap = np.full((size[1], _GAP, 3), 255, np.uint8)
    strip = np.concatenate([left, gap, marked, gap, right], axis=1)
    buffer = io.BytesIO()
    Image.fromarray(strip).save(buffer, "PNG")
    with atomic_write(path, follow_links=True) as stream:
        stream.write(buffer.getvalue())
