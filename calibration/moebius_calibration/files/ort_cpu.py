"""INT8 files for ONNX Runtime on the CPU: whole layers become INT8 operators with float32 inputs and outputs.

Nodes `QuantizeLinear` and `DequantizeLinear` would cost more than INT8 arithmetic saves. So a node of the fused
float32 graph becomes an operator of `moebius_export.graph.int8_bodies`, which quantizes activations in the cache.

| node | becomes | activations that need a range |
| --- | --- | --- |
| `FeedForward` | `Int8FeedForward` | its input, NODE/gated |
| the same of a `LayerNormalization`, whose input is added to the result | `Int8NormFeedForward` | the same |
| `ResidualBlock` | `Int8ResidualBlock` | NODE/first_positive, NODE/second_positive |
| `ProjectedResidualBlock` | `Int8ProjectedResidualBlock` | the same, and its input |
| `MatMul` of tokens and weights, with the `Add` of its bias, or `Gemm` | `Int8Linear` | its input |
| the same of a `LayerNormalization` | `Int8NormLinear` | its input |
| the same of a picture's group norm without gain and shift | `Int8LinearOfPicture` | its input |
| `MatMul` of weights and transposed tokens, likewise | `Int8LinearToPicture` | its input before the transposition |
| the same, and the sum with a picture | `Int8LinearAddedToPicture` | the same |
| `Conv3x3` | `Int8Conv3x3` | its input |
| `Conv3x3` of SiLU(`GroupNorm`), all three with no other reader | `Int8NormConv3x3` | its input |
| `Conv`, 3x3, stride 2 | `Int8DownsampleConv3x3` | its input |
| `Conv`, 1x1, of 16 channels or more | `Int8Conv1x1` | its input |
| `UpsampleConv3x3` | `Int8UpsampleConv3x3` | its input |

NODE/VALUE are names of the graph with its functions inlined, as `moebius_export.graph.opened.opened` gives it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from moebius_calibration.files.int8_arrays import Range, int8_product, merged_kernels, packed, quantizer
from moebius_calibration.graph.cpu_candidates import Candidate
from moebius_export.errors import ExportError
from moebius_export.graph.function_bodies import DOMAIN
from moebius_export.graph.int8_bodies import bodies

Array = np.ndarray
Load = Callable[[str], Array]
"""The float32 values of a stored tensor."""


def as_int8(
    model: onnx.ModelProto,
    load: Load,
    chosen: Mapping[str, Candidate],
    ranges: Mapping[str, Range],
    smooth: Mapping[str, Array] | None = None,
) -> onnx.ModelProto:
    """The graph with INT8 operators in place of the chosen nodes.

    Args:
        model: as for `candidates`; unchanged. Stored tensors that remain keep their place in the weights file.
        load: gives the float32 values of a stored tensor by name.
        chosen: some of the candidates, by node.
        ranges: lowest and highest value of each activation that a candidate names.
        smooth: activation -> factors [channels] that divide its values and multiply the following weights, before the
            range applies.

    Raises:
        ExportError: a range is missing or invalid.
    """
    smooth = smooth or {}
    absorbed = {name for candidate in chosen.values() for name in candidate.absorbed}
    out = onnx.ModelProto()
    out.CopyFrom(model)
    del out.graph.node[:]
    del out.graph.value_info[:]
    writer = _Writer(out, model.graph.node, load, ranges, smooth)
    for node in model.graph.node:
        candidate = chosen.get(node.name)
        if candidate is not None:
            out.graph.node.append(writer.replaced(node, candidate))
        elif node.name not in absorbed:
            out.graph.node.append(node)
    _in_order(out.graph)
    _drop_unused(out)
    called = {node.op_type for node in out.graph.node if node.domain == DOMAIN}
    kept = [function for function in out.functions if function.name in called]
    del out.functions[:]
    out.functions.extend(kept)
    out.functions.extend(onnx.parser.parse_function(text) for name, text in sorted(bodies().items()) if name in called)
    for function in out.functions:
        for inner in function.node:
            inner.name = inner.output[0]
    return out


class _Writer:
    """Adds the new nodes and their stored tensors."""

    def __init__(
        self,
        model: onnx.ModelProto,
        nodes: Sequence[onnx.NodeProto],
        load: Load,
        ranges: Mapping[str, Range],
        smooth: Mapping[str, Array],
    ) -> None:
        self._model, self._load, self._ranges, self._smooth = model, load, ranges, smooth
        self._nodes = {node.name: node for node in nodes}
        self._producers = {output: node for node in nodes for output in node.output}
        self._dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}

    def replaced(self, node: onnx.NodeProto, candidate: Candidate) -> onnx.NodeProto:
        inputs, operator = list(node.input), candidate.operator
        x, attributes = self._front(inputs[0], candidate)
        if node.domain == DOMAIN and not operator.endswith("Conv3x3"):
            attributes += node.attribute
        if operator in ("Int8FeedForward", "Int8NormFeedForward"):
            new = [
                *x,
                *self._quantizer(candidate, 0),
                *self._weights_of(candidate, 0, inputs[2], is_packed=True),
                *inputs[3:5],
                *self._quantizer(candidate, 1),
                *self._weights_of(candidate, 1, None, is_packed=True),
            ]
        elif "Linear" in operator:
            of_tokens = candidate.of_tokens
            weights = self._weights_of(candidate, 0, candidate.bias, is_packed=of_tokens, transposed=of_tokens)
            x = x if candidate.norm else [candidate.activations[0]]
            new = [*x, *self._quantizer(candidate, 0), *weights]
        elif operator == "Int8Conv1x1":
            new = [*x, *self._quantizer(candidate, 0), *self._weights_of(candidate, 0, inputs[2])]
        elif operator.endswith("Conv3x3"):
            if operator == "Int8DownsampleConv3x3":
                attributes = [one for one in node.attribute if one.name == "pads"]
            if operator == "Int8UpsampleConv3x3":
                attributes = list(node.attribute)
            new = [*x, *self._quantizer(candidate, 0), *self._convolution(candidate, inputs[2])]
        else:
            new = inputs[:2]
            for index, half in enumerate((inputs[2:8], inputs[8:14])):
                new += [*half[:4], *self._quantizer(candidate, index), *self._weights_of(candidate, index, half[5])]
            if len(inputs) > 14:
                new += [*self._quantizer(candidate, 2), *self._weights_of(candidate, 2, inputs[15])]
        if candidate.skip is not None:
            new.append(candidate.skip)
        made = helper.make_node(operator, new, [candidate.output], name=node.name, domain=DOMAIN)
        made.attribute.extend(attributes)
        return made

    def _front(self, x: str, candidate: Candidate) -> tuple[list[str], list[onnx.AttributeProto]]:
        """The operator's first inputs and the attributes of the norm that it begins with."""
        if candidate.norm is None:
            return [x], []
        norm = self._nodes[candidate.norm]
        if norm.op_type == "GroupNorm":
            return list(norm.input), list(norm.attribute)
        epsilon = next((one.f for one in norm.attribute if one.name == "epsilon"), 1e-5)
        if norm.op_type == "LayerNormalization":
            return list(norm.input), [helper.make_attribute("epsilon", epsilon)]
        of_groups = self._producers[norm.input[0]]
        groups = self._dims[norm.input[1]][0]
        shapes = {
            "ones_shape": [groups],
            "groups_shape": [0, groups, -1],
            "rows_shape": [0, self._channels(candidate, 0), -1],
        }
        values = {"groups": groups, "epsilon": epsilon, **shapes}
        return [of_groups.input[0]], [helper.make_attribute(name, value) for name, value in values.items()]

    def _range(self, candidate: Candidate, index: int) -> tuple[Range, Array | None]:
        name = candidate.activations[index]
        if name not in self._ranges:
            raise ExportError(f"there is no range of {name}, which {candidate.node} needs; calibrate again")
        low, high = self._ranges[name]
        if not (np.isfinite(low) and np.isfinite(high) and low <= high):
            raise ExportError(f"the range of {name} is {low} to {high}; expected two finite numbers in order")
        return (low, high), self._smooth.get(name)

    def _channels(self, candidate: Candidate, index: int) -> int:
        dims = self._dims[candidate.weights[index]]
        return int(dims[0] if candidate.of_tokens else dims[1])

    def _quantizer(self, candidate: Candidate, index: int) -> list[str]:
        limits, factors = self._range(candidate, index)
        inverse, zero = quantizer(limits, self._channels(candidate, index), factors)
        at = f"{candidate.node}/int8/{index}"
        return [self._store(f"{at}/inverse", inverse), self._store(f"{at}/zero", zero)]

    def _weights_of(
        self, candidate: Candidate, index: int, bias: str | None, is_packed: bool = False, transposed: bool = False
    ) -> list[str]:
        stored = self._load(candidate.weights[index])
        dims = stored.shape[2:]
        matrix = stored.T if transposed else stored.reshape(stored.shape[0], -1)
        limits, factors = self._range(candidate, index)
        made = int8_product(matrix, None if bias is None else self._load(bias).reshape(-1), limits, factors)
        weight = packed(made.weight) if is_packed else made.weight.reshape(*made.weight.shape, *dims)
        at = f"{candidate.node}/int8/{index}"
        return [
            self._store(f"{at}/weight", weight),
            self._store(f"{at}/scale", made.scale),
            self._store(f"{at}/offset", made.offset),
        ]

    def _convolution(self, candidate: Candidate, bias: str) -> list[str]:
        """Weights [outputs, taps, inputs]; after an upsampling [4 positions, outputs, taps, inputs]."""
        stored = self._load(candidate.weights[0])
        upsampled = candidate.operator == "Int8UpsampleConv3x3"
        kernels = merged_kernels(stored) if upsampled else stored
        outputs, inputs, *taps = kernels.shape[-4:]
        by_tap = np.moveaxis(kernels, -3, -1).reshape(-1, taps[0] * taps[1] * inputs)
        limits, factors = self._range(candidate, 0)
        every_tap = None if factors is None else np.tile(factors, taps[0] * taps[1])
        made = int8_product(by_tap, np.tile(self._load(bias), len(by_tap) // outputs), limits, every_tap)
        lead = (4, outputs) if upsampled else (outputs,)
        at = f"{candidate.node}/int8/0"
        return [
            self._store(f"{at}/weight", made.weight.reshape(*lead, *taps, inputs)),
            self._store(f"{at}/scale", made.scale.reshape(lead)),
            self._store(f"{at}/offset", made.offset.reshape(lead)),
        ]

    def _store(self, name: str, array: Array) -> str:
        self._model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name


def _in_order(graph: onnx.GraphProto) -> None:
    """Sorts nodes after their producers: a node with the bias of a later Add now computes the value of that Add."""
    made = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        ready = [node for node in waiting if all(name in made for name in node.input)]
        if not ready:
            raise ExportError("the graph's nodes cannot be put in order; export the bundle again")
        for node in ready:
            made.update(node.output)
        ordered += ready
        waiting = [node for node in waiting if not all(name in made for name in node.output)]
    del graph.node[:]
    graph.node.extend(ordered)


def _drop_unused(model: onnx.ModelProto) -> None:
    """Removes nodes and stored tensors that nothing reads."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(output in needed for output in node.output):
            kept.append(node)
            needed.update(node.input)
    del model.graph.node[:]
    model.graph.node.extend(reversed(kept))
    stored = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(stored)
