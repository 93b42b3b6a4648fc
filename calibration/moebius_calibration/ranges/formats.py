"""INT8 and FP8 numbers for TensorRT: symmetric, zero point 0, one scale per output channel for weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from moebius_calibration.plan import Target

Array = np.ndarray

_SMALLEST = 1e-12  # of a scale, where everything is 0


@dataclass(frozen=True)
class Format:
    """An 8-bit number format: its type, and the largest magnitude that is used."""

    name: str
    dtype: Any
    largest: float

    @property
    def zero(self) -> Array:
        """The zero point, a scalar array."""
        return np.array(0, self.dtype)


INT8 = Format("INT8", np.dtype(np.int8), 127.0)
FP8 = Format("FP8", np.dtype(ml_dtypes.float8_e4m3fn), 448.0)
"""E4M3 of Micikevicius et al., "FP8 Formats for Deep Learning" (2022): no infinity; beyond 448 it saturates here."""

FORMATS: Mapping[Target, Format] = MappingProxyType({"tensorrt": INT8, "tensorrt-fp8": FP8, "ort-cpu": INT8})


def activation_scale(low: float, high: float, number_format: Format = INT8) -> float:
    """The scale of an activation with this range."""
    return max(max(-low, high) / number_format.largest, _SMALLEST)


def weight_scales(weight: Array, axis: int | None, number_format: Format = INT8) -> Array:
    """The scales of a weight: float32 [outputs] along `axis`, or a scalar array for the whole tensor."""
    if axis is None:
        return np.array(max(float(np.abs(weight).max()) / number_format.largest, _SMALLEST), np.float32)
    others = tuple(index for index in range(weight.ndim) if index != axis)
    largest = np.abs(weight).max(axis=others)
    return (np.where(largest > 0, largest, number_format.largest * _SMALLEST) / number_format.largest).astype(
        np.float32
    )


def as_bytes(weight: Array, scales: Array, axis: int | None, number_format: Format = INT8) -> Array:
    """The quantized weight, in its shape, rounded to nearest, ties to even."""
    scaled = np.clip(weight / along(scales, weight.ndim, axis), -number_format.largest, number_format.largest)
    return (np.rint(scaled) if number_format is INT8 else scaled).astype(number_format.dtype)


def along(values: Array, rank: int, axis: int | None) -> Array:
    """A vector, reshaped to that rank so that it broadcasts along one axis."""
    if axis is None:
        return values
    return values.reshape([-1 if index == axis else 1 for index in range(rank)])


def smooth_factors(activation: Array, weights: Sequence[Array], alpha: float) -> Array:
    """SmoothQuant's factors, float32 [channels]: activations are divided by them, weights multiplied.

    Xiao et al., "SmoothQuant" (ICML 2023), equation 4.

    Args:
        activation: largest magnitude of each channel, [channels].
        weights: largest magnitude of each input channel, [channels], of every weight that reads the activation.
        alpha: strength: 0 leaves the activations, 1 moves their whole spread into the weights.
    """
    of_weights = np.maximum(np.max(np.stack(weights), axis=0), 1e-5)
    factors = np.maximum(activation, 1e-5) ** alpha / of_weights ** (1 - alpha)
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)  # only their ratios matter
