"""Squares of the picture that the network fills (see `squares`): brought to its size, and brought back.

The part of the picture inside a crop is its window. What the crop holds beyond the picture is filled by
reflection at the network's scale, so that nothing larger than the window is ever made.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime.crop import Crop, inside, span, whole_crop, window
from moebius_runtime.masks import BoolArray
from moebius_runtime.squares import Square, apart, find_squares, whole_square

__all__ = [
    "Crop",
    "Square",
    "apart",
    "find_crops",
    "find_squares",
    "from_network",
    "mask_to_network",
    "resize_rgb",
    "to_network",
    "whole_crop",
    "whole_square",
    "window",
]


def find_crops(mask: BoolArray, size: int = 512) -> list[Crop]:
    """The crops of `find_squares`, in its order."""
    return [square.crop for square in find_squares(mask, size)]


def to_network(
    rgb: npt.NDArray[np.uint8], crop: Crop, shape: tuple[int, int], size: int = 512
) -> npt.NDArray[np.uint8]:
    """A crop's window, uint8 [h, w, 3], as the network sees the crop: [size, size, 3].

    Lanczos resampling, none where the crop has the network's size; reflection beyond the picture.
    """
    parts = inside(crop, shape)
    spans = [span(part, crop.side, size) for part in parts]
    scale = crop.side / size
    (top, bottom), (left, right) = (
        (first * scale - start, last * scale - start) for (first, last), (start, _) in zip(spans, parts, strict=True)
    )
    rows, columns = (last - first for first, last in spans)
    resized = resize_rgb(rgb, (rows, columns), (left, top, right, bottom))
    return resized[np.ix_(*(_reflected(covered, size) for covered in spans))]


def mask_to_network(mask: BoolArray, crop: Crop, shape: tuple[int, int], size: int = 512) -> BoolArray:
    """The mask of a crop's window, bool [h, w], as `to_network`: [size, size], True where any pixel is."""
    for axis, part in enumerate(inside(crop, shape)):
        covered = span(part, crop.side, size)
        # Each network pixel takes the pixels from its edge to the next one's; when enlarging, its edge's own.
        edges = np.arange(*covered) * crop.side // size - part[0]
        edges[0] = 0
        reduced = np.logical_or.reduceat(mask, edges, axis=axis)
        mask = np.take(reduced, _reflected(covered, size), axis=axis)
    return mask


def from_network(generated: npt.NDArray[Any], crop: Crop, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """The way back: [size, size, 3], uint8 or float32 in 0..255, to the crop's window, [h, w, 3]."""
    (top, bottom), (left, right) = inside(crop, shape)
    scale = len(generated) / crop.side
    box = (left * scale, top * scale, right * scale, bottom * scale)
    return resize_rgb(generated, (bottom - top, right - left), box)


def resize_rgb(
    pixels: npt.NDArray[Any], size: tuple[int, int], box: tuple[float, float, float, float]
) -> npt.NDArray[Any]:
    """[h, w, 3], uint8 or float32 in 0..255, to `size` (height, width), same type, by Lanczos resampling.

    `box` is the part (left, top, right, bottom) of the source that fills the result, in its pixels. Pixels
    are copied, not computed, where the box has whole edges and the size of the result.
    """
    height, width = size
    # Rounding may have put an edge a hair outside.
    left, top = max(0.0, box[0]), max(0.0, box[1])
    right, bottom = min(box[2], pixels.shape[1]), min(box[3], pixels.shape[0])
    if (right - left, bottom - top) == (width, height) and left.is_integer() and top.is_integer():
        copied: npt.NDArray[Any] = pixels[int(top) : int(bottom), int(left) : int(right)].copy()
        return copied

    def resized(image: Image.Image) -> npt.NDArray[Any]:
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, (left, top, right, bottom)))

    if pixels.dtype == np.uint8:
        return resized(Image.fromarray(np.ascontiguousarray(pixels)))
    planes = [resized(Image.fromarray(np.ascontiguousarray(pixels[:, :, band]))) for band in range(3)]
    return np.stack(planes, axis=2).clip(0, 255)  # Lanczos overshoots at edges


def _reflected(covered: tuple[int, int], size: int) -> npt.NDArray[np.intp]:
    """For each network pixel, which pixel of the span it shows, from 0: itself or its mirror image."""
    first, last = covered
    period = 2 * (last - first - 1)
    offset = np.abs(np.arange(size) - first) % period
    return np.where(offset < last - first, offset, period - offset)
