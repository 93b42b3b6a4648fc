"""Nodes of the fused float32 graph that ONNX Runtime's CPU can run as INT8 operators, see `files.ort_cpu`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx
from onnx import helper, numpy_helper

from moebius_export.graph.function_bodies import DOMAIN
from moebius_export.graph.int8_bodies import PACKED

_CONVOLUTIONS = ("Conv3x3", "UpsampleConv3x3")
_BLOCKS = ("ResidualBlock", "ProjectedResidualBlock")


@dataclass(frozen=True)
class Candidate:
    """A node that an INT8 operator can replace.

    Attributes:
        node: its name.
        operator: the INT8 operator.
        activations: values that need a range, in the order of the operator's quantizers.
        weights: stored matrices, in the same order; [outputs, inputs], for `Int8Linear` [inputs, outputs].
        absorbed: other nodes that it replaces too.
        output: the value that the new node computes.
        bias: the stored bias of a linear layer.
        norm: the absorbed norm, with which the operator begins.
        skip: the value that it adds to its result.
    """

    node: str
    operator: str
    activations: tuple[str, ...]
    weights: tuple[str, ...]
    output: str
    absorbed: tuple[str, ...] = ()
    bias: str | None = None
    norm: str | None = None
    skip: str | None = None

    @property
    def of_tokens(self) -> bool:
        """Whether it is a linear layer whose weights are stored as [inputs, outputs]."""
        return self.operator in ("Int8Linear", "Int8NormLinear", "Int8LinearOfPicture")


def candidates(model: onnx.ModelProto) -> tuple[dict[str, Candidate], dict[str, str]]:
    """The nodes of a fused float32 graph that INT8 operators can replace, and why others cannot: both by node name.

    Args:
        model: the graph as `moebius-export onnx` writes it, functions not inlined; weights need not be loaded.
    """
    view = _View(model)
    found: dict[str, Candidate] = {}
    refused: dict[str, str] = {}
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == "FeedForward":
            made: Candidate | str = _feed_forward(view, node)
        elif node.domain == DOMAIN and node.op_type in _BLOCKS:
            made = _block(view, node)
        elif operator := _convolution_operator(view, node):
            made = _convolution(view, node, operator)
        elif node.op_type == "Gemm" and node.input[1] in view.dims:
            made = _gemm(view, node)
        elif node.op_type == "MatMul" and any(name in view.dims for name in node.input):
            made = _linear(view, node)
        else:
            continue
        if isinstance(made, str):
            refused[node.name] = made
        else:
            found[node.name] = made
    return found, refused


class _View:
    """Producers and consumers of each value, and the shapes of stored tensors."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        self.producers = {output: node for node in model.graph.node for output in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in model.graph.output}
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.external_data}

    def numbers(self, name: str) -> list[float]:
        """The numbers of a small stored tensor, such as a shape; none of another value."""
        tensor = self._stored.get(name)
        return [] if tensor is None else numpy_helper.to_array(tensor).reshape(-1).tolist()

    def sole_consumer(self, value: str) -> onnx.NodeProto | None:
        consumers = self.consumers.get(value, [])
        return consumers[0] if len(consumers) == 1 and value not in self.outputs else None


def _not_in_fours(channels: int) -> str | None:
    return f"{channels} channels are not a multiple of 4" if channels % 4 else None


def _feed_forward(view: _View, node: onnx.NodeProto) -> Candidate | str:
    hidden, channels = view.dims[node.input[1]][:2]
    if hidden % (2 * PACKED):
        return f"{hidden} expanded channels are not a multiple of {2 * PACKED}"
    activations = (node.input[0], f"{node.name}/gated")
    made = Candidate(node.name, "Int8FeedForward", activations, (node.input[1], node.input[5]), node.output[0])
    norm, add = _token_norm(view, node.input[0]), view.sole_consumer(node.output[0])
    if norm and add is not None and add.op_type == "Add" and set(add.input) == {norm.input[0], node.output[0]}:
        absorbed = (norm.name, add.name)
        made = replace(made, operator="Int8NormFeedForward", absorbed=absorbed, norm=norm.name, output=add.output[0])
    return _not_in_fours(channels) or made


