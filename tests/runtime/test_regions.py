"""Crops on the way to the network's size and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebius_runtime.errors import InputError
from moebius_runtime.regions import (
    Crop,
    find_crops,
    from_network,
    mask_to_network,
    resize_rgb,
    to_network,
    whole_crop,
    window,
)


def masked(shape: tuple[int, int], *boxes: tuple[int, int, int, int]) -> np.ndarray:
    """A mask with rectangles (top, left, height, width)."""
    mask = np.zeros(shape, bool)
    for top, left, height, width in boxes:
        mask[top : top + height, left : left + width] = True
    return mask


def test_elongated_pictures_are_refused_where_nothing_would_be_left():
    with pytest.raises(InputError, match=r"8000 pixels, brought to 512, would leave 4 .*--fit crop"):
        whole_crop((64, 8000))
    assert whole_crop((64, 2000)) == Crop(0, -968, 2000)


# --- to the network and back --------------------------------------------------------------------------------


def photo(height: int, width: int) -> np.ndarray:
    """Smooth, without symmetry: sines of different periods per channel."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 37 + band) + np.cos(y / (23 + band)) for band in range(3)]
    return (np.stack(waves, axis=2) * 60 + 128).astype(np.uint8)


def test_the_networks_own_size_is_not_resampled():
    rgb = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    mask = rgb[:, :, 0] > 200
    for crop in (whole_crop((512, 512)), *find_crops(mask)):
        assert crop == Crop(0, 0, 512)
        assert np.array_equal(to_network(rgb, crop, (512, 512)), rgb)
        assert np.array_equal(mask_to_network(mask, crop, (512, 512)), mask)
        assert np.array_equal(from_network(rgb, crop, (512, 512)), rgb)
        floats = rgb.astype(np.float32) / 3
        assert np.array_equal(from_network(floats, crop, (512, 512)), floats)


def test_reflection_beyond_the_picture_equals_numpy_even_several_times_over():
    rgb = np.random.default_rng(0).integers(0, 256, (64, 700, 3), np.uint8)
    crop = Crop(100, -224, 512)
    inside = window(crop, (64, 700))
    assert inside == (slice(0, 64), slice(100, 612))
    expected = np.pad(rgb[inside], ((224, 224), (0, 0), (0, 0)), mode="reflect")
    assert np.array_equal(to_network(rgb[inside], crop, (64, 700)), expected)
    mask = rgb[inside][:, :, 0] > 128
    assert np.array_equal(mask_to_network(mask, crop, (64, 700)), expected[:, :, 0] > 128)
    network = np.random.default_rng(1).integers(0, 256, (512, 512, 3), np.uint8)
    assert np.array_equal(from_network(network, crop, (64, 700)), network[224:288])


@pytest.mark.parametrize(
    ("shape", "size"), [((900, 1300), 512), ((1300, 900), 512), ((200, 150), 512), ((701, 333), 100)]
)
def test_whole_pictures_keep_their_aspect_and_place(shape, size):
    rgb, crop = photo(*shape), whole_crop(shape, size)
    network = to_network(rgb, crop, shape, size)
    assert network.shape == (size, size, 3)
    # Each network pixel inside the picture shows the picture at its own place, by the pixels' centres.
    scale = crop.side / size
    rows = (np.arange(size) + 0.5) * scale + crop.top
    columns = (np.arange(size) + 0.5) * scale + crop.left
    ys = np.flatnonzero((rows > 2 * scale) & (rows < shape[0] - 2 * scale))
    xs = np.flatnonzero((columns > 2 * scale) & (columns < shape[1] - 2 * scale))
    shown = network[np.ix_(ys, xs)].astype(int)
    nearest = rgb[np.ix_(rows[ys].astype(int), columns[xs].astype(int))].astype(int)
    # A wave of amplitude 60 and shortest period 2 pi 23 moves by 60 / 23 a pixel; half a pixel either way, in
    # x and y, and the curvature within a shrunk pixel: under 6 levels. Four pixels of shift break this.
    assert np.abs(shown - nearest).max() <= 6
    back = from_network(network, crop, shape)
    assert back.shape == rgb.shape
    # There and back loses only what the smaller size cannot hold: nothing, of these waves.
    assert np.abs(back.astype(int) - rgb).mean() < 1
    as_floats = from_network(network.astype(np.float32), crop, shape)
    assert as_floats.dtype == np.float32
    # Pillow rounds to 8 bits after each of its two passes: 0.5, times the sum of Lanczos's absolute weights
    # (up to 1.6) in the second, and 0.5 again.
    assert np.abs(as_floats - back).max() <= 1.3


def test_no_shift_in_a_shrunk_crop_inside_the_picture():
    rgb, crop = photo(1500, 1700), Crop(300, 200, 1024)
    inside = window(crop, (1500, 1700))
    network = to_network(rgb[inside], crop, (1500, 1700))
    halves = rgb[inside].reshape(512, 2, 512, 2, 3).mean(axis=(1, 3))  # [1024, 1024, 3] -> [512, 512, 3]
    assert np.abs(network - halves).max() <= 1.5  # Lanczos and the mean agree on smooth pictures, but for rounding


@settings(max_examples=100, deadline=None)
@given(
    st.integers(64, 300),
    st.integers(64, 300),
    st.sampled_from([64, 128]),
    st.integers(0, 299),
    st.integers(0, 299),
)
def test_every_mask_pixel_is_seen_by_the_network(height, width, size, y, x):
    y, x = y % height, x % width
    mask = masked((height, width), (y, x, 1, 1))
    crop = whole_crop((height, width), size)
    reduced = mask_to_network(mask, crop, (height, width), size)
    assert reduced.shape == (size, size)
    row, column = (y - crop.top + 0.5) * size / crop.side, (x - crop.left + 0.5) * size / crop.side
    ys, xs = np.nonzero(reduced)
    # Its own place is among those marked (others are reflections), within one pixel at the picture's edge.
    reach = max(1, size / crop.side)
    assert (np.maximum(np.abs(ys + 0.5 - row), np.abs(xs + 0.5 - column)) <= reach + 0.5).any()


def test_enlarged_masks_are_exact():
    mask = np.random.default_rng(0).random((64, 64)) > 0.5
    enlarged = mask_to_network(mask, Crop(0, 0, 64), (64, 64))
    assert np.array_equal(enlarged, mask.repeat(8, axis=0).repeat(8, axis=1))


def test_resize_clips_the_overshoot_of_lanczos():
    step = np.zeros((16, 16, 3), np.float32)
    step[:, 8:] = 255
    wide = resize_rgb(step, (64, 64), (0, 0, 16, 16))
    assert wide.min() == 0
    assert wide.max() == 255
