"""Scales, zero points and INT8 weights of quantized layers, as `moebius_export.graph.int8_bodies` defines them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moebius_export.graph.int8_bodies import PACKED

Array = np.ndarray
Range = tuple[float, float]
LEVELS = 255


@dataclass(frozen=True)
class Int8Product:
    """Weights int8 [outputs, inputs]; scale and offset float32 [outputs]."""

    weight: Array
    scale: Array
    offset: Array


def step_of(limits: Range) -> tuple[float, float]:
    """The scale of a range in 255 levels, and its zero point, an integer from 0 to 255.

    The range is extended to include 0, so that the padding of a convolution and the zeros of a ReLU are exact.
    """
    low, high = min(limits[0], 0.0), max(limits[1], 0.0)
    step = max(high - low, 1e-30) / LEVELS
    return step, float(np.clip(np.round(-low / step), 0, LEVELS))


def quantizer(limits: Range, channels: int, factors: Array | None) -> tuple[Array, Array]:
    """`inverse` and `zero` of an activation, float32 [channels], with its division by `factors` [channels]."""
    step, zero = step_of(limits)
    worth = step * (np.ones(channels) if factors is None else np.asarray(factors, np.float64))
    return (1 / worth).astype(np.float32), np.full(channels, zero, np.float32)


def int8_product(matrix: Array, bias: Array | None, limits: Range, factors: Array | None) -> Int8Product:
    """The INT8 weights of a product, symmetric, and the scale and offset of its integer sums after `quantizer`.

    Args:
        matrix: float32 [outputs, inputs].
        bias: float32 [outputs] or None.
        limits: of the activation, after its division by `factors`.
        factors: float [inputs] or None.
    """
    step, zero = step_of(limits)
    wide = matrix.astype(np.float64)
    if factors is not None:
        wide = wide * np.asarray(factors, np.float64)
    largest = np.abs(wide).max(axis=1)
    scale = np.where(largest > 0, largest, 1.0) / 127
    weight = np.clip(np.round(wide / scale[:, None]), -127, 127).astype(np.int8)
    worth = scale * step
    offset = -worth * zero * weight.sum(axis=1, dtype=np.int64)
    if bias is not None:
        offset = offset + bias
    return Int8Product(weight, worth.astype(np.float32), offset.astype(np.float32))


def packed(weight: Array) -> Array:
    """int8 [outputs, inputs] -> [ceil(outputs / 16), inputs / 4, 16, 4], zeros after the last output."""
    outputs, inputs = weight.shape
    rows = np.zeros((-(-outputs // PACKED) * PACKED, inputs), np.int8)
    rows[:outputs] = weight
    return np.ascontiguousarray(rows.reshape(-1, PACKED, inputs // 4, 4).transpose(0, 2, 1, 3))


def merged_kernels(weight: Array) -> Array:
    """3x3 kernels [outputs, inputs, 3, 3] after a nearest x2 upsampling -> [4, outputs, inputs, 2, 2].

    Row 2i + a of the result reads two rows of the small picture; columns likewise. Position 2a + b holds the sums of
    the taps that read the same small pixel (see `moebius_export.rules.subpixel`).
    """

    def halves(kernels: Array, axis: int) -> tuple[Array, Array]:
        first, middle, last = np.split(kernels, 3, axis)
        return np.concatenate([first, middle + last], axis), np.concatenate([first + middle, last], axis)

    return np.stack([both for rows in halves(weight, 2) for both in halves(rows, 3)])
