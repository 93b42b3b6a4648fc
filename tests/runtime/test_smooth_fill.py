"""Smooth filling against a plain loop, and what it promises."""

from __future__ import annotations

import numpy as np
import pytest

from moebius_runtime.smooth_fill import _RELAXATIONS, fill_cells, fill_pixels


def slow_fill(values: np.ndarray, known: np.ndarray, empty: float) -> np.ndarray:
    """Push-pull with relaxation, cell by cell in float64: values [h, w], known [h, w] -> [h, w]."""
    height, width = values.shape
    if known.all():
        return values
    if max(height, width) == 1:
        return np.full((1, 1), empty)
    coarse = np.zeros((-(-height // 2), -(-width // 2)))
    some = np.zeros(coarse.shape, bool)
    for y, x in np.ndindex(coarse.shape):
        block, have = values[2 * y : 2 * y + 2, 2 * x : 2 * x + 2], known[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
        some[y, x] = have.any()
        coarse[y, x] = block[have].mean() if have.any() else 0
    coarse = slow_fill(coarse, some, empty)
    filled = values.astype(float).copy()
    for y, x in zip(*np.nonzero(~known), strict=True):
        filled[y, x] = sampled(coarse, y, x)
    for _ in range(_RELAXATIONS):
        before = np.pad(filled, 1, mode="edge")
        for y, x in zip(*np.nonzero(~known), strict=True):
            filled[y, x] = (before[y, x + 1] + before[y + 2, x + 1] + before[y + 1, x] + before[y + 1, x + 2]) / 4
    return filled


def sampled(coarse: np.ndarray, y: int, x: int) -> float:
    """Bilinear: 3/4 of the own cell and 1/4 of the nearer adjacent one, along each axis."""
    total = 0.0
    for row, row_share in ((y // 2, 0.75), (y // 2 + (1 if y % 2 else -1), 0.25)):
        for column, share in ((x // 2, 0.75), (x // 2 + (1 if x % 2 else -1), 0.25)):
            inside = min(max(row, 0), coarse.shape[0] - 1), min(max(column, 0), coarse.shape[1] - 1)
            total += row_share * share * coarse[inside]
    return total


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 2), (7, 5), (16, 16), (19, 33)])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_cells_against_a_plain_loop(height, width, share):
    rng = np.random.RandomState(height * width)
    cells = rng.standard_normal((1, 4, height, width)).astype(np.float32)
    unknown = rng.rand(height, width) < share
    filled = fill_cells(cells, unknown)
    assert filled.dtype == np.float32
    for band in range(4):
        values = np.where(unknown, 0, cells[0, band]).astype(float)
        expected = slow_fill(values, ~unknown, 0.0)
        assert np.abs(filled[0, band] - expected).max() < 2e-6  # float32 against float64
    assert np.array_equal(filled[:, :, ~unknown], cells[:, :, ~unknown])


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 8), (21, 30), (64, 47)])
def test_pixels_against_a_plain_loop(height, width):
    rng = np.random.RandomState(width)
    pixels = rng.randint(0, 256, (height, width, 3)).astype(np.uint8)
    unknown = rng.rand(height, width) < 0.7
    filled = fill_pixels(pixels, unknown)
    assert np.array_equal(filled[~unknown], pixels[~unknown])
    coarse_shape = (-(-height // 2), -(-width // 2))
    for band in range(3):
        coarse, some = np.zeros(coarse_shape), np.zeros(coarse_shape, bool)
        for y, x in np.ndindex(coarse_shape):
            part = np.s_[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            some[y, x] = (~unknown[part]).any()
            coarse[y, x] = pixels[part][..., band][~unknown[part]].mean() if some[y, x] else 0
        coarse = slow_fill(coarse, some, 127.5)
        expected = np.array([sampled(coarse, y, x) for y, x in zip(*np.nonzero(unknown), strict=True)])
        # Rounded to whole levels, and float32 may round the other way.
        assert np.abs(filled[unknown][:, band] - expected).max(initial=0) < 0.5 + 1e-4


@pytest.mark.parametrize("value", [0, 255, 77])
def test_hidden_values_have_no_influence_and_a_flat_picture_stays_flat(value):
    rng = np.random.RandomState(1)
    pixels, unknown = np.full((90, 70, 3), 201, np.uint8), np.zeros((90, 70), bool)
    unknown[:60, 20:] = True
    pixels[unknown] = rng.randint(0, 256, (unknown.sum(), 3))
    pixels[0, 69] = value
    assert (fill_pixels(pixels, unknown) == 201).all()


def test_nothing_known_is_mid_grey_and_nothing_unknown_is_a_copy():
    pixels = np.random.RandomState(0).randint(0, 256, (33, 20, 3)).astype(np.uint8)
    assert (fill_pixels(pixels, np.ones((33, 20), bool)) == 128).all()
    copied = fill_pixels(pixels, np.zeros((33, 20), bool))
    assert np.array_equal(copied, pixels)
    assert copied is not pixels
    cells = np.ones((1, 4, 8, 8), np.float32)
    assert (fill_cells(cells, np.ones((8, 8), bool)) == 0).all()
    assert fill_cells(cells, np.zeros((8, 8), bool)) is not cells


def test_a_gradient_is_continued():
    """A slope of 1 level a pixel across a hole 40 pixels wide: within 3 levels of the plane that it lies in."""
    y, x = np.mgrid[:120, :120]
    pixels = np.stack([40 + x, 200 - y, 60 + (x + y) // 2], axis=2).astype(np.uint8)
    unknown = np.zeros((120, 120), bool)
    unknown[40:80, 40:80] = True
    filled = fill_pixels(np.where(unknown[..., None], np.uint8(0), pixels), unknown)
    assert np.abs(filled.astype(int) - pixels).max() <= 3
