"""Masks, True = fill: read from pictures, grown, and brought to latent size."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime.errors import InputError
from moebius_runtime.pictures import NamedBytes, Picture, load_picture

BoolArray = npt.NDArray[np.bool_]
_HALF = 128  # the lowest grey value whose share of 255 is 0.5 or more


def load_mask(
    path: str | Path | NamedBytes,
    size: tuple[int, int],
    *,
    invert: bool = False,
    dilate: int = 0,
    resize: bool = False,
) -> BoolArray:
    """The mask of a picture of `size` (height, width): bool [H, W], True = fill. See `mask_from_picture`."""
    return mask_from_picture(load_picture(path), size, invert=invert, dilate=dilate, resize=resize, name=str(path))


def mask_from_picture(
    picture: Picture,
    size: tuple[int, int],
    *,
    invert: bool = False,
    dilate: int = 0,
    resize: bool = False,
    name: str = "the mask",
    hints: bool = True,
) -> BoolArray:
    """White fills: grey of 0.5 and more is True; then `invert`, then growth by `dilate` pixels.

    Colour counts by its luma. Transparent parts (alpha under 0.5) are not filled, whatever their colour. A
    mask with transparent parts is refused where its opaque ones hold no white, or are not mainly black and
    white: it may be a picture with a hole, or mean the hole by its transparency.

    Args:
        picture: the mask as a picture.
        size: height and width of the picture that it belongs to.
        invert: black fills; transparent parts are then filled.
        dilate: pixels to grow by in each direction, diagonally too.
        resize: bring a mask of another size to `size`, by nearest neighbour.
        name: what error messages call it.
        hints: error messages name the options of `moebius-inpaint` that help.

    Raises:
        InputError: another size without `resize`, a transparent mask of unclear meaning, or a mask that marks
            nothing or everything.
    """
    if dilate < 0:
        raise InputError(f"--mask-dilate is {dilate}; expected 0 or more pixels.")
    if picture.shape != size and not resize:
        raise InputError(
            f"{name} is {picture.shape[1]}x{picture.shape[0]} pixels and the picture {size[1]}x{size[0]}; "
            f"they must agree.{' Use --resize-mask to fit the mask to the picture.' if hints else ''}"
        )
    grey = _grey(picture)
    mask = grey >= _HALF
    if picture.alpha is not None:
        opaque = picture.alpha >= (_HALF if picture.bits == 8 else _HALF * 256)
        if not opaque.all():
            _check_transparent(grey[opaque], name)
            mask &= opaque
    if mask.shape != size:
        resized = Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)
        mask = np.asarray(resized).astype(bool)
    if invert:
        mask = ~mask
    if dilate:
        mask = _dilated(mask, dilate)
    if not mask.any():
        advice = " Use --invert-mask if black does." if hints else ""
        raise InputError(f"{name} marks no pixel; white marks what to fill.{advice}")
    if mask.all():
        advice = " Use --invert-mask if black does, or a smaller --mask-dilate." if hints else ""
        raise InputError(
            f"{name} marks every pixel, which leaves nothing to fill from; white marks what to fill.{advice}"
        )
    return mask


def _grey(picture: Picture) -> npt.NDArray[np.uint8]:
    """Luma of each pixel (ITU-R BT.601), uint8 [H, W]; 128 and more is 0.5 and more at 16 bits too."""
    rgb = picture.to_rgb()
    return rgb[:, :, 0] if picture.mode == "L" else np.asarray(Image.fromarray(rgb).convert("L"))


def _check_transparent(visible: npt.NDArray[np.uint8], name: str) -> None:
    advice = "Save the mask without transparency: white to fill, black to keep."
    if not (visible >= _HALF).any():
        raise InputError(f"{name} has transparent parts and no white ones; what to fill is unclear. {advice}")
    if ((visible > 31) & (visible < 224)).mean() > 0.25:
        raise InputError(f"{name} has transparent parts and looks like a picture, not a mask. {advice}")


def _dilated(mask: BoolArray, pixels: int) -> BoolArray:
    """True wherever the square of 2 * pixels + 1 around holds True; works on the mask's bounding box only."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return mask
    top, left = max(0, rows[0] - pixels), max(0, columns[0] - pixels)
    bottom, right = rows[-1] + 1 + pixels, columns[-1] + 1 + pixels
    grown: BoolArray = mask.copy()
    part = grown[top:bottom, left:right]  # a view
    _spread(part, pixels)
    _spread(part.T, pixels)
    return grown


