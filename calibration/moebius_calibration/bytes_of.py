"""Numbers as signed bytes: symmetric, zero point 0, a scale per output channel for weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray

LARGEST = 127
_SMALLEST = 1e-12  # of a scale, where everything is 0


def activation_scale(low: float, high: float) -> float:
    """What a level of a signed byte is worth."""
    return max(max(-low, high) / LARGEST, _SMALLEST)


def weight_scales(weight: Array, axis: int | None) -> Array:
    """What a level is worth: float32 [outputs] along `axis`, or a scalar array for the whole tensor."""
    if axis is None:
        return np.array(max(float(np.abs(weight).max()) / LARGEST, _SMALLEST), np.float32)
    others = tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others)
    return (np.where(largest > 0, largest, LARGEST * _SMALLEST) / LARGEST).astype(np.float32)


def as_bytes(weight: Array, scales: Array, axis: int | None) -> Array:
    """int8 of the weight's shape, rounded to nearest."""
    return np.clip(np.rint(weight / along(scales, weight.ndim, axis)), -LARGEST, LARGEST).astype(np.int8)


def along(values: Array, rank: int, axis: int | None) -> Array:
    """A vector as an array of that rank that broadcasts along one axis."""
    if axis is None:
        return values
    return values.reshape([-1 if index == axis else 1 for index in range(rank)])


def smooth_factors(activation: Array, weights: Sequence[Array], alpha: float) -> Array:
    """SmoothQuant's factors, float32 [channels]: activations are divided by them, weights multiplied.

    Xiao et al., "SmoothQuant" (ICML 2023), equation 4.

    Args:
        activation: largest magnitude of each channel, [channels].
        weights: largest magnitude of each input channel, [channels], of every weight that reads the activation.
        alpha: how much of the difficulty moves into the weights: 0 none, 1 all of it.
    """
    of_weights = np.maximum(np.max(np.stack(weights), axis=0), 1e-5)
    factors = np.maximum(activation, 1e-5) ** alpha / of_weights ** (1 - alpha)
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)  # only their ratios matter
