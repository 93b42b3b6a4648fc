"""Fixed rules: nodes that stay float32 whatever their error, because they may overflow or by their kind."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from moebius_export.graph.kinds import LARGEST, LowType, round_trip
from moebius_export.graph.opened import Opened, Weights, layer_of
from moebius_export.precision.plan import WeightType
from moebius_export.trajectories.ranges import Ranges, largest_of

MARGIN = 4.0
"""Ratio of the type's largest number to the largest allowed value; other pictures may reach larger values."""

WEIGHT_ROUNDING = 1e-3
"""Largest relative L2 error of a weight stored in fp16; rounding costs some 2e-4, small numbers that are lost more."""

_BF16_WEIGHT_ROUNDING = 8 * WEIGHT_ROUNDING  # 3 bits less
_STATISTICS = frozenset({"InstanceNormalization", "LayerNormalization", "GroupNormalization", "BatchNormalization"})
_GROUP_NORM = "/GroupNorm/"  # a body of `moebius_export.graph.layers`, written out
_LAST = frozenset({"conv_norm_out", "conv_act", "conv_out"})
_WITHOUT_BF16 = frozenset({"InstanceNormalization"})


def limit_of(kind: LowType) -> float:
    """The largest magnitude that a plan lets a value have."""
    return LARGEST[kind] / MARGIN


def fixed_reasons(graph: Opened, kind: LowType, ranges: Ranges) -> dict[str, str]:
    """Node -> why it stays float32, for those that no trial decides.

    A node is one of them by what it is (statistics of norms, softmax over many positions, time embedding, the end of
    the network, sampler arithmetic), or because its output or an input reached beyond `limit_of`.
    """
    limit, reasons = limit_of(kind), {}
    for node in graph.model.graph.node:
        if graph.computes(node):
            reason = _by_nature(graph, node, kind) or _overflow(graph, node, kind, ranges, limit)
            if reason:
                reasons[node.name] = reason
    return reasons


def _overflow(graph: Opened, node: onnx.NodeProto, kind: LowType, ranges: Ranges, limit: float) -> str:
    allowed = f"limit {limit:,.0f} ({LARGEST[kind]:,.0f} / {MARGIN:g})" if kind == "fp16" else f"limit {limit:.3g}"
    largest = ranges.largest.get(node.output[0], 0.0)
    if largest > limit:
        return f"overflow: {largest:,.0f} seen, {allowed}"
    for index in graph.float_inputs(node):
        largest = largest_of(graph, ranges, node.input[index])
        if largest > limit:
            return f"overflow: its input {node.input[index]} reached {largest:,.0f}, {allowed}"
    return ""


def is_statistic(node: onnx.NodeProto) -> bool:
    """Whether a node is part of a norm's statistics: sums over many positions, and what is made of them."""
    return node.op_type in _STATISTICS or _GROUP_NORM in node.name


def _by_nature(graph: Opened, node: onnx.NodeProto, kind: LowType) -> str:
    layer = layer_of(node.name)
    if is_statistic(node):
        return "norm statistics"
    if node.op_type == "Softmax":
        shape = _shape(graph, node.input[0])
        return f"softmax over {shape[_axis(node)] if shape else 'many'} positions"
    if layer.startswith(("time_embedding", "time_proj")):
        return "time embedding"
    if _LAST & set(layer.split(".")):
        return "last convolution"
    if layer == "graph":  # the nodes of no module
        return "guidance, scaling"
    if kind == "bf16" and node.op_type in _WITHOUT_BF16:
        return f"{node.op_type} takes no bf16"
    return ""


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), -1)


def _shape(graph: Opened, name: str) -> list[int]:
    for value in (*graph.model.graph.value_info, *graph.model.graph.input):
        if value.name == name:
            return [dimension.dim_value or 1 for dimension in value.type.tensor_type.shape.dim]
    return []


def weight_types(graph: Opened, weights: Weights, kind: LowType) -> dict[str, WeightType]:
    """How each weight is stored: in the lower type unless it overflows or rounding costs more than it should."""
    worst = WEIGHT_ROUNDING if kind == "fp16" else _BF16_WEIGHT_ROUNDING
    found = {}
    for name in graph.storable:
        values = np.asarray(weights.array(graph.stored[name]), np.float32)
        rounded = round_trip(values, kind)
        largest = float(np.abs(values).max(initial=0.0))
        zeroed = int(np.count_nonzero(values) - np.count_nonzero(rounded))
        norm = float(np.linalg.norm(values))
        finite = bool(np.isfinite(rounded).all())
        rounding = float(np.linalg.norm(rounded - values)) / norm if norm and finite else 0.0
        reason = ""
        if not finite:
            reason = f"overflow: {largest:,.0f} is stored, {kind} ends at {LARGEST[kind]:,.0f}"
        elif rounding > worst:
            reason = f"rounding: {rounding:.1e} of its norm, {zeroed} numbers would be 0"
        found[name] = WeightType(
            type="fp32" if reason else kind, largest=largest, rounding=rounding, zeroed=zeroed, reason=reason
        )
    return found


def keep_vectors(graph: Opened, types: dict[str, WeightType], computes: Mapping[str, str]) -> None:
    """Stores gains and biases that only float32 nodes read in float32, in place: it costs next to no bytes."""
    for name, entry in types.items():
        if entry.type != "fp32" and len(graph.stored[name].dims) <= 1 and _readers(graph, name, computes) == {"fp32"}:
            types[name] = entry.model_copy(update={"type": "fp32", "reason": "a vector, read in fp32 only"})


def _readers(graph: Opened, name: str, computes: Mapping[str, str]) -> set[str]:
    """The types of the nodes that read a weight, also through nodes that only move it."""
    kinds: set[str] = set()
    for node in graph.consumers.get(name, []):
        if graph.computes(node):
            kinds.add(computes[node.name])
        else:
            kinds.update(*(_readers(graph, output, computes) for output in node.output))
    return kinds


def overflowing_weights(graph: Opened, types: Mapping[str, WeightType], kind: LowType) -> set[str]:
    """Nodes that read a weight which the lower type cannot hold: they stay float32 too."""
    large = {name for name, entry in types.items() if entry.largest > LARGEST[kind]}
    nodes: set[str] = set()
    waiting = list(large)
    while waiting:
        for node in graph.consumers.get(waiting.pop(), []):
            if graph.computes(node):
                nodes.add(node.name)
            else:
                waiting += list(node.output)
    return nodes
