"""Squares of the picture that the network fills: found from the mask, brought to its size, and brought back.

The part of the picture inside a crop is its window. What the crop holds beyond the picture is filled by
reflection at the network's scale, so that nothing larger than the window is ever made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime.errors import InputError
from moebius_runtime.masks import BoolArray, connected

CONTEXT = 0.5
_MIN_PIXELS = 8  # of the network's picture: one latent cell

Boxes = npt.NDArray[np.intp]  # [n, 4]: top, left, bottom, right; the last two exclusive


@dataclass(frozen=True)
class Crop:
    """A square of picture pixels. It may reach beyond the picture."""

    left: int
    top: int
    side: int


def find_crops(mask: BoolArray, size: int = 512, context: float = CONTEXT) -> list[Crop]:
    """Squares that hold all of the mask, each with context around, in reading order of their corners.

    A region's square has the side max(size, (1 + 2 * context) * longer side of its bounding box), at most
    the picture's longer side; it is centred on the region and moved into the picture where it fits. With the
    default context a large region fills the middle half of its square: three quarters of what the network
    sees is known, and the region still gets half of the resolution. Regions whose squares reach into one
    another's bounding boxes share one, so no crop holds mask pixels that another one fills.

    Args:
        mask: bool [H, W], not empty.
        size: the network's side in pixels; no square is smaller, unless the picture is.
        context: known width to each side, in longer sides of the region's bounding box; 0.25 or more.

    Raises:
        InputError: a square would reduce the picture to less than one latent cell across.
    """
    if context < 0.25:
        raise ValueError(f"context is {context}; expected 0.25 or more")
    smallest = min(size, max(mask.shape))
    # A square reaches context / (1 + 2 * context) of `smallest` or more beyond its region, at least a sixth,
    # or up to the picture's edge. Pixels of neighbouring cells are less than two cells apart: cells of a
    # twelfth join only what would share a square anyway.
    boxes = _regions(mask, max(1, smallest // 12))
    while True:
        squares = _squares(boxes, mask.shape, smallest, context)
        first, second = _reaching(squares, boxes)
        if not len(first):
            break
        boxes = _merged(boxes, connected(len(boxes), first, second))
    crops = [Crop(int(left), int(top), int(bottom - top)) for top, left, bottom, _ in squares]
    for crop in crops:
        _check(crop, mask.shape, size, "Cut the picture into shorter pieces")
    return sorted(crops, key=lambda crop: (crop.top, crop.left))


def apart(crops: list[Crop], shape: tuple[int, int]) -> list[list[Crop]]:
    """The crops in their order, cut into runs in which no two share a pixel of the picture.

    A seam's feather can reach into a neighbour's square; the crops of one run do not see each other's.
    """
    runs: list[list[Crop]] = []
    for crop in crops:
        if not runs or any(_overlap(window(crop, shape), window(other, shape)) for other in runs[-1]):
            runs.append([])
        runs[-1].append(crop)
    return runs


def _overlap(one: tuple[slice, slice], other: tuple[slice, slice]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def whole_crop(shape: tuple[int, int], size: int = 512, advice: str = "Use --fit crop") -> Crop:
    """The square around a whole picture of `shape` (height, width), which lies in its middle.

    `advice` says in an error what to do.

    Raises:
        InputError: the picture would be reduced to less than one latent cell across.
    """
    height, width = shape
    side = max(height, width)
    crop = Crop(-((side - width) // 2), -((side - height) // 2), side)
    _check(crop, shape, size, advice)
    return crop


def _check(crop: Crop, shape: tuple[int, ...], size: int, advice: str) -> None:
    for part in _inside(crop, shape):
        first, last = _span(part, crop.side, size)
        if last - first < _MIN_PIXELS:
            raise InputError(
                f"a square of {crop.side} pixels, brought to {size}, would leave {max(0, last - first)} "
                f"pixels of the shorter side of a {shape[1]}x{shape[0]} picture; expected {_MIN_PIXELS} or "
                f"more. {advice}."
            )


def _regions(mask: BoolArray, cell: int) -> Boxes:
    """Exact bounding boxes of the mask's pixels, grouped by 8-connected cells of cell x cell pixels."""
    height, width = mask.shape
    rows, columns = np.arange(0, height, cell), np.arange(0, width, cell)
    by_row = np.logical_or.reduceat(mask, columns, axis=1)  # [H, w]: is any pixel of the cell's row set
    by_column = np.logical_or.reduceat(mask, rows, axis=0)  # [h, W]
    cells = np.logical_or.reduceat(by_row, rows, axis=0)  # [h, w]
    y, x = np.nonzero(cells)
    if not len(y):
        raise ValueError("the mask is empty")
    number = np.full((cells.shape[0] + 1, cells.shape[1] + 2), -1, np.intp)  # a margin for the neighbours
    number[y, x + 1] = np.arange(len(y))
    pairs = [(np.arange(len(y)), number[y + down, x + 1 + right]) for down, right in ((0, 1), (1, -1), (1, 0), (1, 1))]
    first, second = np.concatenate([np.stack(pair) for pair in pairs], axis=1)
    joined = second >= 0
    top, bottom = _extents(by_row, cell)
    left, right = _extents(by_column.T, cell)
    boxes = np.stack([top[y, x], left[x, y], bottom[y, x], right[x, y]], axis=1)
    return _merged(boxes, connected(len(y), first[joined], second[joined]))


