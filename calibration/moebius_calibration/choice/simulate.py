"""Simulated quantization in float32: one session in which a switch quantizes each linear operator, or does not.

Activations and weights pass through `QuantizeLinear` and `DequantizeLinear`; the operator itself runs in float32, which
is exact enough for sums of products of bytes. So a search tries any set of layers in one session.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_calibration.graph.linear_ops import LinearOp, Operand, shapes_of
from moebius_calibration.ranges.formats import activation_scale
from moebius_calibration.ranges.scheme import Scheme
from moebius_export.graph.opened import Opened
from moebius_export.graph.sessions import session_of

Array = np.ndarray

FLAGS = "int8_flags"
"""Input bool [operators]: which of them are quantized."""


class Switched:
    """A session with a switch for each linear operator.

    Args:
        graph: opened float32 graph.
        folder: of its weights file.
        ops: those with a switch.
        scheme: the numbers, with ranges of all that the operators read.
        weights: float32 values of their weights, by tensor name.
        weights_only: do not quantize activations.
    """

    def __init__(
        self,
        graph: Opened,
        folder: Path,
        ops: Mapping[str, LinearOp],
        scheme: Scheme,
        weights: Mapping[str, Array],
        weights_only: bool = False,
    ) -> None:
        self.names = list(ops)
        self._on: frozenset[str] = frozenset()
        model = switched(graph, ops, scheme, weights, weights_only=weights_only)
        self._session = session_of(model, folder)

    def set(self, nodes: Collection[str]) -> Switched:
        """Switches these operators on and all others off; returns the session."""
        self._on = frozenset(nodes)
        return self

    def get_outputs(self) -> Any:
        """As `InferenceSession.get_outputs`."""
        return self._session.get_outputs()

    def run(self, names: Sequence[str] | None, inputs: Mapping[str, Array]) -> list[Array]:
        """As `InferenceSession.run`, with the operators of `set` quantized."""
        flags = np.array([name in self._on for name in self.names], np.bool_)
        found: list[Array] = self._session.run(names, {**inputs, FLAGS: flags})
        return found


def switched(
    graph: Opened,
    ops: Mapping[str, LinearOp],
    scheme: Scheme,
    weights: Mapping[str, Array],
    *,
    weights_only: bool = False,
) -> onnx.ModelProto:
    """The float32 graph with the input `FLAGS`; see `Switched`."""
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.value_info[:]
    before = list(model.graph.node)
    del model.graph.node[:]
    model.graph.input.append(helper.make_tensor_value_info(FLAGS, TensorProto.BOOL, [len(ops)]))
    writer = _Writer(model, shapes_of(graph.model), scheme)
    flags = {name: index for index, name in enumerate(ops)}
    residuals = {}
    for name, op in ops.items():
        if op.residual is not None and scheme.symmetric and not weights_only:
            residuals[op.residual[0]] = (name, op.residual[1], op.residual[2])
    for node in before:
        if node.name in residuals:
            owner, index, _ = residuals[node.name]
            flag = writer.flag(flags[owner])
            node.input[index] = writer.where(f"{node.name}/residual", flag, residuals[node.name][2], node.input[index])
        if node.name not in ops:
            model.graph.node.append(node)
            continue
        op, flag = ops[node.name], writer.flag(flags[node.name])
        for operand in op.operands:
            if operand.constant:
                node.input[operand.index] = writer.weight(node, op, weights[operand.value], flag)
            elif not weights_only:
                node.input[operand.index] = writer.activation(node, operand, flag)
        model.graph.node.append(node)
        if node.name in scheme.bias_correction:
            writer.correction(node, op, scheme.bias_correction[node.name], flag)
    return model


class _Writer:
    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]], scheme: Scheme) -> None:
        self._graph, self._shapes, self._scheme = model.graph, shapes, scheme
        self._made: set[str] = set()

    def flag(self, index: int) -> str:
        """The scalar switch of an operator."""
        name = f"int8/flag/{index}"
        if name not in self._made:
            place = self._store(f"{name}/place", np.array(index, np.int64))
            self._node("Gather", [FLAGS, place], name, axis=0)
        return name

    def where(self, mark: str, flag: str, source: str, value: str) -> str:
        """A value, quantized where the flag is set."""
        self._node("Where", [flag, self._through(value, source), value], mark)
        return mark

    def activation(self, node: onnx.NodeProto, operand: Operand, flag: str) -> str:
        """The input in place of an activation: quantized where the flag is set."""
        factors = self._scheme.factors(operand)
        if operand.concat_parts and factors is None:
            key = f"{operand.value}/int8/halves"
            if key not in self._made:
                self._node("Concat", [self._through(part, part) for part, _ in operand.concat_parts], key, axis=1)
            dequantized = key
        elif factors is None:
            dequantized = self._through(operand.value, operand.source)
        else:
            rank = len(self._shapes[operand.value])
            shape = [-1 if index == operand.axis else 1 for index in range(rank)]
            key = f"{operand.value}/int8/smoothed"
            if key not in self._made:
                inverse = self._store(f"{key}/factors", (1 / factors).reshape(shape).astype(np.float32))
                self._node("Mul", [operand.value, inverse], key)
            dequantized = self._through(key, operand.source)
        mark = f"{node.name}/int8/{operand.index}"
        self._node("Where", [flag, dequantized, operand.value], mark)
        return mark

    def weight(self, node: onnx.NodeProto, op: LinearOp, weight: Array, flag: str) -> str:
        """The input in place of a weight: quantized where the flag is set."""
        operand = op.weight
        assert operand is not None
        mark = f"{node.name}/int8/weight"
        axis: dict[str, Any] = {} if operand.axis is None else {"axis": operand.axis}
        backs = []
        for index, (numbers, scales) in enumerate(self._scheme.quantized(op, weight)):
            stored = [self._store(f"{mark}{index}/bytes", numbers), self._store(f"{mark}{index}/scale", scales)]
            self._node("DequantizeLinear", stored, f"{mark}{index}", **axis)
            backs.append(f"{mark}{index}")
        if len(backs) > 1:
            self._node("Concat", backs, f"{mark}/whole", axis=1)
            backs = [f"{mark}/whole"]
        self._node("Where", [flag, backs[0], operand.value], mark)
        return mark

    def correction(self, node: onnx.NodeProto, op: LinearOp, correction: Array, flag: str) -> None:
        """Adds the bias correction to an operator's output."""
        output = node.output[0]
        rank = len(self._shapes[output])
        axis = output_axis(op, rank)
        shape = [-1 if index == axis else 1 for index in range(rank)]
        mark = f"{node.name}/int8/correction"
        added = self._store(f"{mark}/value", correction.reshape(shape).astype(np.float32))
        nothing = self._store("int8/zero", np.zeros((), np.float32))
        node.output[0] = f"{mark}/before"
        self._graph.node[-1].output[0] = node.output[0]
        self._node("Where", [flag, added, nothing], mark)
        self._node("Add", [node.output[0], mark], output, name=f"{mark}/add")

    def _through(self, value: str, source: str) -> str:
        low, high = self._scheme.ranges[source]
        back = f"{value}/int8/back"
        if back in self._made:
            return back
        if self._scheme.symmetric:
            scale, zero = activation_scale(low, high, self._scheme.number_format), self._scheme.number_format.zero
        else:
            scale = max((high - low) / 255, 1e-12)
            zero = np.array(np.clip(np.rint(-low / scale), 0, 255), np.uint8)
        pair = [
            self._store(f"{value}/int8/scale", np.array(scale, np.float32)),
            self._store(f"{value}/int8/zero", zero),
        ]
        self._node("QuantizeLinear", [value, *pair], f"{value}/int8/bytes")
        self._node("DequantizeLinear", [f"{value}/int8/bytes", *pair], back)
        return back

    def _store(self, name: str, array: Array) -> str:
        if name not in self._made:
            self._made.add(name)
            self._graph.initializer.append(numpy_helper.from_array(array.copy(order="C"), name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, name: str = "", **attributes: int) -> None:
        if output not in self._made:
            self._made.add(output)
            self._graph.node.append(helper.make_node(operator, inputs, [output], name=name or output, **attributes))


def output_axis(op: LinearOp, rank: int) -> int:
    """The axis of an operator's output that holds the output channels of its weight."""
    if op.op_type == "Conv":
        return 1
    return rank - 1 if op.weight is not None and op.weight.index == 1 else rank - 2