def _block(view: _View, node: onnx.NodeProto) -> Candidate | str:
    first, second = node.input[6], node.input[12]
    inputs, outputs = view.dims[first][1], view.dims[second][1]
    activations = [f"{node.name}/first_positive", f"{node.name}/second_positive"]
    weights = [first, second]
    if node.op_type == "ProjectedResidualBlock":
        activations.append(node.input[0])
        weights.append(node.input[14])
    made = Candidate(node.name, f"Int8{node.op_type}", tuple(activations), tuple(weights), node.output[0])
    return _not_in_fours(inputs) or _not_in_fours(outputs) or made


def _convolution_operator(view: _View, node: onnx.NodeProto) -> str | None:
    """The INT8 operator of a convolution with one group and a stored bias: 3x3, with stride 1 or 2, or 1x1."""
    if node.domain == DOMAIN and node.op_type in _CONVOLUTIONS:
        return f"Int8{node.op_type}"
    if node.op_type != "Conv":
        return None
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    plain = attributes.get("group", 1) == 1 and set(attributes.get("dilations", [1])) == {1}
    plain &= attributes.get("auto_pad", b"NOTSET") == b"NOTSET"
    if not plain or len(node.input) != 3 or not all(name in view.dims for name in node.input[1:]):
        return None
    taps, strides = view.dims[node.input[1]][2:], list(attributes.get("strides", [1, 1]))
    pads = list(attributes.get("pads", [0] * 4))
    if taps == (3, 3) and strides == [2, 2] and pads in ([1, 1, 1, 1], [0, 0, 1, 1]):
        return "Int8DownsampleConv3x3"
    # One of few channels, as at the ends of a network, has nothing to gain.
    wide = min(view.dims[node.input[1]][:2]) >= PACKED
    return "Int8Conv1x1" if taps == (1, 1) and strides == [1, 1] and not any(pads) and wide else None


def _convolution(view: _View, node: onnx.NodeProto, operator: str) -> Candidate | str:
    made = Candidate(node.name, operator, (node.input[0],), (node.input[1],), node.output[0])
    active = _active_norm(view, node.input[0]) if operator == "Int8Conv3x3" else ()
    if active:
        made = replace(made, operator="Int8NormConv3x3", absorbed=active, norm=active[-1])
    return _not_in_fours(view.dims[node.input[1]][1]) or made


def _active_norm(view: _View, value: str) -> tuple[str, ...]:
    """The nodes of SiLU(GroupNorm) that compute a value with one consumer, the norm last; empty for another value."""
    product = view.producers.get(value)
    if product is None or product.op_type != "Mul" or view.sole_consumer(value) is None:
        return ()
    sigmoids = [made for name in product.input if (made := view.producers.get(name)) and made.op_type == "Sigmoid"]
    if len(sigmoids) != 1:
        return ()
    normed = sigmoids[0].input[0]
    norm = view.producers.get(normed)
    if norm is None or norm.domain != DOMAIN or norm.op_type != "GroupNorm":
        return ()
    inside = set(product.input) == {normed, sigmoids[0].output[0]} and len(view.consumers[normed]) == 2
    inside &= view.sole_consumer(sigmoids[0].output[0]) is product and normed not in view.outputs
    return (product.name, sigmoids[0].name, norm.name) if inside else ()


def _gemm(view: _View, node: onnx.NodeProto) -> Candidate | str:
    """A product of tokens [tokens, inputs] by weights [inputs, outputs], as simplifiers write it in small graphs."""
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    if attributes.get("transA", 0) or attributes.get("transB", 0) or {attributes.get("alpha", 1.0)} != {1.0}:
        return "it transposes or scales its inputs"
    inputs, outputs = view.dims[node.input[1]]
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    if bias is not None and (view.dims.get(bias) != (outputs,) or attributes.get("beta", 1.0) != 1.0):
        return "its bias is not one stored number for each output"
    made = Candidate(node.name, "Int8Linear", (node.input[0],), (node.input[1],), node.output[0], (), bias)
    return _not_in_fours(inputs) or made