def _extents(occupied: BoolArray, cell: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """First and last (exclusive) True along axis 0 within each cell: occupied [N, m] -> two of [n, m]."""
    blocks = -(-len(occupied) // cell)
    padded = np.zeros((blocks * cell, occupied.shape[1]), bool)
    padded[: len(occupied)] = occupied
    cells = padded.reshape(blocks, cell, -1)  # [n * cell, m] -> [n, cell, m]
    origin = np.arange(0, blocks * cell, cell)[:, None]
    return origin + cells.argmax(axis=1), origin + cell - cells[:, ::-1].argmax(axis=1)


def _merged(boxes: Boxes, label: npt.NDArray[np.intp]) -> Boxes:
    """One box around the boxes of each label, in order of the labels."""
    names, group = np.unique(label, return_inverse=True)
    merged = np.empty((len(names), 4), np.intp)
    merged[:, :2], merged[:, 2:] = np.iinfo(np.intp).max, 0
    np.minimum.at(merged[:, :2], group, boxes[:, :2])
    np.maximum.at(merged[:, 2:], group, boxes[:, 2:])
    return merged


def _squares(boxes: Boxes, shape: tuple[int, ...], smallest: int, context: float) -> Boxes:
    extent = boxes[:, 2:] - boxes[:, :2]  # [n, 2]
    side = np.ceil(extent.max(axis=1) * (1 + 2 * context)).astype(np.intp)
    side = np.clip(side, smallest, max(shape))
    corner = (boxes[:, :2] + boxes[:, 2:] - side[:, None]) // 2
    room = np.array(shape) - side[:, None]  # below 0 where the square is larger than the picture
    corner = np.where(room < 0, room // 2, np.clip(corner, 0, np.maximum(room, 0)))
    return np.concatenate([corner, corner + side[:, None]], axis=1)


def _reaching(squares: Boxes, boxes: Boxes) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Pairs (i, j) of which square i reaches into box j."""
    first, second = [], []
    top, left, bottom, right = boxes.T
    for index, square in enumerate(squares):
        inside = (top < square[2]) & (left < square[3]) & (bottom > square[0]) & (right > square[1])
        inside[index] = False
        found = np.flatnonzero(inside)
        first.append(np.full(len(found), index))
        second.append(found)
    return np.concatenate(first), np.concatenate(second)


def window(crop: Crop, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a picture of `shape` that lie inside the crop."""
    (top, bottom), (left, right) = _inside(crop, shape)
    return slice(crop.top + top, crop.top + bottom), slice(crop.left + left, crop.left + right)


def to_network(
    rgb: npt.NDArray[np.uint8], crop: Crop, shape: tuple[int, int], size: int = 512
) -> npt.NDArray[np.uint8]:
    """A crop's window, uint8 [h, w, 3], as the network sees the crop: [size, size, 3].

    Lanczos resampling, none where the crop has the network's size; reflection beyond the picture.
    """
    inside = _inside(crop, shape)
    spans = [_span(part, crop.side, size) for part in inside]
    scale = crop.side / size
    (top, bottom), (left, right) = (
        (first * scale - start, last * scale - start) for (first, last), (start, _) in zip(spans, inside, strict=True)
    )
    rows, columns = (last - first for first, last in spans)
    resized = resize_rgb(rgb, (rows, columns), (left, top, right, bottom))
    return resized[np.ix_(*(_reflected(span, size) for span in spans))]


def mask_to_network(mask: BoolArray, crop: Crop, shape: tuple[int, int], size: int = 512) -> BoolArray:
    """The mask of a crop's window, bool [h, w], as `to_network`: [size, size], True where any pixel is."""
    for axis, part in enumerate(_inside(crop, shape)):
        span = _span(part, crop.side, size)
        # Each network pixel takes the pixels from its edge to the next one's; when enlarging, its edge's own.
        edges = np.arange(*span) * crop.side // size - part[0]
        edges[0] = 0
        reduced = np.logical_or.reduceat(mask, edges, axis=axis)
        mask = np.take(reduced, _reflected(span, size), axis=axis)
    return mask


def from_network(generated: npt.NDArray[Any], crop: Crop, shape: tuple[int, int]) -> npt.NDArray[Any]:
    """The way back: [size, size, 3], uint8 or float32 in 0..255, to the crop's window, [h, w, 3]."""
    (top, bottom), (left, right) = _inside(crop, shape)
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


def _inside(crop: Crop, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and columns of a crop that lie in the picture, (first, last exclusive), from its corner."""
    return (
        (max(0, -crop.top), min(crop.side, shape[0] - crop.top)),
        (max(0, -crop.left), min(crop.side, shape[1] - crop.left)),
    )


def _span(part: tuple[int, int], side: int, size: int) -> tuple[int, int]:
    """First and last (exclusive) network pixel wholly inside the part of a crop that is in the picture."""
    return -(-part[0] * size // side), part[1] * size // side


def _reflected(span: tuple[int, int], size: int) -> npt.NDArray[np.intp]:
    """For each network pixel, which pixel of the span it shows, from 0: itself or its mirror image."""
    first, last = span
    period = 2 * (last - first - 1)
    offset = np.abs(np.arange(size) - first) % period
    return np.where(offset < last - first, offset, period - offset)
