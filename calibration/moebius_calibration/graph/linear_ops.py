"""The convolutions and matrix products of a float32 graph, which could be quantized, and their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from moebius_export.graph.cost import node_costs
from moebius_export.graph.opened import MOVES, Opened, Weights
from moebius_export.graph.sessions import session_of

Array = np.ndarray

OPERATORS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True)
class Operand:
    """An input of a linear operator.

    Attributes:
        index: position among the node's inputs.
        value: its name.
        constant: whether it is computed from stored tensors alone: a weight.
        source: for an activation, the value before any moves of data (`Transpose`, `Reshape` and so on). Ranges are
            measured on it.
        axis: for an activation that multiplies a weight, the axis that the operator sums over (channels); None where
            both inputs are activations. For a weight, the axis of the outputs; None for a batch of matrices.
        concat_parts: for the input of a convolution that is a concatenation of channels, its parts and their numbers of
            channels. Each part has a scale of its own.
    """

    index: int
    value: str
    constant: bool
    source: str
    axis: int | None
    concat_parts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class LinearOp:
    """A convolution or a matrix product: one node `Conv`, `MatMul` or `Gemm`.

    Attributes:
        node, op_type: name and type of the node.
        operands: its two inputs that are multiplied.
        gmac: its MACs, in units of 10^9.
        elements, weights: numbers of values of its activations and of its weight.
        residual: of a convolution whose output is only added to another activation: the name of the Add, the position
            of that activation among its inputs, and the activation.
    """

    node: str
    op_type: str
    operands: tuple[Operand, ...]
    gmac: float
    elements: int
    weights: int
    residual: tuple[str, int, str] | None = None

    @property
    def activations(self) -> tuple[Operand, ...]:
        """Its inputs that are not weights."""
        return tuple(operand for operand in self.operands if not operand.constant)

    @property
    def weight(self) -> Operand | None:
        """The weight, if it has one."""
        return next((operand for operand in self.operands if operand.constant), None)

    @property
    def ranged(self) -> tuple[str, ...]:
        """Values that need a range: the sources of its activations, or the parts of a concatenation."""
        return tuple(
            name
            for operand in self.activations
            for name in ([part for part, _ in operand.concat_parts] if operand.concat_parts else [operand.source])
        )

    @property
    def watched(self) -> tuple[str, ...]:
        """Values that are observed: `ranged`, the whole of a concatenation, and the residual."""
        whole = [operand.source for operand in self.activations if operand.concat_parts]
        return (*self.ranged, *whole, *([self.residual[2]] if self.residual else []))


def linear_ops_of(graph: Opened) -> dict[str, LinearOp]:
    """The linear operators of an opened float32 graph by node name, in its order, without those of weights alone."""
    macs: dict[str, float] = {}
    for cost in node_costs(graph.model):
        macs[cost.name] = macs.get(cost.name, 0.0) + cost.macs / 1e9
    shapes = shapes_of(graph.model)
    found = {}
    for node in graph.model.graph.node:
        if node.op_type not in OPERATORS or node.domain not in ("", "ai.onnx") or node.output[0] in graph.constant:
            continue
        operands = tuple(_operand(graph, node, index, shapes) for index in (0, 1))
        activations = [operand for operand in operands if not operand.constant]
        found[node.name] = LinearOp(
            node=node.name,
            op_type=node.op_type,
            operands=operands,
            gmac=macs.get(node.name, 0.0),
            elements=sum(graph.sizes.get(operand.value, 0) for operand in activations),
            weights=sum(graph.sizes.get(operand.value, 0) for operand in operands if operand.constant),
            residual=_residual(graph, node),
        )
    return found


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of every value and stored tensor, an open dimension as 1."""
    graph = model.graph
    found = {
        value.name: tuple(dimension.dim_value or 1 for dimension in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.output, *graph.value_info)
    }
    return found | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def source_of(graph: Opened, value: str) -> str:
    """The value before the moves of data that lead to this one."""
    while (node := graph.producers.get(value)) is not None and node.op_type in MOVES and node.op_type != "Pad":
        inputs = list(graph.float_inputs(node))
        if len(inputs) != 1 or node.input[inputs[0]] in graph.constant:
            return value
        value = node.input[inputs[0]]
    return value


def _operand(graph: Opened, node: onnx.NodeProto, index: int, shapes: Mapping[str, tuple[int, ...]]) -> Operand:
    value = node.input[index]
    rank = len(shapes.get(value, ()))
    if value in graph.constant:
        if node.op_type == "Conv":
            return Operand(index, value, True, value, 0)
        return Operand(index, value, True, value, 1 - _summed(node, index, rank) if rank == 2 else None)
    if node.op_type == "Conv":
        return Operand(index, value, False, source_of(graph, value), 1, _concat_parts(graph, node, shapes))
    other = node.input[1 - index]
    meets = other in graph.constant and len(shapes.get(other, ())) == 2
    return Operand(index, value, False, source_of(graph, value), _summed(node, index, rank) if meets else None)


def _summed(node: onnx.NodeProto, index: int, rank: int) -> int:
    """The axis of an input that a matrix product sums over."""
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    transposed = bool(attributes.get("transB" if index == 1 else "transA", 0))
    last = (index == 0) != transposed
    return rank - 1 if last else rank - 2


def _concat_parts(
    graph: Opened, node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tuple[str, int], ...]:
    """The parts that a convolution's input is concatenated from along its channels; empty where it cannot be split."""
    maker = graph.producers.get(node.input[0])
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if maker is None or maker.op_type != "Concat" or attributes.get("group", 1) != 1:
        return ()
    if helper.get_attribute_value(maker.attribute[0]) != 1 or any(name in graph.constant for name in maker.input):
        return ()
    return tuple((name, shapes[name][1]) for name in maker.input)


def _residual(graph: Opened, node: onnx.NodeProto) -> tuple[str, int, str] | None:
    readers = graph.consumers.get(node.output[0], [])
    ends = {value.name for value in graph.model.graph.output}
    if node.op_type != "Conv" or len(readers) != 1 or readers[0].op_type != "Add" or node.output[0] in ends:
        return None
    add = readers[0]
    index = 1 if add.input[0] == node.output[0] else 0
    other = add.input[index]
    if other in graph.constant or other == node.output[0]:
        return None
    if graph.sizes.get(other) != graph.sizes.get(node.output[0]):
        return None  # a vector per channel, no residual
    return add.name, index, other


def constant_values(graph: Opened, folder: Path, names: list[str]) -> dict[str, Array]:
    """The values of constants, float32: read where they are stored, else (merged kernels) computed.

    Args:
        graph: opened float32 graph.
        folder: of its weights file.
        names: constants of the graph.
    """
    weights = Weights(folder)
    found = {name: weights.array(graph.stored[name]) for name in names if name in graph.stored}
    made = [name for name in names if name not in graph.stored]
    if made:
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        needed, kept = set(made), []
        for node in reversed(graph.model.graph.node):
            if any(output in needed for output in node.output):
                kept.append(node)
                needed.update(node.input)
        del model.graph.node[:], model.graph.input[:], model.graph.output[:], model.graph.value_info[:]
        model.graph.node.extend(reversed(kept))
        stored = [tensor for tensor in graph.model.graph.initializer if tensor.name in needed]
        del model.graph.initializer[:]
        model.graph.initializer.extend(stored)
        for name in made:
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        session = session_of(model, folder, threads=1)
        found |= dict(zip(made, session.run(None, {}), strict=True))
    return {name: np.asarray(found[name], np.float32) for name in names}