def _spread(mask: BoolArray, pixels: int) -> None:
    """In place, along axis 0: each True reaches `pixels` further both ways, in steps that double."""
    for view in (mask, mask[::-1]):
        reached = 0
        while reached < pixels:
            step = min(reached + 1, pixels - reached)
            view[step:] |= view[:-step].copy(order="K")
            reached += step


def reduce_mask(
    mask: BoolArray, latent_size: tuple[int, int], mode: Literal["nearest", "max"] = "nearest"
) -> tuple[npt.NDArray[np.float32], str | None]:
    """A mask at latent size, float32 [h, w] of 0 and 1, and a note for the user when some of it is not seen.

    "nearest" takes the top-left pixel of each block (the reference), "max" any pixel of it. Where nearest
    would lose a whole region of the mask (8-connected), max takes its place and the note says so.

    Raises:
        ValueError: the mask's sides are not multiples of the latent's.
    """
    (height, width), (rows, columns) = mask.shape, latent_size
    if height % rows or width % columns:
        raise ValueError(f"mask {height}x{width} is not a multiple of latent {rows}x{columns}")
    tall, wide = height // rows, width // columns
    blocks = mask.reshape(rows, tall, columns, wide)  # [H, W] -> [h, tall, w, wide]
    pooled = blocks.max(axis=(1, 3)).astype(np.float32)
    if mode == "max":
        return pooled, None
    nearest = blocks[:, 0, :, 0]
    lost = _unseen_regions(mask, tall, wide)
    if lost:
        return pooled, (
            f"{lost} region{'s' * (lost > 1)} of the mask would vanish at latent resolution; it was reduced "
            "by max instead of nearest"
        )
    unseen = int((blocks & ~nearest[:, None, :, None]).sum())
    note = (
        f"{unseen} of {int(mask.sum())} mask pixels lie in latent cells that nearest leaves unmasked "
        "(--mask-reduce max covers them)"
    )
    return nearest.astype(np.float32), note if unseen else None


def _unseen_regions(mask: BoolArray, tall: int, wide: int) -> int:
    """How many 8-connected regions hold no pixel (row, column) of multiples of (`tall`, `wide`)."""
    row, start, end, label = labelled_runs(mask)
    seen = (row % tall == 0) & ((start + wide - 1) // wide * wide < end)
    return len(np.setdiff1d(label, label[seen]))


def labelled_runs(
    mask: BoolArray,
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The runs of True of a mask's rows, in reading order, with the 8-connected region of each.

    Returns:
        row, first column, last column (exclusive) and label of each run, [n] each. A label is the index of its
        region's first run.
    """
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1)
    row, start = np.nonzero(steps == 1)  # runs of True, in reading order
    end = np.nonzero(steps == -1)[1]  # exclusive
    # A run touches those of the next row that start at or before its end and end at or after its start.
    # Starts and ends both grow in reading order, so these are neighbours in the list.
    stride = width + 2
    below = (row + 1) * stride
    first = np.searchsorted(row * stride + end, below + start, side="left")
    last = np.searchsorted(row * stride + start, below + end, side="right")
    count = np.maximum(last - first, 0)
    upper = np.repeat(np.arange(len(row)), count)
    lower = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(upper))
    return row, start, end, connected(len(row), upper, lower)


def connected(count: int, first: npt.NDArray[np.intp], second: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    """Labels [count] of the groups that the pairs (first[i], second[i]) join: the smallest member's index."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = node = parent[parent[node]]
        return node

    for one, other in zip(first.tolist(), second.tolist(), strict=True):
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return np.array([root(node) for node in range(count)], np.intp)
