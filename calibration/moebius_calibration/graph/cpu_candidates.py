"""Nodes of the fused float32 graph that ONNX Runtime's CPU can run as INT8 operators, see `files.ort_cpu`."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

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
    """

    node: str
    operator: str
    activations: tuple[str, ...]
    weights: tuple[str, ...]
    output: str
    absorbed: tuple[str, ...] = ()
    bias: str | None = None


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
        elif (node.domain == DOMAIN and node.op_type in _CONVOLUTIONS) or _is_downsampling(view, node):
            made = _convolution(view, node)
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
    return _not_in_fours(channels) or Candidate(
        node.name, "Int8FeedForward", activations, (node.input[1], node.input[5]), node.output[0]
    )


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


def _is_downsampling(view: _View, node: onnx.NodeProto) -> bool:
    """Whether a node is a 3x3 convolution with stride 2, padding 1, one group and a stored bias."""
    if node.op_type != "Conv":
        return False
    attributes = {one.name: helper.get_attribute_value(one) for one in node.attribute}
    plain = attributes.get("group", 1) == 1 and set(attributes.get("dilations", [1])) == {1}
    plain &= attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and list(attributes.get("pads", [])) == [1] * 4
    stored = len(node.input) == 3 and all(name in view.dims for name in node.input[1:])
    return plain and stored and list(attributes.get("strides", [])) == [2, 2] and view.dims[node.input[1]][2:] == (3, 3)


def _convolution(view: _View, node: onnx.NodeProto) -> Candidate | str:
    operator = f"Int8{node.op_type}" if node.op_type in _CONVOLUTIONS else "Int8DownsampleConv3x3"
    made = Candidate(node.name, operator, (node.input[0],), (node.input[1],), node.output[0])
    return _not_in_fours(view.dims[node.input[1]][1]) or made


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
    return _not_in_fours(inputs) or Candidate(node.name, operator, (x,), (weight,), output, tuple(absorbed), bias)
