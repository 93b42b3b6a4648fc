"""Masks: polarity, alpha, size, growth, and reduction to latent size."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from moebius_runtime.errors import InputError
from moebius_runtime.masks import (
    automatic_dilation,
    connected,
    grown_mask,
    load_mask,
    mask_from_picture,
    reduce_mask,
)
from moebius_runtime.pictures import Picture, load_picture

GOLDEN = Path(__file__).parents[1] / "golden"


def grey(*values: int, dtype: type = np.uint8) -> Picture:
    """64 x 64 in vertical stripes of the given values."""
    row = np.resize(np.array(values, dtype), 64)
    return Picture(np.repeat(row[None, :, None], 64, axis=0), "L")


def with_alpha(colour: Picture, *values: int) -> Picture:
    return Picture(colour.pixels, "L", np.repeat(np.resize(np.uint8(values), 64)[None], 64, axis=0))


def row(picture: Picture, **more: object) -> list[bool]:
    mask = mask_from_picture(picture, (64, 64), **more)  # type: ignore[arg-type]
    assert mask.dtype == bool
    assert (mask == mask[0]).all()
    return mask[0, :4].tolist()


def test_white_fills_from_one_half():
    assert row(grey(0, 127, 128, 255)) == [False, False, True, True]
    assert row(grey(0, 127, 128, 255), invert=True) == [True, True, False, False]
    # 32767.5 is one half of 65535
    assert row(grey(0, 32767, 32768, 65535, dtype=np.uint16)) == [False, False, True, True]


def test_colour_counts_by_luma():
    rgb = np.array([[0, 255, 0], [255, 0, 0], [255, 0, 255], [128, 128, 128]], np.uint8)
    pixels = np.tile(rgb[None], (64, 16, 1))
    # 0.587, 0.299, 0.413 and 0.502 of white
    assert row(Picture(pixels, "RGB")) == [True, False, False, True]


def test_transparent_parts_are_kept():
    assert row(with_alpha(grey(255, 255, 0, 0), 255, 0, 255, 0)) == [True, False, False, False]
    assert row(with_alpha(grey(255), 255, 127, 128, 0)) == [True, False, True, False]
    assert row(with_alpha(grey(255, 0), 255)) == [True, False, True, False]
    deep = grey(65535, dtype=np.uint16)
    alpha = np.repeat(np.resize(np.uint16([65535, 32767, 32768, 0]), 64)[None], 64, axis=0)
    assert row(Picture(deep.pixels, "L", alpha)) == [True, False, True, False]


def test_transparent_masks_of_unclear_meaning_are_refused():
    with pytest.raises(InputError, match="transparent parts and no white ones; what to fill is unclear"):
        row(with_alpha(grey(0), 255, 0))
    with pytest.raises(InputError, match="looks like a picture, not a mask"):
        row(with_alpha(grey(40, 90, 140, 190), 255, 255, 255, 255, 0))


def test_from_a_file_with_orientation_and_resize(tmp_path):
    marked = np.zeros((80, 120), np.uint8)
    marked[:10, :30] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(marked).save(tmp_path / "a.png", exif=exif)
    mask = load_mask(tmp_path / "a.png", (120, 80))
    assert mask[:30, -10:].all()
    assert mask.sum() == 300
    with pytest.raises(InputError, match=r"a\.png is 80x120 pixels and the picture 160x240.*--resize-mask"):
        load_mask(tmp_path / "a.png", (240, 160))
    doubled = load_mask(tmp_path / "a.png", (240, 160), resize=True)
    assert np.array_equal(doubled, mask.repeat(2, axis=0).repeat(2, axis=1))
    with pytest.raises(InputError, match="No such file"):
        load_mask(tmp_path / "b.png", (120, 80))


def test_empty_and_full_are_refused():
    for value, advice in ((0, "marks no pixel.*--invert-mask"), (255, "marks every pixel.*--invert-mask")):
        with pytest.raises(InputError, match=advice):
            row(grey(value))
        with pytest.raises(InputError):
            row(grey(255 - value), invert=True)


def test_growth_that_leaves_nothing_to_fill_from():
    mask = np.zeros((64, 64), bool)
    mask[:, :62] = True
    with pytest.raises(InputError, match=r"grown by 2 pixels, marks every pixel.*mask-dilate"):
        grown_mask(mask, 2)
    assert np.array_equal(grown_mask(mask, "auto"), mask)  # of its own accord nothing is refused
    assert grown_mask(mask, 1).sum() == 64 * 63
    assert grown_mask(mask, 0) is mask
    # 2 pixels and 1 for each 500 of the longer side, at most 16
    assert [automatic_dilation(shape) for shape in ((64, 64), (512, 400), (1080, 1920), (9, 20_000))] == [2, 3, 5, 16]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 79), st.integers(0, 63)), min_size=1, max_size=3), st.integers(0, 40))
def test_dilation_against_a_plain_loop(points, pixels):
    mask = np.zeros((80, 64), np.uint8)
    expected = np.zeros((80, 64), bool)
    for y, x in points:
        mask[y, x] = 255
        expected[max(0, y - pixels) : y + pixels + 1, max(0, x - pixels) : x + pixels + 1] = True
    if expected.all():
        return
    assert np.array_equal(grown_mask(mask > 0, pixels), expected)


# --- messages whose advice works ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("brightest", [1, 2, 3, 50, 100, 127, 255, 20_000, 32_767])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_mask_without_white_names_its_brightest_value_and_the_factor_that_helps(dtype, brightest, channels):
    top = np.iinfo(dtype).max
    if brightest > top // 2:
        return
    values = np.zeros((64, 64, channels), dtype)
    values[10:20, 30:40] = brightest
    mode = "L" if channels == 1 else "RGB"
    with pytest.raises(InputError, match=rf"Its brightest value is {brightest} of {top}") as caught:
        mask_from_picture(Picture(values, mode), (64, 64))
    factor = int(re.search(r"Multiply its values by (\d+)", str(caught.value))[1])
    followed = mask_from_picture(Picture(values * dtype(factor), mode), (64, 64))
    assert np.array_equal(followed, values[:, :, 0] > 0)


def test_an_all_black_mask_and_an_inverted_white_one():
    with pytest.raises(InputError, match=r"brightest value is 0: all of it is black\. Use --invert-mask"):
        row(grey(0))
    with pytest.raises(InputError, match=r"marks no pixel.*Leave --invert-mask out"):
        row(grey(255), invert=True)
    for hints in ("arguments", "none"):
        with pytest.raises(InputError) as caught:
            row(grey(0), hints=hints)
        assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("mask", "picture", "fits"),
    [
        ((512, 512), (480, 640), False),
        ((480, 640), (480, 480), False),
        ((341, 512), (2667, 4000), True),  # 341.4 rows, rounded down
        ((342, 512), (2667, 4000), True),  # and up
        ((338, 512), (2667, 4000), False),
        ((300, 400), (150, 200), True),
        ((301, 400), (150, 200), True),
        ((310, 400), (150, 200), False),
        ((64, 100), (100, 64), False),
    ],
)
def test_only_a_mask_of_the_same_aspect_ratio_is_resized(mask, picture, fits):
    values = np.zeros((*mask, 1), np.uint8)
    values[: mask[0] // 2] = 255
    if fits:
        resized = mask_from_picture(Picture(values, "L"), picture, resize=True)
        assert resized.shape == picture
        assert abs(resized.mean() - 0.5) < 0.01
        with pytest.raises(InputError, match="Use --resize-mask"):
            mask_from_picture(Picture(values, "L"), picture)
    else:
        with pytest.raises(InputError, match=r"the aspect ratios differ \(.*would distort|would distort it"):
            mask_from_picture(Picture(values, "L"), picture, resize=True)
        with pytest.raises(InputError, match="aspect ratios differ") as caught:
            mask_from_picture(Picture(values, "L"), picture)
        assert "--resize-mask" not in str(caught.value)  # it would not help


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [3, 5, 6, 8])
def test_a_mask_of_a_rotated_photographs_stored_pixels(tmp_path, suffix, orientation):
    """The refusal says that the photograph is rotated; its advice gives the mask that was meant."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((100, 160, 3), np.uint8)
    stored[10:30, 20:60] = 255
    Image.fromarray(stored).save(tmp_path / f"photo.{suffix}", exif=exif)
    Image.fromarray(stored[:, :, 0]).save(tmp_path / "mask.png")
    photo = load_picture(tmp_path / f"photo.{suffix}")
    assert photo.orientation == orientation
    if orientation != 3:  # which keeps the size: nothing tells the two apart
        assert photo.shape == (160, 100)
        for resize in (False, True):
            with pytest.raises(
                InputError, match=rf"is rotated \(EXIF orientation {orientation}\).*--mask-orientation stored"
            ):
                load_mask(tmp_path / "mask.png", photo.shape, rotation=photo.orientation, resize=resize)
    mask = load_mask(tmp_path / "mask.png", photo.shape, rotation=photo.orientation, orientation="stored")
    differing = mask != (photo.to_rgb()[:, :, 0] > 127)
    assert differing.mean() < (0.01 if suffix == "jpg" else 1e-9)  # JPEG's edges ring
    # Where nothing is rotated, both mean the same.
    for how in ("upright", "stored"):
        assert np.array_equal(load_mask(tmp_path / "mask.png", (100, 160), orientation=how), stored[:, :, 0] > 0)


