"""Pasting: the golden picture, exactness outside, colour compensation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.blend import (
    blend,
    compensate_colour,
    feather,
    hard,
    outward_feather,
    ring_width,
    weights_of,
)
from moebius_runtime.masks import dilated, load_mask
from moebius_runtime.pictures import load_picture

GOLDEN = Path(__file__).parents[1] / "golden"


def random(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def test_the_golden_picture():
    image = load_picture(GOLDEN / "e2e_chelsea_image.png").pixels
    mask = load_mask(GOLDEN / "e2e_chelsea_mask.png", image.shape[:2])
    expected = np.asarray(Image.open(GOLDEN / "e2e_chelsea_seed0_result.png"))
    decoded = np.load(GOLDEN / "e2e_chelsea_seed0.npz")["decoded"][0].transpose(1, 2, 0).astype(np.float32)
    generated = (np.clip((decoded + 1) / 2, 0, 1) * 255).astype(np.uint8)
    weights = feather(mask)
    result = blend(image, generated, weights)
    difference = np.abs(result.astype(int) - expected)
    # The decoded picture was stored as float16: 0.75 % of its values fall on the other side of a truncation.
    # Outside the mask but within the feather nothing else differs.
    assert difference.max() <= 1
    assert (difference[weights > 0] == 0).mean() > 0.993
    feathered = (weights > 0) & (weights < 255)
    assert (difference[feathered] == 0).mean() > 0.995
    assert np.array_equal(result[weights == 0], image[weights == 0])


def test_feather_is_pillows_blur_and_ends_near():
    mask = np.zeros((60, 80), bool)
    mask[25:35, 30:50] = True
    weights = feather(mask)
    assert weights.dtype == np.uint8
    # Pillow's Gaussian is three box blurs that reach 3 * (sqrt(12 * 9 / 3 + 1) / 2) = 9.1 pixels: 0 from the
    # 10th on.
    assert (weights[:15] == 0).all()
    assert (weights[:, 60:] == 0).all()
    assert weights[24, 40] > 0
    assert 0 < weights[17, 40] < 10
    # A straight edge is half way at the boundary between pixels: its neighbours sum to 255, up to rounding.
    straight = np.zeros((60, 80), bool)
    straight[:, 40:] = True
    assert abs(int(feather(straight)[30, 39]) + int(feather(straight)[30, 40]) - 255) <= 1
    assert (feather(mask, 6.0) > 0).sum() > (weights > 0).sum()
    assert np.array_equal(hard(mask), mask * np.uint8(255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_weights_zero_and_full_are_exact(dtype, channels):
    original = random(500, 700, channels, dtype=dtype)
    generated = random(500, 700, channels, dtype=dtype, seed=1)
    mask = random(500, 700, seed=2) > 128
    before = original.copy()
    result = blend(original, generated.astype(np.float32), hard(mask))
    assert result.dtype == dtype
    assert np.array_equal(original, before)
    assert np.array_equal(result[~mask], original[~mask])
    assert np.array_equal(result[mask], generated[mask])
    assert np.array_equal(blend(original, generated, np.zeros((500, 700), np.uint8)), original)


def test_the_mix_is_truncated():
    original = np.full((1, 3, 1), 10, np.uint8)
    generated = np.full((1, 3, 1), 20.0, np.float32)
    weights = np.array([[0, 51, 127]], np.uint8)  # 0, 1/5, 0.498: 10, 12 and 14.98
    assert blend(original, generated, weights).ravel().tolist() == [10, 12, 14]


def test_values_beyond_the_range_are_clipped_not_wrapped():
    original = random(4, 4, 3)
    generated = np.where(random(4, 4, 3, seed=1) > 128, 300.0, -20.0).astype(np.float32)
    result = blend(original, generated, np.full((4, 4), 255, np.uint8))
    assert np.array_equal(result, np.where(generated > 0, 255, 0))


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        blend(random(4, 4, 3), random(4, 4, 1), random(4, 4))
    with pytest.raises(ValueError, match="shapes differ"):
        blend(random(4, 4, 3), random(4, 4, 3), random(4, 5))


def test_compensation_shifts_by_the_ring_only():
    original = np.zeros((80, 90, 3), np.uint8)
    mask = np.zeros((80, 90), bool)
    mask[30:40, 40:60] = True
    ring = np.zeros((80, 90), bool)
    ring[20:50, 30:70] = True
    ring &= ~mask
    original[ring] = (100, 50, 20)
    original[20, 30:70] = (140, 50, 20)  # the 10th row above: 40 of its 1000 pixels raise red by 1.6
    original[~ring & ~mask] = 255  # far away: must not count
    original[mask] = 200  # what is to be replaced: must not count
    generated = np.full((80, 90, 3), 60, np.uint8)
    shifted = compensate_colour(generated, original, mask)
    assert shifted.dtype == np.float32
    # 1.1 times (101.6, 50, 20) - 60; float32
    np.testing.assert_allclose(shifted[35, 50], 60 + 1.1 * np.array([41.6, -10, -40]), rtol=1e-6)
    assert (shifted == shifted[0, 0]).all()


def test_the_ring_scales_with_the_square_as_the_feather_does():
    """10 pixels of the network's picture; the feather of a square of 2048 pixels at 512 reaches 4 times as far."""
    assert [ring_width(scale) for scale in (0.25, 1.0, 4.0, 11.7)] == [10, 10, 40, 117]
    mask = np.zeros((200, 200), bool)
    mask[90:110, 90:110] = True
    original = np.full((200, 200, 3), 100, np.uint8)
    original[~dilated(mask, 10)] = 180
    generated = np.full((200, 200, 3), 90, np.uint8)
    ring = dilated(mask, 40) & ~mask
    expected = 90 + 1.1 * (original[ring].mean() - 90)
    np.testing.assert_allclose(compensate_colour(generated, original, mask, ring=ring_width(4.0)), expected, rtol=1e-6)
    hidden = ~dilated(mask, 10)  # unknown pixels do not count, wherever they are
    np.testing.assert_allclose(compensate_colour(generated, original, mask, hidden, ring=40), 101.0, rtol=1e-6)


def test_weights_by_blend_and_mode():
    mask = np.zeros((64, 64), bool)
    mask[20:40, 20:40] = True
    for original in (True, False):
        assert np.array_equal(weights_of(mask, "hard", 2.0, original=original), hard(mask))
    assert np.array_equal(weights_of(mask, "soft", 2.0, original=True), feather(mask, 6.0))
    assert np.array_equal(weights_of(mask, "soft", 2.0, original=False), outward_feather(mask, 16))


def test_compensation_of_equal_or_missing_surroundings_changes_nothing():
    original = random(64, 64, 3, dtype=np.uint16)
    mask = np.zeros((64, 64), bool)
    mask[10:20, 10:20] = True
    for shown in (mask, np.ones((64, 64), bool), np.zeros((64, 64), bool)):
        assert np.array_equal(compensate_colour(original, original, shown), original.astype(np.float32))
