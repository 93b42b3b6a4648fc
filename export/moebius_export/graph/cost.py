"""Multiply-accumulate operations (MAC) of an ONNX graph, node by node, from its shapes alone. Needs onnx, not torch.

Counts the MACs of convolutions, matrix products and Einsum. Element-wise operations,
normalisations and resizing do not count, as in the papers of this field; they cost memory traffic, not MACs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import onnx
from onnx import inliner, shape_inference

from moebius_export.errors import CostError

Shape = tuple[int, ...]

_CONVOLUTIONS = ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv")
# Operators with MACs that this module cannot count: a graph that holds one is refused, not undercounted.
_REFUSED = ("Attention", "DeformConv", "GRU", "LSTM", "RNN", "RotaryEmbedding")
# Operators of ONNX Runtime's own domain without MACs.
_FREE_ELSEWHERE = (
    *("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "GroupNorm", "SkipGroupNorm", "SkipLayerNormalization"),
    *("QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearSigmoid", "QLinearSoftmax", "QLinearAveragePool"),
    *("QuantizeLinear", "DequantizeLinear", "ReorderInput", "ReorderOutput", "NhwcMaxPool"),
)
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class NodeCost:
    """MACs of one node.

    `dtype` is the element type of its multiplications, such as FLOAT or INT8. `of_bytes`: both operands are
    whole numbers of a byte, by their type or because they come from a quantisation, as in the Q/DQ form and in the
    bodies of `moebius::Int8...`; a runtime that knows these multiplies bytes.
    """

    name: str
    op_type: str
    macs: int
    dtype: str
    of_bytes: bool = False

    @property
    def is_convolution(self) -> bool:
        """Whether the paper counts it: the paper's GFLOPs are the convolutions' MACs."""
        return self.op_type in _CONVOLUTIONS


def node_costs(model: onnx.ModelProto | str | Path, *, batch: int = 1) -> list[NodeCost]:
    """Every node that has MACs, in the order of the graph. Model-local functions are counted at each call.

    Args:
        model: the graph or its file. Weights are not needed and not read.
        batch: what stands for every dimension that the graph's inputs leave open.

    Raises:
        CostError: a shape cannot be inferred, or an operator is not known here.
    """
    if not isinstance(model, onnx.ModelProto):
        model = onnx.load(str(model), load_external_data=False)
    if model.functions:
        model = inlined(model)
        _state_shapes(model)
    for node in model.graph.node:
        if any(attribute.type in _SUBGRAPHS for attribute in node.attribute):
            raise CostError(f"{_label(node)}: control flow has no fixed cost; count a graph without it")
        if node.op_type not in _COUNTERS:
            _check_free(node)
    model = _with_shapes(model, batch)
    types = _value_types(model.graph)
    bytes_there = _Bytes(model.graph, types)
    costs = []
    for node in (node for node in model.graph.node if node.op_type in _COUNTERS):
        shapes = [types.get(name, (None, None))[0] if name else None for name in node.input]
        output = types.get(node.output[0], (None, None))[0]
        macs = _COUNTERS[node.op_type](_Node(node, shapes, output))
        place = _WEIGHT_INPUT.get(node.op_type, 1 if len(node.input) > 1 else 0)
        dtype = types[node.input[place]][1] or "UNDEFINED"
        of_bytes = bytes_there.holds(node.input[0]) and bytes_there.holds(node.input[place])
        costs.append(NodeCost(node.name, node.op_type, macs, dtype, of_bytes))
    return costs


def total_macs(costs: Iterable[NodeCost]) -> int:
    """MACs of all nodes."""
    return sum(cost.macs for cost in costs)


def convolution_macs(costs: Iterable[NodeCost]) -> int:
    """MACs of the convolutions alone, which the paper calls FLOPs."""
    return sum(cost.macs for cost in costs if cost.is_convolution)


def byte_macs(costs: Iterable[NodeCost]) -> int:
    """MACs of INT8 operands."""
    return sum(cost.macs for cost in costs if cost.of_bytes)


def macs_by_dtype(costs: Iterable[NodeCost]) -> dict[str, int]:
    """MACs per element type."""
    counter: Counter[str] = Counter()
    for cost in costs:
        counter[cost.dtype] += cost.macs
    return dict(counter)


def function_calls(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that call a model-local function, in the order of the graph."""
    functions = {(function.domain, function.name) for function in model.functions}
    return [node for node in model.graph.node if (node.domain, node.op_type) in functions]


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions; a node of a body is called CALL/NODE, where the inliner writes NODE__NUMBER."""
    calls = [node.name for node in function_calls(model)]
    model = inliner.inline_local_functions(model)
    for node in model.graph.node:
        body, mark, number = node.name.rpartition("__")
        if mark and number.isdecimal() and 1 <= int(number) <= len(calls):
            node.name = f"{calls[int(number) - 1]}/{body}"
    return model


def _state_shapes(model: onnx.ModelProto) -> None:
    """Makes constants of the shapes of stored tensors, which bodies ask for and shape inference does not follow."""
    stored = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Shape" and node.input[0] in stored and not node.attribute:
            dims = onnx.helper.make_attribute("value_ints", stored[node.input[0]])
            node.op_type = "Constant"
            del node.input[:]
            node.attribute.append(dims)


_SUBGRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclass(frozen=True)
class _Node:
    """A node with the shapes of its inputs (None: absent or unknown) and of its first output."""

    proto: onnx.NodeProto
    inputs: Sequence[Shape | None]
    output: Shape | None

    def shape(self, index: int) -> Shape:
        shape = self.inputs[index] if index < len(self.inputs) else None
        if shape is None:
            raise CostError(f"{_label(self.proto)}: the shape of its input {index} cannot be inferred")
        return shape

    @property
    def out(self) -> Shape:
        if self.output is None:
            raise CostError(f"{_label(self.proto)}: the shape of its output cannot be inferred")
        return self.output

    def attribute(self, name: str, default: object) -> object:
        for attribute in self.proto.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        return default


def _convolution(weight: int) -> Callable[[_Node], int]:
    # Weight [out, in / group, kernel ...]: each output element sums over everything but the first axis.
    return lambda node: prod(node.out) * prod(node.shape(weight)[1:])


def _transposed_convolution(node: _Node) -> int:
    # Weight [in, out / group, kernel ...]: each input element goes into everything but the first axis.
    return prod(node.shape(0)) * prod(node.shape(1)[1:])


def _matrix_product(node: _Node) -> int:
    return prod(node.out) * node.shape(0)[-1]


def _gemm(node: _Node) -> int:
    return prod(node.out) * node.shape(0)[0 if node.attribute("transA", 0) else 1]


def _fused_matrix_product(node: _Node) -> int:
    shape = node.shape(0)
    if node.attribute("transBatchA", 0):
        raise CostError(f"{_label(node.proto)}: transBatchA is not counted")
    return prod(node.out) * shape[-2 if node.attribute("transA", 0) else -1]


def _einsum(node: _Node) -> int:
    equation = node.attribute("equation", b"")
    assert isinstance(equation, bytes)
    return einsum_macs(equation.decode(), [node.shape(i) for i in range(len(node.inputs))])


def einsum_macs(equation: str, shapes: Sequence[Shape]) -> int:
    """Products of an Einsum whose operands are joined from left to right, as runtimes do.

    A letter that neither the output nor a later operand has is summed away at once. One operand has no MACs.

    Raises:
        CostError: the equation does not fit the shapes.
    """
    left, arrow, right = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(shapes):
        raise CostError(f"einsum {equation!r} has {len(terms)} operands, got {len(shapes)} shapes")
    sizes: dict[str, int] = {}
    operands = [_letters(term, shape, sizes, equation) for term, shape in zip(terms, shapes, strict=True)]
    spread = {letter for letter in sizes if letter.startswith("...")}
    if arrow:
        output = set(right.replace("...", "")) | (spread if "..." in right else set())
    else:  # implicit output: every letter that occurs once, and the ellipsis
        counts = Counter(letter for letter in left.replace("...", "") if letter != ",")
        output = {letter for letter, count in counts.items() if count == 1} | spread
    macs, joined = 0, operands[0]
    for index, operand in enumerate(operands[1:], start=1):
        union = joined | operand
        macs += prod(sizes[letter] for letter in union)
        later = set().union(*operands[index + 1 :])
        joined = {letter for letter in union if letter in output or letter in later}
    return macs


def _letters(term: str, shape: Shape, sizes: dict[str, int], equation: str) -> set[str]:
    """The indices of one operand, with their sizes noted; those of an ellipsis are counted from its right end."""
    before, dots, after = term.partition("...")
    hidden = len(shape) - len(before) - len(after)
    if hidden < 0 or (hidden and not dots):
        raise CostError(f"einsum {equation!r}: operand {term!r} does not fit the shape {list(shape)}")
    names = [*before, *(f"...{i}" for i in range(hidden, 0, -1)), *after]
    for name, size in zip(names, shape, strict=True):
        known = sizes.get(name, 1)
        if size != known and 1 not in (size, known):
            raise CostError(f"einsum {equation!r}: index {name!r} is both {known} and {size}")
        sizes[name] = max(size, known)
    return set(names)


_COUNTERS: Mapping[str, Callable[[_Node], int]] = {
    "Conv": _convolution(1),
    "ConvInteger": _convolution(1),
    "FusedConv": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    "MatMul": _matrix_product,
    "MatMulInteger": _matrix_product,
    "QLinearMatMul": _matrix_product,
    "MatMulIntegerToFloat": _matrix_product,
    "DynamicQuantizeMatMul": _matrix_product,
    "FusedMatMul": _fused_matrix_product,
    "Gemm": _gemm,
    "QGemm": _gemm,
    "FusedGemm": _gemm,
    "Einsum": _einsum,
}
_WEIGHT_INPUT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}


# What a value passes through and is the same whole numbers behind: moves, casts, a cut, less a zero point.
_SAME_NUMBERS = (
    *("Cast", "Clip", "Flatten", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
)
_ROUNDED = ("DequantizeLinear", "QuantizeLinear", "Round")


class _Bytes:
    """Which values are whole numbers of a byte, times a scale at most."""

    def __init__(self, graph: onnx.GraphProto, types: Mapping[str, tuple[Shape | None, str | None]]) -> None:
        self._makers = {output: node for node in graph.node for output in node.output}
        self._types = types
        self._known: dict[str, bool] = {}

    def holds(self, value: str) -> bool:
        path = []
        while value not in self._known:
            path.append(value)
            maker = self._makers.get(value)
            if self._types.get(value, (None, None))[1] in ("INT8", "UINT8", "FLOAT8E4M3FN"):
                self._known[value] = True
            elif maker is None or maker.op_type not in (*_SAME_NUMBERS, *_ROUNDED):
                self._known[value] = False
            elif maker.op_type in _ROUNDED:
                self._known[value] = True
            else:
                value = maker.input[0]
        found = self._known[value]
        self._known.update(dict.fromkeys(path, found))
        return found


def _check_free(node: onnx.NodeProto) -> None:
    if node.domain in _STANDARD and node.op_type not in _REFUSED:
        return
    if node.domain not in _STANDARD and node.op_type in _FREE_ELSEWHERE:
        return
    raise CostError(
        f"{_label(node)}: operator {node.domain or 'ai.onnx'}::{node.op_type} is not known here, so the graph's cost "
        "would be too low; give the operator a function body, or add it to moebius_export/cost.py"
    )


def _label(node: onnx.NodeProto) -> str:
    return f"node {node.name or node.output[0]!r} ({node.op_type})"


def _with_shapes(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The model with every shape inferred; the original is left as it is."""
    opened = [
        dimension
        for value in model.graph.input
        for dimension in value.type.tensor_type.shape.dim
        if not dimension.HasField("dim_value")
    ]
    if opened:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        for value in copy.graph.input:
            for dimension in value.type.tensor_type.shape.dim:
                if not dimension.HasField("dim_value"):
                    dimension.dim_value = batch
        del copy.graph.value_info[:]  # shapes in terms of the open dimension
        for value in copy.graph.output:
            value.type.tensor_type.ClearField("shape")
        model = copy
    try:
        return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (shape_inference.InferenceError, ValueError) as error:
        raise CostError(f"the graph's shapes contradict each other: {' '.join(str(error).split())[:300]}") from error


def _value_types(graph: onnx.GraphProto) -> dict[str, tuple[Shape | None, str | None]]:
    """Name -> (shape or None, element type) of every value and initializer."""
    types: dict[str, tuple[Shape | None, str | None]] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        dimensions = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
        known = tensor.HasField("shape") and None not in dimensions
        shape = tuple(d for d in dimensions if d is not None) if known else None
        types[value.name] = (shape, onnx.TensorProto.DataType.Name(tensor.elem_type))
    for tensor in graph.initializer:
        types[tensor.name] = (tuple(tensor.dims), onnx.TensorProto.DataType.Name(tensor.data_type))
    return types