def test_an_unknown_orientation():
    with pytest.raises(InputError, match="mask-orientation 'left': expected one of upright, stored"):
        row(grey(0, 255), orientation="left")


# --- reduction ----------------------------------------------------------------------------------------------


def test_nearest_is_the_top_left_pixel_as_in_the_golden_run():
    mask = load_mask(GOLDEN / "e2e_chelsea_mask.png", (512, 512))
    reduced, note = reduce_mask(mask, (64, 64))
    assert reduced.dtype == np.float32
    assert np.array_equal(reduced, mask[::8, ::8].astype(np.float32))
    unseen = int((mask & (np.kron(reduced, np.ones((8, 8))) == 0)).sum())
    assert note.startswith(f"{unseen} of 35250 mask pixels lie in latent cells that nearest leaves unmasked")


def test_a_mask_of_whole_cells_needs_no_note():
    mask = np.zeros((64, 64), bool)
    mask[8:24, 16:40] = True
    reduced, note = reduce_mask(mask, (8, 8))
    assert note is None
    assert reduced.sum() == 2 * 3
    assert np.array_equal(reduce_mask(mask, (8, 8), "max")[0], reduced)


def test_vanishing_regions_switch_to_max():
    mask = np.zeros((64, 64), bool)
    mask[0:20, 0:20] = True  # seen
    mask[33:40, 41:48] = True  # between the sampled pixels
    mask[60, 1:8] = True  # so too
    reduced, note = reduce_mask(mask, (8, 8))
    assert note.startswith("2 regions of the mask would vanish at latent resolution; it was reduced by max")
    expected = np.zeros((8, 8), np.float32)
    expected[:3, :3] = expected[4, 5] = expected[7, 0] = 1
    assert np.array_equal(reduced, expected)
    assert np.array_equal(reduce_mask(mask, (8, 8), "max")[0], expected)
    assert reduce_mask(mask, (8, 8), "max")[1] is None


