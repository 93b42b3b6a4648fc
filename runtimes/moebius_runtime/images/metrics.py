"""Similarity of two pictures inside a mask: PSNR and SSIM; and the share of saturated values. Needs NumPy only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import InputError

BoolArray = npt.NDArray[np.bool_]

# Wang et al. 2004, section III-B: an 11 x 11 Gaussian window of 1.5 pixels, and the two constants' K.
_RADIUS, _SIGMA = 5, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(
    reference: npt.NDArray[Any], candidate: npt.NDArray[Any], mask: BoolArray | None = None, peak: float = 255.0
) -> float:
    """Peak signal-to-noise ratio in dB over all channels of the masked pixels; infinite for equal pictures.

    Args:
        reference: [H, W] or [H, W, C] of any real type.
        candidate: of the same shape.
        mask: bool [H, W], True = counts; None counts every pixel.
        peak: the largest value a pixel can have.

    Raises:
        InputError: the shapes differ, or the mask is empty.
    """
    first, second = _pair(reference, candidate)
    chosen = _mask(mask, first)
    error = float(np.mean(np.square(first[chosen] - second[chosen])))
    return math.inf if error == 0 else 10 * math.log10(peak * peak / error)


def ssim(
    reference: npt.NDArray[Any], candidate: npt.NDArray[Any], mask: BoolArray | None = None, peak: float = 255.0
) -> float:
    """Structural similarity, the mean of `ssim_map` over all channels of the masked pixels.

    At the mask's edge the window reaches outside of the mask, where two fillings of one picture are equal.
    Arguments and errors are those of `psnr`.
    """
    values = ssim_map(reference, candidate, peak)
    return float(values[_mask(mask, values)].mean())


def ssim_map(reference: npt.NDArray[Any], candidate: npt.NDArray[Any], peak: float = 255.0) -> npt.NDArray[np.float64]:
    """The SSIM index of every pixel and channel, float64 of the pictures' shape.

    Wang, Bovik, Sheikh and Simoncelli 2004, equation 13, with statistics under a Gaussian window (equations 14 to
    16); beyond the border the picture is continued by its mirror image. Arguments and errors are those of `psnr`.
    """
    x, y = _pair(reference, candidate)
    mean_x, mean_y = _blurred(x), _blurred(y)
    variance_x = _blurred(x * x) - mean_x * mean_x
    variance_y = _blurred(y * y) - mean_y * mean_y
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    structure: npt.NDArray[np.float64] = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return luminance * structure


def saturated_share(picture: npt.NDArray[np.uint8], mask: BoolArray | None = None) -> float:
    """The share of the masked pixels' values that are 0 or 255, where an overflowing decoder ends up; 0 to 1.

    Args:
        picture: uint8 [H, W] or [H, W, C].
        mask: as for `psnr`.
    """
    values = picture[_mask(mask, picture)]
    return float(np.mean((values == 0) | (values == 255)))


def _pair(
    reference: npt.NDArray[Any], candidate: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    if reference.shape != candidate.shape or reference.ndim not in (2, 3):
        raise InputError(
            f"the pictures are {list(reference.shape)} and {list(candidate.shape)}; expected two of one shape, "
            "[height, width] or [height, width, channels]"
        )
    return reference.astype(np.float64), candidate.astype(np.float64)


def _mask(mask: BoolArray | None, picture: npt.NDArray[Any]) -> BoolArray:
    if mask is None:
        return np.ones(picture.shape[:2], bool)
    if mask.dtype != np.bool_ or mask.shape != picture.shape[:2]:
        raise InputError(
            f"the mask is {mask.dtype} {list(mask.shape)}; expected bool of the pictures' {list(picture.shape[:2])}"
        )
    if not mask.any():
        raise InputError("the mask marks no pixel to compare")
    return mask


def _blurred(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Under the Gaussian window, along both axes of the picture."""
    offsets = np.arange(-_RADIUS, _RADIUS + 1)
    window = np.exp(-0.5 * (offsets / _SIGMA) ** 2)
    window /= window.sum()
    for axis in (0, 1):
        margin = [(_RADIUS, _RADIUS) if axis == other else (0, 0) for other in range(values.ndim)]
        padded = np.pad(values, margin, mode="symmetric")
        length = values.shape[axis]
        blurred = np.zeros_like(values)
        for start, weight in enumerate(window.tolist()):
            blurred += weight * np.take(padded, range(start, start + length), axis=axis)
        values = blurred
    return values
