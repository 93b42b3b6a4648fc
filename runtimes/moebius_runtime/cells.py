"""A mask in square cells of several pixels: how full they are, which touch, and how thick their regions are."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moebius_runtime.masks import BoolArray, labelled_runs

IntArray = npt.NDArray[np.intp]


def coverage(mask: BoolArray, cell: int) -> npt.NDArray[np.int32]:
    """The number of True pixels in each cell of cell x cell pixels, bool [H, W] -> int32 [h, w].

    The last row and column of cells may be cut by the mask's edges.
    """
    height, width = mask.shape
    rows, columns = np.arange(0, height, cell), np.arange(0, width, cell)
    # Lines are added up first, in a type that holds one cell's height; `reduceat` takes 40 times as long for that.
    by_row = np.empty((len(rows), width), np.uint8 if cell < 256 else np.uint32)  # [h, W]
    for index, row in enumerate(rows.tolist()):
        np.add.reduce(mask[row : row + cell].view(np.uint8), axis=0, dtype=by_row.dtype, out=by_row[index])
    return np.add.reduceat(by_row, columns, axis=1, dtype=np.int32)


def components(cells: BoolArray) -> tuple[IntArray, IntArray]:
    """The 8-connected regions of the cells, numbered from 1 in the reading order of their first cells.

    Returns:
        the number of each cell's region, 0 where there is none, [h, w], and the regions' bounding boxes, [n + 1, 4]:
        top, left, bottom, right; the last two exclusive. Box 0 is empty.
    """
    row, start, end, label = labelled_runs(cells)
    names, number = np.unique(label, return_inverse=True)
    numbers = np.zeros(cells.shape, np.intp)
    numbers[cells] = np.repeat(number + 1, end - start)  # runs and the cells inside are both in reading order
    boxes = np.zeros((len(names) + 1, 4), np.intp)
    boxes[1:, :2] = np.iinfo(np.intp).max
    for axis, low, high in ((0, row, row + 1), (1, start, end)):
        np.minimum.at(boxes[:, axis], number + 1, low)
        np.maximum.at(boxes[:, axis + 2], number + 1, high)
    return numbers, boxes


def eroded(cells: BoolArray, side: int) -> BoolArray:
    """Where a square of side x side True cells begins: [h, w] -> [h - side + 1, w - side + 1], maybe empty."""
    if side > min(cells.shape):
        return np.zeros((max(0, cells.shape[0] - side + 1), max(0, cells.shape[1] - side + 1)), bool)
    for axis in (0, 1):
        reach = 1
        while reach < side:  # the windows of `reach` cells, in steps that double and overlap at the end
            step = min(reach, side - reach)
            line = np.moveaxis(cells, axis, 0)
            cells = np.moveaxis(line[:-step] & line[step:], 0, axis)
            reach += step
    return cells


def opened(cells: BoolArray, side: int) -> BoolArray:
    """The cells that lie in some square of side x side True cells (morphological opening), [h, w]."""
    corners = eroded(cells, side)
    height, width = cells.shape
    padded = np.zeros((height + side - 1, width + side - 1), bool)
    if corners.size:
        padded[side - 1 : side - 1 + corners.shape[0], side - 1 : side - 1 + corners.shape[1]] = corners
    return ~eroded(~padded, side)


def thickness(cells: BoolArray) -> int:
    """The side of the largest square of True cells, 0 where there is none."""
    if not cells.any():
        return 0
    low, high = 1, min(cells.shape) + 1  # a square of `low` is there, one of `high` is not
    while high - low > 1:
        middle = min((low + high) // 2, 2 * low)
        if eroded(cells, middle).any():
            low = middle
        else:
            high = middle
    return low


def dilated(cells: BoolArray, reach: int) -> BoolArray:
    """The cells within `reach` cells of a True one, diagonally too, [h, w]."""
    padded = np.pad(cells, reach)
    return ~eroded(~padded, 2 * reach + 1)
