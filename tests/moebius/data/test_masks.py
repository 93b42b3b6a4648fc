from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from moebius.data.masks import HOLES, MaskSettings, painted_mask, training_mask
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
        {"painted": -0.1},
        {"painted": 1.1},
        {"side": 31},
        {"side": 256, "box_side": (30, 237)},
    ],
)
def test_refusals(bad):
    with pytest.raises(DataError, match="expected"):
        MaskSettings(**bad)


def test_masks_that_cannot_be_drawn_are_refused():
    with pytest.raises(DataError, match="allow more"):
        masks(1, 64, MaskSettings(most=1e-6))


def painted(count: int, size: int, settings: MaskSettings) -> np.ndarray:
    return np.stack([painted_mask(np.random.Generator(np.random.PCG64([5, i])), size, settings) for i in range(count)])


def test_painted_masks_lie_everywhere_and_are_as_large_as_the_settings_say():
    settings = HOLES["painted"]
    drawn = painted(400, 128, settings)
    assert (drawn.any((1, 2))).mean() > 0.97  # a curve may leave the picture
    where = drawn.mean(0)
    blocks = where.reshape(8, 16, 8, 16).mean((1, 3))
    assert blocks.min() > 0.001  # in the corners least
    assert blocks[1:-1, 1:-1].min() > 0.01
    small, large = replace(settings, box_side=(20, 30), width=8), replace(settings, box_side=(120, 128), width=80)
    assert painted(200, 128, small).mean() < 0.25 * painted(200, 128, large).mean()


def test_painted_masks_are_one_piece_for_each_stroke_or_blob():
    """Curves, scribbles and blobs are connected: as many pieces as strokes, or fewer where they touch."""
    cv2 = pytest.importorskip("cv2")
    for strokes in (1, 3):
        drawn = painted(60, 256, replace(HOLES["painted"], strokes=strokes))
        pieces = [cv2.connectedComponents(mask.astype(np.uint8))[0] - 1 for mask in drawn]
        assert max(pieces) <= strokes


def test_a_share_of_the_masks_is_painted():
    """With painted 1 no mask is LaMa's, with 0 all are, and the seed then gives the masks of version 0.1."""
    settings = HOLES["small"]
    plain = masks(40, 96, settings)
    np.testing.assert_array_equal(plain, masks(40, 96, replace(settings, painted=0.0)))
    with_boxes = replace(settings, strokes=1, width=6, length=11)
    assert masks(60, 256, with_boxes).sum((1, 2)).max() > 15 * 15
    assert masks(60, 256, replace(with_boxes, painted=1.0, box_side=(1, 1))).sum((1, 2)).max() < 15 * 15


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_crop_has_masks_as_large_as_its_picture(share):
    """In pixels: a crop of 128 pixels of a picture of 512 has masks of the lengths that 512 pixels have."""
    settings = MaskSettings(strokes=1, width=30, length=40, boxes=1, box_side=(20, 40), most=1.0, painted=share)
    whole = masks(200, 512, settings).sum((1, 2))
    part = masks(200, 128, replace(settings, side=128)).sum((1, 2))  # some of it is cut off at the border
    assert 0.6 * np.median(whole) < np.median(part) < 1.2 * np.median(whole)


def test_the_fingerprint_of_old_settings_is_that_of_version_0_1():
    old = {name: value for name, value in asdict(MaskSettings()).items() if name not in ("painted", "side")}
    assert MaskSettings().drawing() == repr(sorted(old.items()))
    drawings = {settings.drawing() for settings in (MaskSettings(), MaskSettings(painted=0.5), MaskSettings(side=640))}
    assert len(drawings) == 3