def test_a_diagonal_contact_is_one_region():
    mask = np.zeros((64, 64), bool)
    mask[9:17, 9:17] = True  # holds (16, 16)
    mask[17:20, 17:20] = True  # touches its corner
    assert "would vanish" not in reduce_mask(mask, (8, 8))[1]
    mask[16, 16] = False
    assert reduce_mask(mask, (8, 8))[1].startswith("2 regions")


def test_sides_must_be_multiples():
    with pytest.raises(ValueError, match="not a multiple"):
        reduce_mask(np.ones((65, 64), bool), (8, 8))


@settings(max_examples=150, deadline=None)
@given(hnp.arrays(bool, (16, 24), elements=st.booleans()))
def test_vanishing_regions_against_a_flood_fill(mask):
    lost, open_pixels = 0, set(zip(*np.nonzero(mask), strict=True))
    while open_pixels:
        stack, region = [open_pixels.pop()], []
        while stack:
            y, x = stack.pop()
            region.append((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & open_pixels
            open_pixels -= near
            stack.extend(near)
        lost += not any(y % 8 == 0 and x % 8 == 0 for y, x in region)
    reduced, note = reduce_mask(mask, (2, 3))
    if lost:
        assert note.startswith(f"{lost} region{'s' if lost > 1 else ''} of the mask would vanish")
        assert np.array_equal(reduced, mask.reshape(2, 8, 3, 8).any(axis=(1, 3)))
    else:
        assert np.array_equal(reduced, mask[::8, ::8])


def test_connected():
    assert connected(6, np.array([4, 1, 5]), np.array([1, 3, 0])).tolist() == [0, 1, 2, 1, 1, 0]
    assert connected(0, np.array([], int), np.array([], int)).tolist() == []
