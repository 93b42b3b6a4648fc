"""The numbers of a quantized graph: ranges, smoothing factors and bias corrections, computed from statistics."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from moebius_calibration.graph.linear_ops import LinearOp, Operand
from moebius_calibration.plan import Int8Plan, Observer
from moebius_calibration.ranges.formats import FORMATS, INT8, Format, along, as_bytes, smooth_factors, weight_scales
from moebius_calibration.ranges.observers import range_of
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.errors import ExportError

Array = np.ndarray
Range = tuple[float, float]


@dataclass(frozen=True)
class Scheme:
    """The numbers of a quantized graph; `ranges`, `smooth` and `bias_correction` are those of `plan.Int8Plan`.

    `symmetric`: activations have `number_format` with zero point 0 (TensorRT). Else they are unsigned bytes with a
    zero point (CPU kernels), and `smooth` brings the parts of a concatenation to one scale.
    """

    symmetric: bool
    ranges: dict[str, Range]
    smooth: dict[str, Array] = field(default_factory=dict)
    bias_correction: dict[str, Array] = field(default_factory=dict)
    number_format: Format = INT8

    def factors(self, operand: Operand) -> Array | None:
        """The factors that an activation is divided by, [channels]; None where it is not smoothed."""
        return self.smooth.get(operand.source) if operand.axis is not None else None

    def smoothed(self, op: LinearOp, weight: Array) -> Array:
        """The weight that multiplies the divided activation."""
        operand, of_weight = op.activations[0], op.weight
        factors = self.factors(operand)
        if factors is None or of_weight is None:
            return weight
        return (weight * along(factors, weight.ndim, summed_axis(op))).astype(np.float32)

    def input_slices(self, op: LinearOp) -> list[slice]:
        """The input channels of an operator by scale: all, or a slice for each concatenated part."""
        concat_parts = op.activations[0].concat_parts
        if not concat_parts or not self.symmetric or self.factors(op.activations[0]) is not None:
            return [slice(None)]
        ends = np.cumsum([0, *(count for _, count in concat_parts)]).tolist()
        return [slice(start, end) for start, end in pairwise(ends)]

    def quantized(self, op: LinearOp, weight: Array) -> list[tuple[Array, Array]]:
        """Of each of the `input_slices` of the smoothed weight: its quantized values and their scales."""
        wide = self.smoothed(op, weight)
        axis = op.weight.axis if op.weight else None
        found = []
        for part in self.input_slices(op):
            own = wide if part == slice(None) else wide[:, part]
            scales = weight_scales(own, axis, self.number_format)
            found.append((as_bytes(own, scales, axis, self.number_format), scales))
        return found


def scheme_from(plan: Int8Plan) -> Scheme:
    """The numbers of a plan."""
    return Scheme(
        plan.target != "ort-cpu",
        {name: (low, high) for name, (low, high) in plan.ranges.items()},
        {name: np.array(factors, np.float32) for name, factors in plan.smooth.items()},
        {name: np.array(values, np.float32) for name, values in plan.bias_correction.items()},
        FORMATS[plan.target],
    )


def summed_axis(op: LinearOp) -> int:
    """The axis of the weight that an operator sums over: its inputs."""
    if op.op_type == "Conv":
        return 1
    axis = op.weight.axis if op.weight is not None else None
    if axis is None:
        raise ExportError(f"{op.node} has no stored weight matrix, so it cannot be smoothed; this is a bug")
    return 1 - axis


def scheme_of(
    statistics: Statistics,
    ops: Mapping[str, LinearOp],
    observer: Observer,
    *,
    symmetric: bool,
    number_format: Format = INT8,
) -> Scheme:
    """Ranges by one observer, without smoothing; where not symmetric, concatenated parts get factors."""
    names = dict.fromkeys(name for op in ops.values() for name in op.watched)
    ranges = {name: range_of(statistics.seen[name], observer, symmetric) for name in names}
    smooth: dict[str, Array] = {}
    for operand in (operand for op in ops.values() for operand in op.activations):
        if operand.concat_parts and not symmetric:
            spans = np.array([ranges[name][1] - ranges[name][0] for name, _ in operand.concat_parts])
            shares = np.maximum(spans / max(float(spans.max()), 1e-30), 1e-6)
            parts = [
                np.full(count, share, np.float32)
                for (_, count), share in zip(operand.concat_parts, shares, strict=True)
            ]
            smooth[operand.source] = np.concatenate(parts)
            ends = [
                (ranges[name][0] / share, ranges[name][1] / share)
                for (name, _), share in zip(operand.concat_parts, shares, strict=True)
            ]
            ranges[operand.source] = (min(low for low, _ in ends), max(high for _, high in ends))
    return Scheme(symmetric, ranges, smooth, number_format=number_format)


def constant_activations(statistics: Statistics, ops: Mapping[str, LinearOp]) -> dict[str, str]:
    """Operators that read a constant activation, which gives no range -> that activation."""
    flat = {name for name, seen in statistics.seen.items() if seen.low == seen.high}
    found = {}
    for name, op in ops.items():
        if seen := [value for value in op.ranged if value in flat]:
            found[name] = seen[0]
    return found


def with_smoothing(
    scheme: Scheme,
    statistics: Statistics,
    ops: Mapping[str, LinearOp],
    weights: Mapping[str, Array],
    alpha: float,
) -> Scheme:
    """The scheme with SmoothQuant's factors, for activations that only linear layers with stored matrices read.

    The ends of an asymmetric range shrink separately: the channels of the lowest and of the highest value have
    different factors. A range that the observer clipped stays clipped by the same share.
    """
    readers: dict[str, list[tuple[LinearOp, Operand]]] = {}
    for op in ops.values():
        for operand in op.activations:
            readers.setdefault(operand.source, []).append((op, operand))
    smooth, ranges = dict(scheme.smooth), dict(scheme.ranges)
    for source, pairs in readers.items():
        if any(op.op_type == "Conv" or operand.axis is None for op, operand in pairs):
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
        for op, _ in pairs:
            weight = weights[op.weight.value]  # type: ignore[union-attr]  # an operand with an axis multiplies a weight
            other = tuple(index for index in range(weight.ndim) if index != summed_axis(op))
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
    """The ratio of the largest of `ends` [channels] after and before the division by `factors`; 1 where none is > 0."""
    whole = float(ends.max())
    return float((ends / factors).max()) / whole if whole > 0 else 1.0


def with_bias_correction(
    scheme: Scheme,
    statistics: Statistics,
    ops: Mapping[str, LinearOp],
    weights: Mapping[str, Array],
    only: Collection[str] | None = None,
) -> Scheme:
    """The scheme with bias correction: minus the mean error that rounding the weights adds to each output channel.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.2,
    with measured means. Padding is ignored: the border of a convolution gets the correction of the inside.
    """
    bias_correction = dict(scheme.bias_correction)
    for name, op in ops.items():
        if op.weight is None or op.weight.axis is None or (only is not None and name not in only):
            continue
        operand = op.activations[0]
        if operand.value not in statistics.channels:
            continue
        mean = statistics.channels[operand.value].mean
        weight = weights[op.weight.value]
        back = [
            numbers.astype(np.float64) * along(scales.astype(np.float64), weight.ndim, op.weight.axis)
            for numbers, scales in scheme.quantized(op, weight)
        ]
        rounded = back[0] if len(back) == 1 else np.concatenate(back, axis=1)
        factors = scheme.factors(operand)
        if factors is not None:
            mean = mean / factors
        error = rounded - scheme.smoothed(op, weight)  # of the weight that multiplies the divided activation
        if op.op_type == "Conv":
            by_input = error.reshape(*error.shape[:2], -1).sum(axis=2)  # [outputs, inputs of a group]
            groups = len(mean) // by_input.shape[1]
            per_group = mean.reshape(groups, -1)
            added = np.einsum("goi,gi->go", by_input.reshape(groups, -1, by_input.shape[1]), per_group).reshape(-1)
        else:
            added = np.tensordot(error, mean, (summed_axis(op), 0))
        bias_correction[name] = (-added).astype(np.float32)
    return replace(scheme, bias_correction=bias_correction)
