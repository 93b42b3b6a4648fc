"""Finds the squares that the network fills from a mask, and the order to fill them in.

A square near the network's own size loses no detail, so regions are covered by squares of that size wherever possible:

1. The mask is counted in cells of 1/32 of the network's side. Everything after that works on cells.
2. Thick parts, where a solid square of more than a quarter of the network's side fits in, are found from the thickest
   to the thinnest by morphological opening. A compact one (at most four times as long as thick) gets one square. A
   longer one is covered by overlapping squares along its length.
3. All the rest, specks and thin lines, is covered by squares of the network's size. Each covers as much as it can: a
   greedy cover in reading order. Regions that fit into a square are never cut.

Every square owns a part of the mask, and no mask pixel has two owners. What else of the mask lies in its window is
unknown to it until another square has filled it. Only the mask decides, never the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import InputError
from moebius_runtime.images.masks import BoolArray
from moebius_runtime.regions.cells import IntArray, components, coverage, dilated, eroded, opened, thickness
from moebius_runtime.regions.cover import Rect, covered
from moebius_runtime.regions.crop import Crop, largest_side, window

_CELLS = 32  # across a square of the network's size
_MARGIN = 8  # of a square's side stays free around thin parts, where the picture has it: 1/8
_THIN = 4  # thin is what is at most 1/4 of the network's side thick
_COMPACT = 4  # a region at most so many times as long as thick is filled in one square
_SCALES = (1.0, 1.5, 2.0)  # sides of squares for thin parts, in network's sides; the next where there are too many
_NEARLY = 1.25  # a picture of at most so many network's sides is one square
_UNKNOWN = 0.6  # a square of which more is unknown waits for the squares around it


@dataclass(frozen=True, eq=False)
class Square:
    """A crop, and the part of the mask that it fills: the mask's pixels in some cells.

    Attributes:
        crop: where it lies.
        cell: side of a cell in pixels; cells are counted from the picture's corner.
        corner: row and column of the first cell.
        cells: bool [h, w], which cells it owns.
    """

    crop: Crop
    cell: int
    corner: tuple[int, int]
    cells: BoolArray

    def own(self, mask: BoolArray) -> BoolArray:
        """The mask's pixels that this square fills, bool [h, w] of the crop's window. `mask` is the whole, [H, W]."""
        view = window(self.crop, (mask.shape[0], mask.shape[1]))
        area = [
            slice(max(part.start, first * self.cell), min(part.stop, (first + count) * self.cell))
            for part, first, count in zip(view, self.corner, self.cells.shape, strict=True)
        ]
        inner = tuple(
            slice(part.start - outer.start, part.stop - outer.start) for part, outer in zip(area, view, strict=True)
        )
        owned = np.zeros((view[0].stop - view[0].start, view[1].stop - view[1].start), bool)
        owned[inner] = mask[area[0], area[1]]
        if not self.cells.all():
            inside = tuple(
                slice(part.start - first * self.cell, part.stop - first * self.cell)
                for part, first in zip(area, self.corner, strict=True)
            )
            owned[inner] &= self.cells.repeat(self.cell, axis=0).repeat(self.cell, axis=1)[inside]
        return owned


def whole_square(crop: Crop, shape: tuple[int, int]) -> Square:
    """A square that owns all of the mask of a picture of `shape`."""
    return Square(crop, max(shape), (0, 0), np.ones((1, 1), bool))


def find_squares(mask: BoolArray, size: int = 512, limit: int | None = None) -> list[Square]:
    """Squares that fill all of the mask, in the order to fill them in.

    Squares of thin parts and specks have the side `size`, or up to twice that where there would be more than `limit`.
    A thick region (see the module) of length L and thickness t gets a square of the side L + max(t, size / 4). Every
    square is moved into the picture, and is at most as large as the picture's longer side. It has pixels of the
    picture on all sides of what it owns, at least 1/12 of its side less a cell, except where the picture ends.

    The order puts first what has the most known surroundings; `apart` gives what can be filled at the same time.

    Args:
        mask: bool [H, W], not empty.
        size: the network's side in pixels; no square is smaller, unless the picture is.
        limit: the most squares.

    Raises:
        ValueError: the mask is empty.
        InputError: more than `limit` squares are needed.
    """
    if not mask.any():
        raise ValueError("the mask is empty")
    finder = _Finder(mask, size)
    for scale in _SCALES:
        count = finder.find(scale)
        if limit is None or count <= limit:
            return finder.squares()
    raise InputError(
        f"the mask needs {count} squares of the network, more than the limit of {limit}; raise the limit "
        f"(--max-squares {count}, max_squares in Python), mark less, or shrink the picture (--fit whole)."
    )


def find_crops(mask: BoolArray, size: int = 512) -> list[Crop]:
    """The crops of `find_squares`, in its order."""
    return [square.crop for square in find_squares(mask, size)]


def apart(squares: list[Square], shape: tuple[int, int]) -> list[list[Square]]:
    """The squares in their order, cut into runs in which no two share a pixel of the picture.

    The squares of a run do not see what the others fill, so they can go through the network together.
    """
    edges = _edges([square.crop for square in squares], shape)
    runs: list[list[Square]] = []
    first = 0
    for index, square in enumerate(squares):
        if index == first or _overlaps(edges[index], edges[first:index]).any():
            runs.append([])
            first = index
        runs[-1].append(square)
    return runs


def _edges(crops: list[Crop], shape: tuple[int, int]) -> IntArray:
    """Windows of crops, [n, 4]: top, left, bottom, right; the last two exclusive."""
    views = [window(crop, shape) for crop in crops]
    return np.array([(rows.start, columns.start, rows.stop, columns.stop) for rows, columns in views], np.intp)


def _overlaps(one: IntArray, others: IntArray) -> BoolArray:
    meet: BoolArray = np.all((others[:, :2] < one[2:]) & (one[:2] < others[:, 2:]), axis=1)
    return meet


class _Finder:
    """The search for squares in one mask."""

    def __init__(self, mask: BoolArray, size: int) -> None:
        self.mask, self.size = mask, size
        self.shape = (mask.shape[0], mask.shape[1])
        self.largest = largest_side(self.shape, size)
        self.base = min(size, self.largest)  # the side at scale 1
        self.cell = max(1, self.base // _CELLS)
        self.count = coverage(mask, self.cell)  # [h, w]
        self.marked = self.count > 0
        height, width = (np.diff(np.append(np.arange(0, side, self.cell), side)) for side in self.shape)
        self.pixels = height[:, None] * width  # [h, w]
        self.todo = self.marked.copy()  # cells without an owner
        self.found: list[Square] = []  # of thick parts
        self.thin: list[Square] = []  # of the rest; they all have one side, and their crops are placed at the end
        self.side = self.base

    def find(self, scale: float) -> int:
        """Shares out all cells; squares of thin parts are `scale` times the network's size. Returns their number."""
        self.todo, self.found = self.marked.copy(), []
        self._thick(scale)
        self._thin(scale)
        return len(self.found) + len(self.thin)

    def squares(self) -> list[Square]:
        """What `find` found, in the order to fill them in."""
        return self._ordered([*self.found, *(self._placed(piece, self.side) for piece in self.thin)])

    # --- thick parts ----------------------------------------------------------------------------------------

    def _thick(self, scale: float) -> None:
        solid = 2 * self.count >= self.pixels
        thinnest = self.base // _THIN // self.cell + 1  # cells; a thick part holds a solid square of this side
        if not (seeds := eroded(solid, thinnest)).any():
            return
        numbers, boxes = components(self.marked)
        for number in np.unique(numbers[: seeds.shape[0], : seeds.shape[1]][seeds]).tolist():
            top, left, bottom, right = boxes[number]
            view = (slice(top, bottom), slice(left, right))
            self._thick_region(view, numbers[view] == number, solid[view], thinnest, scale)
        # What is left over at the end of a long region may be thin. It is given back, to share a square.
        thin = [square for square in self.found if thickness(square.cells) < thinnest]
        for square in thin:
            self.todo[self._rect(square)] |= square.cells
        self.found = [square for square in self.found if square not in thin]

    def _thick_region(self, view: Rect, region: BoolArray, solid: BoolArray, thinnest: int, scale: float) -> None:
        """Takes the thick parts out of a connected region, thickest first. Arrays are of the region's box, [h, w]."""
        todo = self.todo[view]
        while (thick := thickness(region & solid & todo)) >= thinnest:
            # Bumps and tails of less than a quarter of the thickness are not part of the core.
            reach = max(thinnest, thick // 4)
            numbers, boxes = components(opened(region & solid & todo, reach))
            for number, (top, left, bottom, right) in enumerate(boxes[1:].tolist(), 1):
                core = numbers == number
                across = thickness(core[top:bottom, left:right])
                if max(bottom - top, right - left) <= _COMPACT * across:
                    near = (
                        slice(max(0, top - reach), bottom + reach),
                        slice(max(0, left - reach), right + reach),
                    )
                    self._own(_shifted(near, view), region[near] & todo[near], across)
                    continue
                seeds = np.zeros_like(self.todo)
                seeds[view] = dilated(core, reach) & region & todo
                side, margin = self._tile(across, scale)
                for rect in covered(seeds, side, margin):
                    seeds[rect] = False
                    inner = _clipped(rect, view)
                    self._own(_shifted(inner, view), region[inner] & todo[inner], across, side * self.cell)

    def _tile(self, across: int, scale: float) -> tuple[int, int]:
        """Side and margin, in cells, of the squares along a region `across` cells thick.

        What a square owns is about twice as long as the region is thick, unless the square would be over twice the
        network's size; the margins are together as wide as the region.
        """
        thick, base = (across + 2) * self.cell, self.base  # it may fill some of a cell on either side
        own = max(thick, min(max(2 * thick, int(scale * (base - base // _THIN))), 2 * base - thick))
        margin = -(-max(thick, base // _THIN) // 2 // self.cell)
        return -(-own // self.cell) + 2 * margin, margin

    def _own(self, rect: Rect, cells: BoolArray, across: int, largest: int | None = None) -> None:
        """Adds a square that owns cells of a rectangle of the picture's cells, which are `across` cells thick.

        `largest` bounds its side, in pixels: at the picture's edge a square may own more than inside.
        """
        if not cells.any():
            return
        self.todo[rect] &= ~cells
        piece = self._piece(rect, cells)
        top, left, bottom, right = self._extent(piece)
        long, short = max(bottom - top, right - left), min(bottom - top, right - left)
        side = long + max(min((across + 2) * self.cell, short), self.base // _THIN)
        self.found.append(self._placed(piece, side if largest is None else min(side, largest)))

    # --- specks and thin parts ------------------------------------------------------------------------------

    def _thin(self, scale: float) -> None:
        longest = min(max(self.shape), self.largest)
        side = min(max(self.base, int(scale * self.base)), longest)
        if longest <= _NEARLY * self.base:
            side = longest
        cells, margin = -(-side // self.cell), -(-side // _MARGIN // self.cell)
        if any(side < length <= cells * self.cell for length in self.shape):
            cells -= 1  # rounded up it would seem to reach both edges of the picture, where no margin is left
        numbers, boxes = components(self.todo)
        # A region that fits is given to one square as a whole; a larger one may be cut at any cell.
        fits = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) <= cells - 2 * margin
        for index, square in enumerate(self.found):
            if square.crop.side <= 2 * self.base:
                rect = self._inset(square.crop)
                taken = self._whole(rect, numbers, boxes, fits)
                if taken.any():
                    self.todo[rect] &= ~taken
                    self.found[index] = self._joined(square, self._piece(rect, taken), square.crop)
        pieces = []
        for rect in covered(self.todo, cells, margin, numbers, boxes, fits):
            taken = self._whole(rect, numbers, boxes, fits)
            self.todo[rect] &= ~taken
            pieces.append(self._piece(rect, taken))
        self.thin, self.side = self._merged(pieces, cells - 2 * margin), side

    def _whole(self, rect: Rect, numbers: IntArray, boxes: IntArray, fits: BoolArray) -> BoolArray:
        """The cells of a rectangle without an owner, less those of regions that fit a square but are cut here."""
        todo, number = self.todo[rect], numbers[rect]
        here = np.unique(number[todo])
        box = boxes[here]
        cut = (box[:, 0] < rect[0].start) | (box[:, 1] < rect[1].start)
        cut |= (box[:, 2] > rect[0].stop) | (box[:, 3] > rect[1].stop)
        refused = here[cut & fits[here]]
        taken: BoolArray = todo & ~np.isin(number, refused)
        return taken

    def _inset(self, crop: Crop) -> Rect:
        """The cells of a crop that leave the margin to its sides, those at the picture's edges excepted."""
        margin = crop.side // _MARGIN
        slices = []
        for part, length in zip(window(crop, self.shape), self.shape, strict=True):
            first = 0 if part.start == 0 else -(-(part.start + margin) // self.cell)
            last = -(-length // self.cell) if part.stop == length else (part.stop - margin) // self.cell
            slices.append(slice(first, max(first, last)))
        return slices[0], slices[1]

    def _merged(self, pieces: list[Square], own: int) -> list[Square]:
        """Joins pieces, in order, that together are at most `own` cells wide and high."""
        boxes = np.array([(*p.corner, p.corner[0] + p.cells.shape[0], p.corner[1] + p.cells.shape[1]) for p in pieces])
        alive = np.ones(len(pieces), bool)
        for index in range(len(pieces)):
            while alive[index]:
                low = np.minimum(boxes[index, :2], boxes[:, :2])
                high = np.maximum(boxes[index, 2:], boxes[:, 2:])
                together = alive & ((high - low).max(axis=1) <= own)
                together[: index + 1] = False
                if not together.any():
                    break
                other = int(together.argmax())
                pieces[index] = self._joined(pieces[index], pieces[other], pieces[index].crop)
                boxes[index], alive[other] = np.concatenate([low[other], high[other]]), False
        return [piece for piece, kept in zip(pieces, alive.tolist(), strict=True) if kept]

    # --- squares from cells ---------------------------------------------------------------------------------

    def _rect(self, piece: Square) -> Rect:
        first, second = (slice(at, at + n) for at, n in zip(piece.corner, piece.cells.shape, strict=True))
        return first, second

    def _piece(self, rect: Rect, cells: BoolArray) -> Square:
        """A square of those cells, cut to their bounding box; its crop is not placed yet."""
        rows, columns = np.flatnonzero(cells.any(axis=1)), np.flatnonzero(cells.any(axis=0))
        cut = cells[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].copy()
        corner = (int(rect[0].start + rows[0]), int(rect[1].start + columns[0]))
        return Square(Crop(0, 0, 0), self.cell, corner, cut)

    def _joined(self, one: Square, other: Square, crop: Crop) -> Square:
        low = np.minimum(one.corner, other.corner)
        high = np.maximum(np.add(one.corner, one.cells.shape), np.add(other.corner, other.cells.shape))
        cells = np.zeros(tuple(high - low), bool)
        for piece in (one, other):
            top, left = np.subtract(piece.corner, low)
            cells[top : top + piece.cells.shape[0], left : left + piece.cells.shape[1]] |= piece.cells
        return Square(crop, self.cell, (int(low[0]), int(low[1])), cells)

    def _extent(self, piece: Square) -> tuple[int, int, int, int]:
        """The bounding box of the mask's pixels in a piece's cells: top, left, bottom, right."""
        top, left = (first * self.cell for first in piece.corner)
        bottom, right = (
            min(length, (first + count) * self.cell)
            for length, first, count in zip(self.shape, piece.corner, piece.cells.shape, strict=True)
        )
        crop = Crop(left, top, max(bottom - top, right - left))
        own = Square(crop, piece.cell, piece.corner, piece.cells).own(self.mask)
        rows, columns = np.flatnonzero(own.any(axis=1)), np.flatnonzero(own.any(axis=0))
        return top + int(rows[0]), left + int(columns[0]), top + int(rows[-1]) + 1, left + int(columns[-1]) + 1

    def _placed(self, piece: Square, side: int) -> Square:
        """The piece with a crop around its pixels, moved into the picture where that has room."""
        side = min(max(side, self.base), max(self.base, self.largest))
        top, left, bottom, right = self._extent(piece)
        corner = []
        for low, high, length in ((top, bottom, self.shape[0]), (left, right, self.shape[1])):
            room = length - side  # below 0 where the square is larger than the picture
            corner.append(room // 2 if room < 0 else min(max(0, (low + high - side) // 2), room))
        return Square(Crop(corner[1], corner[0], side), self.cell, piece.corner, piece.cells)

    # --- order ----------------------------------------------------------------------------------------------

    def _ordered(self, squares: list[Square]) -> list[Square]:
        """The squares run by run. In a run no two share a pixel of the picture, and what is best known is first.

        In each run, squares are taken by the share of their window that is still unknown. One of which more than
        `_UNKNOWN` is unknown waits, unless no other has less, so that large parts are filled from their borders.
        """
        edges = _edges([square.crop for square in squares], self.shape)
        low, high = edges[:, :2] // self.cell, -(-edges[:, 2:] // self.cell)  # in cells
        unknown, waiting = self.count.copy(), np.ones(len(squares), bool)
        share = np.array([self._share(unknown, low[i], high[i]) for i in range(len(squares))])
        order: list[int] = []
        while waiting.any():
            candidates = np.flatnonzero(waiting & (share <= max(_UNKNOWN, share[waiting].min())))
            candidates = candidates[np.lexsort((edges[candidates, 1], edges[candidates, 0], share[candidates]))]
            blocked, stale = np.zeros(len(squares), bool), np.zeros(len(squares), bool)
            for index in candidates.tolist():
                if blocked[index]:
                    continue
                near = _overlaps(edges[index], edges)
                blocked |= near
                stale |= near
                waiting[index] = False
                order.append(index)
                unknown[self._rect(squares[index])][squares[index].cells] = 0
            for index in np.flatnonzero(stale & waiting).tolist():
                share[index] = self._share(unknown, low[index], high[index])
        return [squares[index] for index in order]

    def _share(self, unknown: npt.NDArray[np.int32], low: IntArray, high: IntArray) -> float:
        area = (slice(low[0], high[0]), slice(low[1], high[1]))
        return float(unknown[area].sum() / self.pixels[area].sum())


def _shifted(rect: Rect, by: Rect) -> Rect:
    """A rectangle of the part `by` of the picture's cells, in the picture's cells."""
    first, second = (
        slice(part.start + outer.start, min(part.stop + outer.start, outer.stop))
        for part, outer in zip(rect, by, strict=True)
    )
    return first, second


def _clipped(rect: Rect, by: Rect) -> Rect:
    """The inverse of `_shifted`: a rectangle of the picture's cells, in those of the part `by`, clipped to it."""
    first, second = (
        slice(max(0, part.start - outer.start), min(part.stop, outer.stop) - outer.start)
        for part, outer in zip(rect, by, strict=True)
    )
    return first, second
