"""Masks, True = fill: read from pictures, grown, and brought to latent size."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime.errors import InputError
from moebius_runtime.pictures import INVERSE_ORIENTATION, NamedBytes, Picture, load_picture

BoolArray = npt.NDArray[np.bool_]
Orientation = Literal["upright", "stored"]
Hints = Literal["options", "arguments", "none"]
_HALF = 128  # the lowest grey value whose share of 255 is 0.5 or more
_SWAPPED = (5, 6, 7, 8)  # EXIF orientations that exchange width and height


def load_mask(
    path: str | Path | NamedBytes,
    size: tuple[int, int],
    *,
    invert: bool = False,
    resize: bool = False,
    orientation: Orientation = "upright",
    rotation: int = 1,
) -> BoolArray:
    """The mask of a picture of `size` (height, width): bool [H, W], True = fill. See `mask_from_picture`."""
    picture = load_picture(path)
    return mask_from_picture(
        picture, size, invert=invert, resize=resize, orientation=orientation, rotation=rotation, name=str(path)
    )


def mask_from_picture(
    picture: Picture,
    size: tuple[int, int],
    *,
    invert: bool = False,
    resize: bool = False,
    orientation: Orientation = "upright",
    rotation: int = 1,
    name: str = "the mask",
    hints: Hints = "options",
) -> BoolArray:
    """White fills: grey of 0.5 and more is True; then `invert`.

    Colour counts by its luma. Transparent parts (alpha under 0.5) are not filled, whatever their colour. A
    mask with transparent parts is refused where its opaque ones hold no white, or are not mainly black and
    white: it may be a picture with a hole, or mean the hole by its transparency.

    Args:
        picture: the mask as a picture.
        size: height and width of the picture that it belongs to, upright.
        invert: black fills; transparent parts are then filled.
        resize: bring a mask of another size, but of the same aspect ratio, to `size`, by nearest neighbour.
        orientation: `upright`: the mask belongs to the picture as it is seen. `stored`: to its pixels as they are
            stored, before the picture's EXIF rotation, which then turns the mask too.
        rotation: EXIF orientation (1 to 8) of the picture that the mask belongs to.
        name: what error messages call it.
        hints: error messages name the options of `moebius-inpaint` that help, or the Python API's arguments, or none.

    Raises:
        InputError: another size without `resize`, another aspect ratio, a transparent mask of unclear meaning, or a
            mask that marks nothing or everything.
    """
    if orientation not in get_args(Orientation):
        raise InputError(f"mask-orientation {orientation!r}: expected one of {', '.join(get_args(Orientation))}")
    if orientation == "stored":
        picture = picture.turned(INVERSE_ORIENTATION[picture.orientation]).turned(rotation)
    if picture.shape != size:
        _check_size(picture, size, rotation, resize, name, hints)
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
    if not mask.any():
        raise InputError(f"{name} marks no pixel; white marks what to fill. {_cure(picture, invert, hints)}")
    if mask.all():
        advice = _advice(hints, " Use --invert-mask if black does.", " Invert it if black does.")
        raise InputError(
            f"{name} marks every pixel, which leaves nothing to fill from; white marks what to fill.{advice}"
        )
    return mask


def _advice(hints: Hints, options: str, arguments: str) -> str:
    return {"options": options, "arguments": arguments, "none": ""}[hints]


def _check_size(picture: Picture, size: tuple[int, int], rotation: int, resize: bool, name: str, hints: Hints) -> None:
    """Refuses a mask of another size than `size`, unless `resize` may bring it there without distortion."""
    (height, width), (tall, wide) = picture.shape, size
    sizes = f"{name} is {width}x{height} pixels and the picture {wide}x{tall}"
    if rotation in _SWAPPED and _alike((width, height), size):
        stored = _advice(
            hints,
            " Use --mask-orientation stored to turn the mask the same way.",
            ' Give mask_orientation="stored" to turn the mask the same way.',
        )
        raise InputError(
            f"{sizes}: the photograph is rotated (EXIF orientation {rotation}), and the mask has the shape of its "
            f"{tall}x{wide} stored pixels.{stored}"
        )
    if not resize:
        fits = (
            " Use --resize-mask to fit the mask to the picture."
            if _alike(picture.shape, size)
            else (" Their aspect ratios differ, so draw the mask on this picture.")
        )
        raise InputError(f"{sizes}; they must agree.{_advice(hints, fits, ' Give a mask of the size of the picture.')}")
    if not _alike(picture.shape, size):
        raise InputError(
            f"{sizes}: resizing would distort it, as the aspect ratios differ ({width / height:.3f} and "
            f"{wide / tall:.3f}), and mark another place. Give a mask of the whole picture, not of a part of it."
        )


def _alike(shape: tuple[int, int], size: tuple[int, int]) -> bool:
    """Whether a mask of `shape` may be a whole picture of `size` resized: each side off by at most a pixel."""
    (height, width), (tall, wide) = shape, size
    smaller, larger = (shape, size) if height * width < tall * wide else (size, shape)
    # Exact sides of the smaller are those of the larger over one scale, each rounded by less than a pixel.
    low = max(other / (side + 1) for side, other in zip(smaller, larger, strict=True))
    high = min(other / (side - 1) for side, other in zip(smaller, larger, strict=True))
    return low < high


def _cure(picture: Picture, inverted: bool, hints: Hints) -> str:
    """What helps against a mask that marks nothing, found from its values."""
    grey = _luma(picture)
    top = int(np.iinfo(picture.pixels.dtype).max)
    if picture.alpha is not None:
        grey = grey[picture.alpha > 0]
    if inverted:
        return _advice(hints, "Leave --invert-mask out if white does.", "Do not invert it if white does.")
    brightest = int(grey.max()) if grey.size else 0
    if 0 < brightest <= top // 2:
        return (
            f"Its brightest value is {brightest} of {top}, and values from {top // 2 + 1} up are white. Multiply its "
            f"values by {top // brightest} and save it again."
        )
    if not brightest:
        return "Its brightest value is 0: all of it is black." + _advice(
            hints, " Use --invert-mask if black marks what to fill.", " Mark pixels in white."
        )
    return "Its white pixels are too thin or too transparent to be seen at the size of the picture."


def _luma(picture: Picture) -> npt.NDArray[np.float32]:
    """Luma in the picture's own range, [H, W]."""
    luma: npt.NDArray[np.float32] = _grey(picture) * np.float32(1 if picture.bits == 8 else 257)
    if picture.mode != "CMYK":
        weights = [0.299, 0.587, 0.114] if picture.mode == "RGB" else [1.0]
        luma = (picture.pixels.astype(np.float32) @ np.array(weights, np.float32)).round()  # [H, W, C] -> [H, W]
    return luma


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


def grown_mask(mask: BoolArray, dilation: int | Literal["auto"]) -> BoolArray:
    """The mask grown by `dilation` pixels; `auto`: by `automatic_dilation`, unless that leaves nothing to fill from.

    Raises:
        InputError: a mask grown by a given number of pixels marks everything.
    """
    grown = dilated(mask, automatic_dilation(mask.shape) if dilation == "auto" else dilation)
    if not grown.all():
        return grown
    if dilation == "auto":
        return mask
    raise InputError(
        f"the mask, grown by {dilation} pixels, marks every pixel, which leaves nothing to fill from; "
        "expected a smaller mask-dilate"
    )


def automatic_dilation(shape: tuple[int, ...]) -> int:
    """Pixels by which a mask drawn tightly misses its object's soft edge: 2, and 1 for every 500 of the longer side, at
    most 16."""
    return min(16, 2 + max(shape) // 500)


def dilated(mask: BoolArray, pixels: int) -> BoolArray:
    """True wherever the square of 2 * pixels + 1 around holds True; works on the mask's bounding box only."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows) or not pixels:
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
