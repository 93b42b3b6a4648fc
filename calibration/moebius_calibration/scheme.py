"""The numbers of INT8 for the products of one graph: ranges, smoothing and shifts, made from statistics."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from moebius_calibration.bytes_of import INT8, Format, along, as_bytes, smooth_factors, weight_scales
from moebius_calibration.observers import range_of
from moebius_calibration.plan import Observer
from moebius_calibration.products import Operand, Product
from moebius_calibration.statistics import Statistics
from moebius_export.errors import ExportError

Array = np.ndarray
Range = tuple[float, float]


@dataclass(frozen=True)
class Scheme:
    """See `plan.Int8Plan` for `ranges`, `smooth` and `shifts`.

    `symmetric`: activations are bytes of `form` with zero point 0 (TensorRT); else unsigned bytes with a zero point
    (ONNX Runtime's CPU kernels), and the parts of a concatenation are brought to one scale by `smooth`.
    """

    symmetric: bool
    ranges: dict[str, Range]
    smooth: dict[str, Array] = field(default_factory=dict)
    shifts: dict[str, Array] = field(default_factory=dict)
    form: Format = INT8

    def factors(self, operand: Operand) -> Array | None:
        """What an activation is divided by, [channels]; None where by nothing."""
        return self.smooth.get(operand.source) if operand.axis is not None else None

    def smoothed(self, product: Product, weight: Array) -> Array:
        """The weight that meets the divided activation."""
        operand, of_weight = product.activations[0], product.weight
        factors = self.factors(operand)
        if factors is None or of_weight is None:
            return weight
        return (weight * along(factors, weight.ndim, summed_axis(product))).astype(np.float32)

    def parts(self, product: Product) -> list[slice]:
        """The input channels of a product that have scales of their own: all, or those of each concatenated part."""
        halves = product.activations[0].halves
        if not halves or not self.symmetric or self.factors(product.activations[0]) is not None:
            return [slice(None)]
        ends = np.cumsum([0, *(count for _, count in halves)]).tolist()
        return [slice(start, end) for start, end in pairwise(ends)]

    def quantised(self, product: Product, weight: Array) -> list[tuple[Array, Array]]:
        """Of each of the `parts` of the smoothed weight: bytes of its shape, and its scales."""
        wide = self.smoothed(product, weight)
        axis = product.weight.axis if product.weight else None
        found = []
        for part in self.parts(product):
            own = wide if part == slice(None) else wide[:, part]
            scales = weight_scales(own, axis, self.form)
            found.append((as_bytes(own, scales, axis, self.form), scales))
        return found


def summed_axis(product: Product) -> int:
    """The axis of the weight that a product sums over: its inputs."""
    if product.op_type == "Conv":
        return 1
    axis = product.weight.axis if product.weight is not None else None
    if axis is None:
        raise ExportError(f"{product.node} multiplies by no stored matrix, so it cannot be smoothed; this is a bug")
    return 1 - axis


def scheme_of(
    statistics: Statistics,
    products: Mapping[str, Product],
    observer: Observer,
    *,
    symmetric: bool,
    form: Format = INT8,
) -> Scheme:
    """Ranges by one observer, without smoothing; where not symmetric, concatenated parts get factors."""
    names = dict.fromkeys(name for product in products.values() for name in product.watched)
    ranges = {name: range_of(statistics.seen[name], observer, symmetric) for name in names}
    smooth: dict[str, Array] = {}
    for operand in (operand for product in products.values() for operand in product.activations):
        if operand.halves and not symmetric:
            spans = np.array([ranges[name][1] - ranges[name][0] for name, _ in operand.halves])
            shares = np.maximum(spans / max(float(spans.max()), 1e-30), 1e-6)
            parts = [
                np.full(count, share, np.float32) for (_, count), share in zip(operand.halves, shares, strict=True)
            ]
            smooth[operand.source] = np.concatenate(parts)
            ends = [
                (ranges[name][0] / share, ranges[name][1] / share)
                for (name, _), share in zip(operand.halves, shares, strict=True)
            ]
            ranges[operand.source] = (min(low for low, _ in ends), max(high for _, high in ends))
    return Scheme(symmetric, ranges, smooth, form=form)


def constant_activations(statistics: Statistics, products: Mapping[str, Product]) -> dict[str, str]:
    """Products that read an activation which had one value alone -> that activation: no range can be had from it."""
    flat = {name for name, seen in statistics.seen.items() if seen.low == seen.high}
    found = {}
    for name, product in products.items():
        if seen := [value for value in product.ranged if value in flat]:
            found[name] = seen[0]
    return found


def with_smoothing(
    scheme: Scheme,
    statistics: Statistics,
    products: Mapping[str, Product],
    weights: Mapping[str, Array],
    alpha: float,
) -> Scheme:
    """The scheme with SmoothQuant's factors for activations that only linear layers read, all with a stored matrix.

    Of an asymmetric range each end is that of the divided activation: the channel with the lowest value and that with
    the highest are divided by different factors. A range that the observer had clipped stays clipped by the same share.
    """
    readers: dict[str, list[tuple[Product, Operand]]] = {}
    for product in products.values():
        for operand in product.activations:
            readers.setdefault(operand.source, []).append((product, operand))
    smooth, ranges = dict(scheme.smooth), dict(scheme.ranges)
    for source, pairs in readers.items():
        if any(product.op_type == "Conv" or operand.axis is None for product, operand in pairs):
            continue
        sizes = {len(statistics.channels[operand.value].largest) for _, operand in pairs}
        if len(sizes) != 1:
            continue
        seen = [statistics.channels[operand.value] for _, operand in pairs]
        lows = np.min(np.stack([channels.low for channels in seen]), axis=0)
        highs = np.max(np.stack([channels.high for channels in seen]), axis=0)
        largest = np.maximum(-lows, highs)
        if not largest.max() > 0:
            continue
        peaks = []
        for product, _ in pairs:
            weight = weights[product.weight.value]  # type: ignore[union-attr]  # axis says that there is one
            other = tuple(index for index in range(weight.ndim) if index != summed_axis(product))
            peaks.append(np.abs(weight).max(axis=other))
        factors = smooth_factors(largest, peaks, alpha)
        low, high = scheme.ranges[source]
        if scheme.symmetric:
            ends = _shrunk(largest, factors), _shrunk(largest, factors)
        else:
            ends = _shrunk(-lows, factors), _shrunk(highs, factors)
        smooth[source], ranges[source] = factors, (low * ends[0], high * ends[1])
    return replace(scheme, smooth=smooth, ranges=ranges)


def _shrunk(ends: Array, factors: Array) -> float:
    """The largest of `ends` [channels] after their division by `factors`, over that before; 1 where none is > 0."""
    whole = float(ends.max())
    return float((ends / factors).max()) / whole if whole > 0 else 1.0


def with_shifts(
    scheme: Scheme,
    statistics: Statistics,
    products: Mapping[str, Product],
    weights: Mapping[str, Array],
    only: Collection[str] | None = None,
) -> Scheme:
    """The scheme with bias correction: what rounding the weights adds to each output channel on average, taken away.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.2,
    with measured means. At the rim of a padded convolution it is taken as inside.
    """
    shifts = dict(scheme.shifts)
    for name, product in products.items():
        if product.weight is None or product.weight.axis is None or (only is not None and name not in only):
            continue
        operand = product.activations[0]
        if operand.value not in statistics.channels:
            continue
        mean = statistics.channels[operand.value].mean
        weight = weights[product.weight.value]
        back = [
            numbers.astype(np.float64) * along(scales.astype(np.float64), weight.ndim, product.weight.axis)
            for numbers, scales in scheme.quantised(product, weight)
        ]
        rounded = back[0] if len(back) == 1 else np.concatenate(back, axis=1)
        factors = scheme.factors(operand)
        if factors is not None:
            mean = mean / factors
        error = rounded - scheme.smoothed(product, weight)  # of the weight that meets the divided activation
        if product.op_type == "Conv":
            by_input = error.reshape(*error.shape[:2], -1).sum(axis=2)  # [outputs, inputs of a group]
            groups = len(mean) // by_input.shape[1]
            per_group = mean.reshape(groups, -1)
            added = np.einsum("goi,gi->go", by_input.reshape(groups, -1, by_input.shape[1]), per_group).reshape(-1)
        else:
            added = np.tensordot(error, mean, (summed_axis(product), 0))
        shifts[name] = (-added).astype(np.float32)
    return replace(scheme, shifts=shifts)
