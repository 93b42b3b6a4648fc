"""Notes about a mask that probably does not mean what its user wants. They are text only and change no pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from moebius_runtime.masks import BoolArray
from moebius_runtime.pictures import Picture

_MOST = 0.75  # share of the picture above which a mask is usually inverted
_STRONG = 24.0  # grey levels between neighbours
_AMONG_PLAIN = 3.0  # times the median difference a few pixels outside
_SHARE = 0.25  # of the mask's border
_BESIDE = 4  # pixels outside the border where the picture's own texture is measured
_MOST_PAIRS = 200_000


def mask_notes(picture: Picture, mask: BoolArray, grown: BoolArray) -> list[str]:
    """Notes on the mask of a picture, one sentence each.

    Args:
        picture: what is filled.
        mask: bool [H, W], as it was given.
        grown: bool [H, W], as it is filled.
    """
    notes = []
    share = float(mask.mean())
    if share > _MOST:
        notes.append(
            f"the mask marks {share:.0%} of the picture; if black marks what to fill, invert the mask (white is filled)"
        )
    if strong := edge_share(picture, grown):
        notes.append(
            f"an edge of the picture runs along {strong:.0%} of the mask's border, so what is removed may leave its "
            "outline; mark it more widely, or grow the mask by more pixels (mask-dilate)"
        )
    if picture.alpha is not None:
        below = picture.alpha[mask]
        part = float((below < np.iinfo(below.dtype).max).mean())
        if part:
            notes.append(
                f"{part:.0%} of the masked pixels are transparent or partly transparent and stay so: colours are "
                "replaced, alpha is kept"
            )
    return notes


def edge_share(picture: Picture, mask: BoolArray) -> float:
    """Share of the mask's border that lies on a strong edge of the picture; 0 where it is under a quarter.

    A pair of neighbours across the border is on an edge where its luma differs by 24 levels or more, and by three
    times the median difference of such pairs a few pixels outside: texture on both sides is no edge.
    """
    rows, columns = (
        slice(max(0, found[0] - _BESIDE - 3), found[-1] + _BESIDE + 4)
        for found in (np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0)))
    )
    pixels, mask = picture.pixels[rows, columns], mask[rows, columns]
    picture = replace(picture, pixels=pixels, alpha=None if picture.alpha is None else picture.alpha[rows, columns])
    across, beside = [], []
    for turned in (False, True):
        area = mask.T if turned else mask
        row, column = np.nonzero(area[:-1] != area[1:])  # pairs (row, row + 1)
        if len(row) > _MOST_PAIRS:
            chosen = np.linspace(0, len(row) - 1, _MOST_PAIRS).astype(np.intp)
            row, column = row[chosen], column[chosen]
        outward = np.where(area[row, column], 1, -1)  # the masked one is above, or below
        outer = row + (outward > 0)
        further = outer + outward * _BESIDE
        inside = (further >= 1) & (further < len(area) - 1)
        inside[inside] &= ~area[further[inside], column[inside]]
        across.append(np.abs(_luma(picture, row, column, turned) - _luma(picture, row + 1, column, turned)))
        a, b = further[inside], column[inside]
        beside.append(np.abs(_luma(picture, a, b, turned) - _luma(picture, a - outward[inside], b, turned)))
    steps, plain = np.concatenate(across), np.concatenate(beside)
    if not len(steps):
        return 0.0
    usual = float(np.median(plain)) if len(plain) else 0.0
    share = float((steps > max(_STRONG, _AMONG_PLAIN * usual)).mean())
    return share if share >= _SHARE else 0.0


def _luma(
    picture: Picture, row: npt.NDArray[np.intp], column: npt.NDArray[np.intp], turned: bool
) -> npt.NDArray[np.float32]:
    """0 to 255, [n], of the pixels (row, column), or (column, row) where `turned`; invisible ones are black."""
    where = (column, row) if turned else (row, column)
    values = picture.pixels[where].astype(np.float32) / np.float32(np.iinfo(picture.pixels.dtype).max / 255)
    rgb = np.array([0.299, 0.587, 0.114], np.float32)
    luma: npt.NDArray[np.float32] = values @ rgb if picture.mode == "RGB" else values.mean(axis=1)
    return luma if picture.alpha is None else np.where(picture.alpha[where] == 0, np.float32(0), luma)
