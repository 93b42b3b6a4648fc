"""Q/DQ files for TensorRT, in INT8 and FP8.

The rules: signed bytes, or E4M3, with zero point 0; weights are stored quantized, per output channel on axis 0;
activations have one scale; every input of a quantized convolution or matrix product is quantized, and so is the other
input of an Add that a quantized convolution ends in, so that the two fuse; biases are not; scales have the type of what
they scale.

A matrix on the right of a product is stored transposed, so that its outputs are axis 0, with a Transpose after its
`DequantizeLinear`. A convolution of a concatenation becomes a sum of one convolution per part, with their own scales.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_calibration.choice.simulate import output_axis
from moebius_calibration.graph.linear_ops import LinearOp, Operand
from moebius_calibration.ranges.formats import Format, activation_scale, along, as_bytes, weight_scales
from moebius_calibration.ranges.scheme import Scheme
from moebius_export.errors import ExportError
from moebius_export.graph.opened import with_types

Array = np.ndarray

MARK = "int8"
"""Inserted nodes and tensors are named VALUE/int8/..."""

_TYPES: dict[int, Any] = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


def quantized(
    base: onnx.ModelProto,
    ops: Mapping[str, LinearOp],
    chosen: Collection[str],
    scheme: Scheme,
    weights: Mapping[str, Array],
    *,
    weights_only: bool = False,
) -> onnx.ModelProto:
    """The mixed-precision graph with Q/DQ pairs.

    Args:
        base: graph of `moebius_export.precision.typed` in FP16 or float32, its weights inside it or external.
        ops: linear operators of the float32 graph; their nodes have the same names in `base`.
        chosen: nodes to quantize.
        scheme: their numbers, symmetric.
        weights: float32 values of their weights, by tensor name.
        weights_only: quantize weights alone: `DequantizeLinear`, and float activations.

    Raises:
        ExportError: a node is missing in `base`, or has a type that Q/DQ does not support here (bf16).
    """
    return _QuantizedGraph(base, ops, set(chosen), scheme, weights, weights_only).run()


class _QuantizedGraph:
    def __init__(
        self,
        base: onnx.ModelProto,
        ops: Mapping[str, LinearOp],
        chosen: set[str],
        scheme: Scheme,
        weights: Mapping[str, Array],
        weights_only: bool,
    ) -> None:
        if not scheme.symmetric:
            raise ExportError("TensorRT takes symmetric ranges only; calibrate for --target tensorrt")
        self.model = onnx.ModelProto()
        self.model.CopyFrom(base)
        self.ops, self.chosen, self.scheme, self.weights = ops, chosen, scheme, weights
        self.weights_only = weights_only
        graph = self.model.graph
        if missing := chosen - {node.name for node in graph.node}:
            raise ExportError(f"the FP16 model has no node {min(missing)!r}; run `moebius-export precision` again")
        self.types = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
        self.types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
        self.shapes = {
            v.name: len(v.type.tensor_type.shape.dim) for v in (*graph.input, *graph.output, *graph.value_info)
        }
        self.nodes: list[onnx.NodeProto] = []
        self.made: set[str] = set()

    def run(self) -> onnx.ModelProto:
        residuals = {
            op.residual[0]: op.residual
            for name, op in self.ops.items()
            if name in self.chosen and op.residual is not None and not self.weights_only
        }
        for original in self.model.graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            if node.name in residuals:
                _, index, source = residuals[node.name]
                node.input[index] = self._pair(node.input[index], source)
            if node.name not in self.chosen:
                self.nodes.append(node)
                continue
            op = self.ops[node.name]
            concat_parts = op.activations[0].concat_parts
            if concat_parts and self.scheme.factors(op.activations[0]) is None and not self.weights_only:
                self._split(node, op)
            else:
                self._whole(node, op)
        return self._model()

    def _whole(self, node: onnx.NodeProto, op: LinearOp) -> None:
        kind = self._kind(node)
        factors = self.scheme.factors(op.activations[0]) if not self.weights_only else None
        scheme = (
            self.scheme
            if factors is not None
            else Scheme(True, self.scheme.ranges, number_format=self.scheme.number_format)
        )
        for operand in op.operands:
            if operand.constant:
                wide = scheme.smoothed(op, self.weights[operand.value])
                node.input[operand.index] = self._weight(f"{node.name}/{MARK}/weight", wide, operand, kind, op)
            elif not self.weights_only:
                value = node.input[operand.index]
                if factors is not None and operand.axis is not None:
                    value = self._smoothed(value, operand, factors, kind)
                node.input[operand.index] = self._pair(value, operand.source, kind)
        self._finish(node, op, kind)

    def _split(self, node: onnx.NodeProto, op: LinearOp) -> None:
        """Appends a sum of convolutions, one for each concatenated part."""
        kind, operand, of_weight = self._kind(node), op.activations[0], op.weight
        assert of_weight is not None
        whole = self.weights[of_weight.value]
        concat = next(made for made in self.model.graph.node if node.input[0] in self._outputs_of(made))
        bias = list(node.input[2:])
        output, start, sums = node.output[0], 0, []
        for index, ((source, count), value) in enumerate(zip(operand.concat_parts, concat.input, strict=True)):
            part = onnx.NodeProto()
            part.CopyFrom(node)
            part.name = node.name if index == 0 else f"{node.name}/{MARK}/part{index}"
            weight = whole[:, start : start + count]
            start += count
            mark = f"{node.name}/{MARK}/weight{index}"
            inputs = [self._pair(value, source, kind), self._weight(mark, weight, of_weight, kind, op)]
            del part.input[:]
            part.input.extend([*inputs, *(bias if index == 0 else [])])
            part.output[0] = f"{output}/{MARK}/part{index}"
            self.shapes[part.output[0]] = self.shapes.get(output, whole.ndim)
            if index == 0:
                self._finish(part, op, kind)
            else:
                self.nodes.append(part)
            sums.append(part.output[0])
        for index in range(1, len(sums)):
            left = sums[0] if index == 1 else f"{output}/{MARK}/sum{index - 1}"
            total = output if index == len(sums) - 1 else f"{output}/{MARK}/sum{index}"
            self.nodes.append(helper.make_node("Add", [left, sums[index]], [total], name=f"{total}/{MARK}/add"))

    def _outputs_of(self, node: onnx.NodeProto) -> set[str]:
        """The output of a Concat and casts of it, which mixed precision inserts; empty for other nodes."""
        if node.op_type != "Concat":
            return set()
        found = set(node.output)
        for other in self.model.graph.node:
            if other.op_type == "Cast" and other.input[0] in node.output:
                found.update(other.output)
        return found

    def _finish(self, node: onnx.NodeProto, op: LinearOp, kind: int) -> None:
        """Appends an operator, its bias correction in the bias of a convolution or in an Add after a matrix product."""
        correction = self.scheme.bias_correction.get(op.node)
        if correction is None:
            self.nodes.append(node)
            return
        name = f"{op.node}/{MARK}/correction"
        if node.op_type == "Conv" and len(node.input) == 2:
            node.input.append(self._store(name, correction.astype(_TYPES[kind])))
        elif node.op_type == "Conv":
            stored = {tensor.name: tensor for tensor in self.model.graph.initializer}
            if (tensor := stored.get(node.input[2])) is not None and not tensor.external_data:
                moved = numpy_helper.to_array(tensor).astype(np.float32) + correction
                node.input[2] = self._store(name, moved.astype(_TYPES[kind]))
            else:  # a bias that is cast or computed
                added = self._store(name, correction.astype(_TYPES[kind]))
                self._node("Add", [node.input[2], added], f"{name}/bias")
                node.input[2] = f"{name}/bias"
        else:
            output, rank = node.output[0], self.shapes[node.output[0]]
            axis = output_axis(op, rank)
            added = self._store(name, along(correction, rank, axis).astype(_TYPES[kind]))
            node.output[0] = f"{output}/{MARK}/uncorrected"
            self.nodes.append(node)
            self.nodes.append(helper.make_node("Add", [node.output[0], added], [output], name=f"{name}/add"))
            return
        self.nodes.append(node)

    def _smoothed(self, value: str, operand: Operand, factors: Array, kind: int) -> str:
        mark = f"{value}/{MARK}/smoothed{operand.axis}"
        inverse = along(1 / factors, self.shapes[value], operand.axis)
        self._node("Mul", [value, self._store(f"{mark}/factors", inverse.astype(_TYPES[kind]))], mark)
        self.types[mark] = kind
        return mark

    def _weight(self, mark: str, wide: Array, operand: Operand, kind: int, op: LinearOp) -> str:
        """Stores a quantized weight and adds its `DequantizeLinear`; a matrix on the right is stored by outputs."""
        transposed = operand.axis == 1 and wide.ndim == 2
        array = np.ascontiguousarray(wide.T) if transposed else wide
        axis = None if operand.axis is None else 0
        number_format = self.scheme.number_format
        scales = _held(weight_scales(array, axis, number_format), kind, number_format)
        stored = [
            self._store(f"{mark}/bytes", as_bytes(array, scales.astype(np.float32), axis, number_format)),
            self._store(f"{mark}/scale", scales),
            self._store(f"{mark}/zero", np.zeros(scales.shape, number_format.dtype)),
        ]
        self._node("DequantizeLinear", stored, mark, **({} if axis is None else {"axis": 0}))
        if not transposed:
            return mark
        self.nodes.append(helper.make_node("Transpose", [mark], [f"{mark}/turned"], name=f"{mark}/turned", perm=[1, 0]))
        return f"{mark}/turned"

    def _pair(self, value: str, source: str, kind: int | None = None) -> str:
        """Adds a Q/DQ pair for a value; all its readers share it."""
        own = self.types[value]
        kind = kind or own
        if kind not in _TYPES:
            raise ExportError(
                f"{value} is {TensorProto.DataType.Name(kind)}, not quantizable here; expected float16 or float32"
            )
        if own != kind:
            cast = f"{value}/{MARK}/as_{TensorProto.DataType.Name(kind).lower()}"
            self._node("Cast", [value], cast, to=kind)
            self.types[cast], value = kind, cast
        low, high = self.scheme.ranges[source]
        number_format = self.scheme.number_format
        scale = _held(np.array(activation_scale(low, high, number_format), np.float32), kind, number_format)
        mark = f"{value}/{MARK}"
        stored = [self._store(f"{mark}/scale", scale), self._store(f"{mark}/zero", number_format.zero)]
        self._node("QuantizeLinear", [value, *stored], f"{mark}/bytes")
        self._node("DequantizeLinear", [f"{mark}/bytes", *stored], f"{mark}/back")
        return f"{mark}/back"

    def _kind(self, node: onnx.NodeProto) -> int:
        kind = self.types.get(node.input[0], 0)
        if kind not in _TYPES:
            raise ExportError(
                f"{node.name}: INT8 files are made from fp16 or fp32 only; run `moebius-export precision --to fp16`"
            )
        return kind

    def _store(self, name: str, array: Array) -> str:
        if name not in self.made:
            self.made.add(name)
            self.model.graph.initializer.append(numpy_helper.from_array(array.copy(order="C"), name))
        return name

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
        if output not in self.made:
            self.made.add(output)
            self.nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))

    def _model(self) -> onnx.ModelProto:
        graph = self.model.graph
        needed, kept = {value.name for value in graph.output}, []
        for node in reversed(self.nodes):
            if any(output in needed for output in node.output):
                kept.append(node)
                needed.update(node.input)
        del graph.node[:], graph.value_info[:]
        graph.node.extend(reversed(kept))
        stored = [tensor for tensor in graph.initializer if tensor.name in needed]
        del graph.initializer[:]
        graph.initializer.extend(stored)
        return with_types(self.model)


def _held(scales: Array, kind: int, number_format: Format) -> Array:
    """Scales in a narrower type, rounded up where rounding down would clip values."""
    narrow = scales.astype(_TYPES[kind])
    if kind == TensorProto.FLOAT16:
        narrow = np.where(narrow.astype(np.float32) < scales, np.nextafter(narrow, np.float16(np.inf)), narrow)
        if (narrow.astype(np.float32) * number_format.largest > np.finfo(np.float16).max).any():
            raise ExportError("a range is beyond what float16 holds; keep that node in float")
    return np.asarray(narrow, _TYPES[kind])
