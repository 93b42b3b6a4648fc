"""Ranges of every value on real trajectories, reduced inside the graph, so that no activation leaves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_export.errors import ExportError
from moebius_export.graph.opened import MOVES, Opened

_MARK = "observed/"


@dataclass
class Ranges:
    """Largest magnitude of each observed value, and the sum over all runs of its mean square."""

    largest: dict[str, float] = field(default_factory=dict)
    squares: dict[str, float] = field(default_factory=dict)
    runs: int = 0

    def add(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Adds the outputs of one run of an `observed` graph.

        Raises:
            ExportError: a value is infinite or NaN already in float32.
        """
        self.runs += 1
        for name, found in outputs.items():
            if not name.startswith(_MARK):
                continue
            value, low, high, mean_square = name[len(_MARK) :], *np.asarray(found, np.float64)
            if not np.isfinite(found).all():
                raise ExportError(f"{value} is not finite in float32; these weights or pictures prove nothing")
            self.largest[value] = max(self.largest.get(value, 0.0), abs(float(low)), abs(float(high)))
            self.squares[value] = self.squares.get(value, 0.0) + float(mean_square)

    def rms(self, name: str) -> float:
        """Root mean square over all runs."""
        return float(np.sqrt(self.squares[name] / self.runs))


def observed(graph: Opened) -> onnx.ModelProto:
    """Returns the graph with an extra output [min, max, mean square] for every node that computes values."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    one = numpy_helper.from_array(np.array([1], np.int64), f"{_MARK}shape")
    model.graph.initializer.append(one)
    inputs = [value.name for value in graph.model.graph.input if graph.is_float(value.name)]
    made = [node.output[0] for node in graph.model.graph.node if graph.computes(node)]
    made += [node.output[0] for node in graph.model.graph.node if node.op_type == "Gather" and _looked_up(graph, node)]
    # ONNX Runtime goes from the last node without readers to the first, each after what it needs. In this order it
    # reduces every value as soon as it is there; in the other all of them would wait in memory for the last one.
    for name in reversed((*inputs, *made)):
        mark = f"{_MARK}{name}"
        parts = []
        for operator, source in (("ReduceMin", name), ("ReduceMax", name), ("ReduceMean", f"{mark}/squares")):
            if operator == "ReduceMean":
                model.graph.node.append(helper.make_node("Mul", [name, name], [source], name=source))
            found = f"{mark}/{operator}"
            model.graph.node.append(helper.make_node(operator, [source], [found], name=found, keepdims=0))
            parts.append(f"{found}/row")
            model.graph.node.append(helper.make_node("Reshape", [found, one.name], [parts[-1]], name=parts[-1]))
        model.graph.node.append(helper.make_node("Concat", parts, [mark], name=mark, axis=0))
        model.graph.output.append(helper.make_tensor_value_info(mark, TensorProto.FLOAT, [3]))
    return model


def _looked_up(graph: Opened, node: onnx.NodeProto) -> bool:
    return node.input[0] in graph.stored and node.output[0] not in graph.constant and graph.is_float(node.output[0])


def largest_of(graph: Opened, ranges: Ranges, name: str) -> float:
    """The largest magnitude of a value: observed, or that of what was moved to make it; 0 where it is constant."""
    seen: set[str] = set()
    waiting, largest = [name], 0.0
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        if value in ranges.largest:
            largest = max(largest, ranges.largest[value])
        elif (node := graph.producers.get(value)) is not None and node.op_type in MOVES:
            waiting += [node.input[index] for index in graph.float_inputs(node)]
    return largest
