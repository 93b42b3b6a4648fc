"""Operations on cells, each against a slow form that is obvious."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from moebius_runtime.cells import components, coverage, dilated, eroded, opened, thickness

grids = st.tuples(st.integers(1, 12), st.integers(1, 12)).flatmap(
    lambda shape: st.one_of(arrays(bool, shape), arrays(bool, shape, elements=st.integers(0, 9).map(lambda n: n > 0)))
)


def squares(cells: np.ndarray, side: int):
    """Corners of all squares of True cells."""
    height, width = cells.shape
    for y in range(height - side + 1):
        for x in range(width - side + 1):
            if cells[y : y + side, x : x + side].all():
                yield y, x


def flood(cells: np.ndarray) -> np.ndarray:
    numbers, count = np.zeros(cells.shape, int), 0
    for seed in zip(*np.nonzero(cells), strict=True):
        if numbers[seed]:
            continue
        count += 1
        pending = [seed]
        while pending:
            y, x = pending.pop()
            if 0 <= y < cells.shape[0] and 0 <= x < cells.shape[1] and cells[y, x] and not numbers[y, x]:
                numbers[y, x] = count
                pending += [(y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    return numbers


@settings(max_examples=100, deadline=None)
@given(grids, st.integers(1, 5))
def test_erosion_opening_dilation_and_thickness(cells, side):
    corners = np.zeros((max(0, cells.shape[0] - side + 1), max(0, cells.shape[1] - side + 1)), bool)
    inside, near = np.zeros_like(cells), np.zeros_like(cells)
    for y, x in squares(cells, side):
        corners[y, x] = True
        inside[y : y + side, x : x + side] = True
    for y, x in zip(*np.nonzero(cells), strict=True):
        near[max(0, y - side) : y + side + 1, max(0, x - side) : x + side + 1] = True
    assert np.array_equal(eroded(cells, side), corners)
    assert np.array_equal(opened(cells, side), inside)
    assert np.array_equal(dilated(cells, side), near)
    assert thickness(cells) == max((n for n in range(1, 13) if any(squares(cells, n))), default=0)


@settings(max_examples=100, deadline=None)
@given(grids)
def test_components_are_those_of_a_flood_fill(cells):
    numbers, boxes = components(cells)
    assert np.array_equal(numbers, flood(cells))
    assert len(boxes) == numbers.max() + 1
    for number in range(1, len(boxes)):
        rows, columns = np.nonzero(numbers == number)
        assert boxes[number].tolist() == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]


@pytest.mark.parametrize("cell", [1, 3, 16, 255, 256, 300])
def test_coverage_counts_pixels(cell):
    mask = np.random.default_rng(0).random((310, 530)) > 0.1
    mask[:256, :256] = True
    counted = coverage(mask, cell)
    for row in range(counted.shape[0]):
        for column in {0, 1, counted.shape[1] // 2, counted.shape[1] - 1} & set(range(counted.shape[1])):
            part = mask[row * cell : (row + 1) * cell, column * cell : (column + 1) * cell]
            assert counted[row, column] == np.count_nonzero(part)
    assert counted.sum() == np.count_nonzero(mask)
