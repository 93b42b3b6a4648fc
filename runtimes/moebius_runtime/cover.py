"""A greedy cover of cells by the parts that squares of one size own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from moebius_runtime.cells import IntArray
from moebius_runtime.masks import BoolArray

Rect = tuple[slice, slice]


def covered(
    seeds: BoolArray,
    side: int,
    margin: int,
    numbers: IntArray | None = None,
    boxes: IntArray | None = None,
    fits: BoolArray | None = None,
) -> Iterator[Rect]:
    """Rectangles that cover all seeds, greedily: what a square of side x side cells owns inside its margins.

    The first seed in reading order has to be inside, together with its region where that fits; nothing lies above
    it, so the rectangle starts there. Sideways it takes the place that holds the most seeds. The caller sets the seeds
    that it takes to False before the next rectangle is made; the first one must be among them.

    Args:
        seeds: bool [h, w], of the picture's cells.
        side, margin: in cells. At the picture's edges there is no margin.
        numbers, boxes: of the seeds' regions, see `components`.
        fits: bool [n + 1], which regions must not be cut.
    """
    height, width = seeds.shape
    places = np.flatnonzero(seeds)
    flat = seeds.reshape(-1)  # a view: it follows what the caller sets
    at = 0
    while True:
        while at < len(places):  # the next seed that is left
            left = flat[places[at : at + 1024]]
            if left.any():
                at += int(left.argmax())
                break
            at += 1024
        if at >= len(places):
            return
        y, x = divmod(int(places[at]), width)
        top, first, bottom, last = y, x, y + 1, x + 1
        if numbers is not None and boxes is not None and fits is not None and fits[numbers[y, x]]:
            top, first, bottom, last = boxes[numbers[y, x]].tolist()
        upper, lower = (edge[-1] for edge in _placements(top, bottom, height, side, margin))
        starts, ends = _placements(first, last, width, side, margin)
        columns = seeds[upper:lower, starts[0] : ends[-1]].sum(axis=0)
        held = np.concatenate([[0], np.cumsum(columns)])
        best = int((held[ends - starts[0]] - held[starts - starts[0]]).argmax())
        yield slice(int(upper), int(lower)), slice(int(starts[best]), int(ends[best]))


def _placements(low: int, high: int, length: int, side: int, margin: int) -> tuple[IntArray, IntArray]:
    """What a window of `side` cells owns along an axis of `length` cells, wherever that holds low to high.

    Returns:
        first and last (exclusive) cell of each placement, [n] each, both growing.
    """
    room = max(0, length - side)
    start = np.arange(min(max(0, high + margin - side), room), min(max(0, low - margin), room) + 1)
    first = np.where(start == 0, 0, start + margin)
    last = np.where(start == room, length, start + side - margin)
    return first, last