def _linear(view: _View, node: onnx.NodeProto) -> Candidate | str:
    of_tokens = node.input[1] in view.dims
    weight, x = (node.input[1], node.input[0]) if of_tokens else (node.input[0], node.input[1])
    if len(view.dims[weight]) != 2:
        return "its weight is not a matrix"
    outputs, inputs = view.dims[weight][::-1] if of_tokens else view.dims[weight]
    output, absorbed, bias = node.output[0], [], None
    if not of_tokens:
        turn = view.producers.get(x)
        if turn is None or turn.op_type != "Transpose" or list(turn.attribute[0].ints) != [0, 2, 1]:
            return "its right input is not a transposition of tokens"
        if view.sole_consumer(x) is not None:  # another consumer needs the transposition
            absorbed.append(turn.name)
        x = turn.input[0]
    add = view.sole_consumer(output)
    if add is not None and add.op_type == "Add":
        other = add.input[1] if add.input[0] == output else add.input[0]
        if view.dims.get(other) == ((outputs,) if of_tokens else (outputs, 1)):
            output, bias = add.output[0], other
            absorbed.append(add.name)
    operator = "Int8Linear" if of_tokens else "Int8LinearToPicture"
    made = Candidate(node.name, operator, (x,), (weight,), output, tuple(absorbed), bias)
    return _not_in_fours(inputs) or (_with_front(view, made) if of_tokens else _with_sum(view, made))


def _token_norm(view: _View, value: str) -> onnx.NodeProto | None:
    """The layer norm over channels, with stored gain and shift, that computes a value with one consumer."""
    norm = view.producers.get(value)
    if norm is None or norm.op_type != "LayerNormalization" or view.sole_consumer(value) is None:
        return None
    stored = len(norm.input) == 3 and all(name in view.dims for name in norm.input[1:])
    over = next((one.i for one in norm.attribute if one.name == "axis"), -1)
    return norm if stored and over == -1 else None


def _with_front(view: _View, made: Candidate) -> Candidate:
    """A linear layer of tokens with what computes only them: a layer norm, or a picture's group norm."""
    norm = _token_norm(view, made.activations[0])
    if norm is not None:
        return replace(made, operator="Int8NormLinear", absorbed=(*made.absorbed, norm.name), norm=norm.name)
    chain = []
    value = made.activations[0]
    for kind in ("Transpose", "Reshape", "InstanceNormalization", "Reshape"):
        node = view.producers.get(value)
        if node is None or node.op_type != kind or view.sole_consumer(value) is None:
            return made
        chain.append(node)
        value = node.input[0]
    turn, rows, norm, groups = chain
    to_rows, to_groups = view.numbers(rows.input[1]), view.numbers(groups.input[1])
    plain = list(turn.attribute[0].ints) == [0, 2, 1] and len(to_rows) == 3 and len(to_groups) == 3
    plain &= view.numbers(norm.input[1]) == [1.0] * len(view.numbers(norm.input[1])) != []
    plain &= not any(view.numbers(norm.input[2]))
    if not plain or view.dims[made.weights[0]][0] not in (to_rows[1], -1) or to_rows[1] <= 0 or to_groups[1] <= 0:
        return made
    absorbed = (*made.absorbed, *(node.name for node in chain))
    return replace(made, operator="Int8LinearOfPicture", absorbed=absorbed, norm=norm.name)


def _with_sum(view: _View, made: Candidate) -> Candidate:
    """A linear layer to a picture, with the sum of this picture and another one that follows."""
    shape = view.sole_consumer(made.output)
    if shape is None or shape.op_type != "Reshape" or shape.input[0] != made.output:
        return made
    add = view.sole_consumer(shape.output[0])
    if len(view.numbers(shape.input[1])) != 4 or add is None or add.op_type != "Add":
        return made
    others = [name for name in add.input if name != shape.output[0]]
    if len(others) != 1 or others[0] in view.dims:
        return made
    absorbed, output = (*made.absorbed, shape.name, add.name), add.output[0]
    return replace(made, operator="Int8LinearAddedToPicture", absorbed=absorbed, output=output, skip=others[0])
