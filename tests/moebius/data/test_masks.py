from __future__ import annotations

import numpy as np
import pytest

from moebius.data.masks import MaskSettings, training_mask
from moebius.errors import DataError


def masks(count: int, size: int, settings: MaskSettings | None = None, seed: int = 0) -> np.ndarray:
    return np.stack(
        [training_mask(np.random.Generator(np.random.PCG64([seed, i])), size, settings) for i in range(count)]
    )


def test_shares():
    drawn = masks(300, 128)
    shares = drawn.mean((1, 2))
    assert drawn.dtype == np.bool_
    assert shares.min() > 0
    assert shares.max() <= 0.5
    assert 0.2 < shares.mean() < 0.35
    assert shares.std() > 0.1
    where = drawn.mean(0)  # holes come everywhere
    assert where.min() > 0.05


def test_lengths_scale_with_the_picture():
    small, large = masks(150, 64).mean(), masks(150, 256).mean()
    assert abs(small - large) < 0.05


def test_widths_are_bounded():
    """No stroke is wider than asked: a square of that side, and a little more, fits into no hole of one segment."""
    settings = MaskSettings(strokes=1, width=40, boxes=0)
    wide = 0
    for mask in masks(60, 512, settings):
        inner = mask.copy()
        for _ in range(26):  # erodes by 26 pixels on every side: 53 and more across
            inner = inner[1:-1, 1:-1] & inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        wide += bool(inner.any())
    assert wide <= 6  # where segments of a polyline lie side by side


def test_boxes():
    settings = MaskSettings(strokes=1, width=6, length=11, boxes=2, box_side=(100, 120))
    drawn = masks(200, 512, settings)
    areas = drawn.sum((1, 2))
    with_box = areas >= 100 * 100
    assert 0.13 < with_box.mean() < 0.34  # three in thirteen
    assert areas.max() <= 2 * 120 * 120
    assert not drawn[:, :10].any(axis=(1, 2))[with_box].any()  # the margin


def test_seeded():
    np.testing.assert_array_equal(masks(5, 96), masks(5, 96))
    assert not np.array_equal(masks(1, 96), masks(1, 96, seed=1))


@pytest.mark.parametrize("size", [16, 33, 100, 768])
def test_sizes(size):
    drawn = masks(10, size)
    assert drawn.shape == (10, size, size)
    assert (drawn.mean((1, 2)) > 0).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"strokes": 0},
        {"width": 5},
        {"length": 10},
        {"boxes": -1},
        {"box_side": (0, 10)},
        {"box_side": (20, 10)},
        {"box_side": (1, 493)},
        {"most": 0.0},
        {"most": 1.1},
    ],
)
def test_refusals(bad):
    with pytest.raises(DataError, match="expected"):
        MaskSettings(**bad)


def test_masks_that_cannot_be_drawn_are_refused():
    with pytest.raises(DataError, match="allow more"):
        masks(1, 64, MaskSettings(most=1e-6))
