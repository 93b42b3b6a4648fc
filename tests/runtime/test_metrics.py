"""PSNR and SSIM against scikit-image, and against figures worked out by hand."""

import math

import numpy as np
import pytest

from moebius_runtime.errors import InputError
from moebius_runtime.images.metrics import psnr, saturated_share, ssim, ssim_map


def pictures(shape=(40, 53, 3), spread=12, seed=0):
    rng = np.random.RandomState(seed)
    first = rng.randint(0, 256, shape)
    second = np.clip(first + rng.randint(-spread, spread + 1, shape), 0, 255)
    return first.astype(np.uint8), second.astype(np.uint8)


def blob(shape=(40, 53)):
    mask = np.zeros(shape, bool)
    mask[8:25, 10:40] = True
    mask[20:33, 30:50] = True
    return mask


@pytest.mark.parametrize("shape", [(40, 53, 3), (31, 64), (11, 12, 1)])
@pytest.mark.parametrize("spread", [3, 90])
def test_maps_and_means_equal_scikit_image(shape, spread):
    """1e-12: the same sums in float64, in another order."""
    metrics = pytest.importorskip("skimage.metrics")
    first, second = pictures(shape, spread)
    axis = 2 if len(shape) == 3 else None
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    mean, full = metrics.structural_similarity(first, second, full=True, channel_axis=axis, **options)
    assert np.abs(ssim_map(first, second) - full).max() < 1e-12
    # Its mean leaves out a border of 5 pixels, ours does not: compared over the same pixels.
    inside = np.zeros(shape[:2], bool)
    inside[5:-5, 5:-5] = True
    assert ssim(first, second, inside) == pytest.approx(mean, abs=1e-12)
    assert ssim(first, second) == pytest.approx(full.mean(), abs=1e-12)
    assert psnr(first, second) == pytest.approx(metrics.peak_signal_noise_ratio(first, second, data_range=255))


def test_only_the_mask_counts():
    first, second = pictures()
    mask = blob()
    changed = second.copy()
    changed[~mask] = 255 - changed[~mask]
    assert psnr(first, changed, mask) == psnr(first, second, mask)
    values = ssim_map(first, second)
    assert ssim(first, second, mask) == pytest.approx(values[mask].mean(), abs=1e-15)
    assert ssim(first, second, mask) != pytest.approx(values.mean(), abs=1e-6)


def test_known_figures():
    flat = np.full((30, 30, 3), 100, np.uint8)
    assert psnr(flat, flat) == math.inf
    assert ssim(flat, flat) == 1.0
    assert psnr(flat, flat + np.uint8(1)) == pytest.approx(20 * math.log10(255), abs=1e-12)  # an error of 1 everywhere
    assert psnr(flat / 255, (flat + np.uint8(1)) / 255, peak=1.0) == pytest.approx(20 * math.log10(255), abs=1e-9)
    c1 = (0.01 * 255) ** 2  # flat pictures have no structure: what is left is the luminance term
    assert ssim(flat, flat * np.uint8(2)) == pytest.approx((2 * 100 * 200 + c1) / (100**2 + 200**2 + c1), abs=1e-12)


def test_saturated_share():
    picture = np.full((10, 10, 3), 7, np.uint8)
    picture[:5, :, 0] = 255
    picture[0, 0] = 0
    assert saturated_share(picture) == pytest.approx((50 + 2) / 300)
    lower = np.zeros((10, 10), bool)
    lower[5:] = True
    assert saturated_share(picture, lower) == 0


@pytest.mark.parametrize(
    ("second", "mask", "words"),
    [
        (np.zeros((4, 5, 3), np.uint8), None, "one shape"),
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4), bool), "marks no pixel"),
        (np.zeros((4, 4, 3), np.uint8), np.ones((4, 5), bool), "of the pictures"),
        (np.zeros((4, 4, 3), np.uint8), np.ones((4, 4), np.uint8), "expected bool"),
    ],
)
def test_what_cannot_be_compared_is_refused(second, mask, words):
    first = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(InputError, match=words):
        psnr(first, second, mask)
    with pytest.raises(InputError, match=words):
        ssim(first, second, mask)
