"""ONNX graphs prepared for precision planning: functions inlined, constants as initializers, and all types inferred.

Weights are not loaded: initializers keep their reference to the weights file, and `Weights` reads them one at a time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, inliner, numpy_helper, shape_inference

from moebius_export.errors import ExportError
from moebius_export.graph.cost import function_calls
from moebius_runtime.kernels import DOMAIN

FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
# They move values unchanged, so they run in any type.
MOVES = frozenset(
    {
        *("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Identity", "Expand"),
        *("Slice", "Split", "Concat", "Gather", "Pad", "DepthToSpace"),
    }
)


def opened(path: Path, keep: Collection[str] = ()) -> onnx.ModelProto:
    """Returns the model of a file with its functions inlined, except those in `keep`, and constants as initializers.

    Nodes of a function's body are called CALL/NODE. Every value has the name of the node that makes it (a second
    output NODE.1), except for the graph's own inputs and outputs, so that a name in a plan gives its place.

    Args:
        path: a float32 ONNX file with a verified hash; its weights are not read.
        keep: names of functions of the domain `moebius` that stay functions.

    Raises:
        ExportError: a node without a name, or two of one name; control flow; a shape that cannot be inferred.
    """
    return opened_model(onnx.load(str(path), load_external_data=False), keep)


def opened_model(model: onnx.ModelProto, keep: Collection[str] = ()) -> onnx.ModelProto:
    """As `opened`, of a model in memory, which may be changed; errors as there."""
    model = _inlined(model, keep)
    _name_values(model.graph)
    _constants_to_initializers(model.graph)
    del model.graph.value_info[:]
    _drop_unused(model.graph)
    return with_types(model)


def _inlined(model: onnx.ModelProto, keep: Collection[str]) -> onnx.ModelProto:
    """As `moebius_export.graph.cost.inlined`, except for functions that are kept."""
    kept = [(DOMAIN, name) for name in keep if any(function.name == name for function in model.functions)]
    calls = [node.name for node in function_calls(model) if (node.domain, node.op_type) not in kept]
    before = {node.name for node in model.graph.node}
    inlined = inliner.inline_selected_functions(model, kept, exclude=True) if calls else model
    for node in inlined.graph.node:
        body, mark, number = node.name.rpartition("__")
        if node.name not in before and mark and number.isdecimal() and 1 <= int(number) <= len(calls):
            node.name = f"{calls[int(number) - 1]}/{body}"
    del inlined.functions[:]
    inlined.functions.extend(function for function in model.functions if (function.domain, function.name) in kept)
    if not kept:
        opsets = [entry for entry in inlined.opset_import if entry.domain != DOMAIN]
        del inlined.opset_import[:]
        inlined.opset_import.extend(opsets)
    names = [node.name for node in inlined.graph.node]
    if "" in names or len(set(names)) != len(names):
        raise ExportError("the graph has nodes without a name, or two of one name; export the bundle again")
    for node in inlined.graph.node:
        if any(attribute.type in (attribute.GRAPH, attribute.GRAPHS) for attribute in node.attribute):
            raise ExportError(f"node {node.name} has control flow, which a plan of precision does not cover")
    return inlined


def _name_values(graph: onnx.GraphProto) -> None:
    kept = {value.name for value in (*graph.input, *graph.output)}
    stored = {tensor.name for tensor in graph.initializer}
    names = {
        output: node.name if index == 0 else f"{node.name}.{index}"
        for node in graph.node
        for index, output in enumerate(node.output)
        if output and output not in kept
    }
    if clash := set(names.values()) & (kept | stored):
        raise ExportError(f"the graph has a node and a tensor that are both called {min(clash)}; export it again")
    for node in graph.node:
        for fields in (node.input, node.output):
            for index, name in enumerate(fields):
                fields[index] = names.get(name, name)


def _constants_to_initializers(graph: onnx.GraphProto) -> None:
    """`Constant` and `ConstantOfShape` nodes as initializers; small ones of equal content are one tensor."""
    arrays = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if not tensor.external_data and tensor.data_type == TensorProto.INT64
    }
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    renamed: dict[str, str] = {}
    nodes = []
    for node in graph.node:
        value = _constant_value(node, arrays, renamed)
        if value is None:
            nodes.append(node)
            continue
        name = node.output[0]
        arrays[name] = value
        key = (str(value.dtype), value.shape, value.tobytes())
        if key in first:
            renamed[name] = first[key]
        else:
            first[key] = name
            graph.initializer.append(numpy_helper.from_array(value, name))
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)


def _constant_value(node: onnx.NodeProto, arrays: dict[str, np.ndarray], renamed: dict[str, str]) -> np.ndarray | None:
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.op_type == "Constant":
        for name, value in attributes.items():
            if name == "value":
                return np.array(numpy_helper.to_array(value))
            if name in ("value_int", "value_ints"):
                return np.array(value, np.int64)
            if name in ("value_float", "value_floats"):
                return np.array(value, np.float32)
        raise ExportError(f"node {node.name}: a constant that is no number")
    if node.op_type == "ConstantOfShape":
        shape = arrays.get(renamed.get(node.input[0], node.input[0]))
        if shape is not None and prod(shape.tolist()) <= 4096:
            value = numpy_helper.to_array(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
            return np.full(shape.tolist(), value.reshape(-1)[0], value.dtype)
    return None


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def with_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with type and shape of every value; `ExportError` where they contradict each other."""
    try:
        return shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except (shape_inference.InferenceError, ValueError) as error:
        raise ExportError(f"the graph's types contradict each other: {' '.join(str(error).split())[:300]}") from error


@dataclass(frozen=True)
class Opened:
    """Look-ups in a model that `opened` made."""

    model: onnx.ModelProto

    @cached_property
    def nodes(self) -> dict[str, onnx.NodeProto]:
        """By name, in the graph's order."""
        return {node.name: node for node in self.model.graph.node}

    @cached_property
    def producers(self) -> dict[str, onnx.NodeProto]:
        """By the name of the value."""
        return {name: node for node in self.model.graph.node for name in node.output if name}

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """By the name of the value."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.model.graph.node:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def stored(self) -> dict[str, onnx.TensorProto]:
        """Initializers by name."""
        return {tensor.name: tensor for tensor in self.model.graph.initializer}

    @cached_property
    def types(self) -> dict[str, int]:
        """Element type of every value and initializer."""
        graph = self.model.graph
        found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
        return found | {name: tensor.data_type for name, tensor in self.stored.items()}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of elements of every value, an open dimension counted as 1."""
        graph = self.model.graph
        found = {
            value.name: prod(dimension.dim_value or 1 for dimension in value.type.tensor_type.shape.dim)
            for value in (*graph.input, *graph.output, *graph.value_info)
        }
        return found | {name: prod(tensor.dims) for name, tensor in self.stored.items()}

    @cached_property
    def constant(self) -> frozenset[str]:
        """Values that depend on no input of the graph: runtimes compute them when they load the file."""
        found = set(self.stored)
        for node in self.model.graph.node:
            inputs = [name for name in node.input if name]
            if inputs and all(name in found for name in inputs):
                found.update(node.output)
        return frozenset(found)

    @cached_property
    def storable(self) -> list[str]:
        """Float32 initializers that may be stored in a lower type: not those whose readers accept float32 only."""
        fixed = {
            name
            for node in self.model.graph.node
            for index, name in enumerate(node.input)
            if name in self.stored and index not in set(self.float_inputs(node))
        }
        return [
            name for name, tensor in self.stored.items() if tensor.data_type == TensorProto.FLOAT and name not in fixed
        ]

    def is_float(self, name: str) -> bool:
        """Whether a value holds floating-point numbers."""
        return self.types.get(name) in FLOATS

    def float_inputs(self, node: onnx.NodeProto) -> Iterator[int]:
        """Positions of the node's inputs that share the type of its first output."""
        if node.domain == DOMAIN:
            yield from (index for index, name in enumerate(node.input) if self.is_float(name))
            return
        version = next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
        schema = onnx.defs.get_schema(node.op_type, version, "")
        kind = schema.outputs[0].type_str
        for index, name in enumerate(node.input):
            formal = schema.inputs[min(index, len(schema.inputs) - 1)]
            if name and formal.type_str == kind and self.is_float(name):
                yield index

    def computes(self, node: onnx.NodeProto) -> bool:
        """Whether a node makes new floating-point values while the graph runs: these are the ones with a type."""
        return (
            bool(node.output)
            and self.is_float(node.output[0])
            and node.op_type not in MOVES
            and node.op_type != "Cast"
            and node.output[0] not in self.constant
        )


class Weights:
    """The values of a model's initializers, read from its weights file when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, np.ndarray] = {}

    def array(self, tensor: onnx.TensorProto) -> np.ndarray:
        """The values, in the tensor's own shape and type (float32, int64); mapped, not loaded, where external.

        Raises:
            ExportError: the weights file is missing or too short.
        """
        if not tensor.external_data:
            return np.array(numpy_helper.to_array(tensor))
        entry = {pair.key: pair.value for pair in tensor.external_data}
        kind = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)).newbyteorder("<")
        try:
            if entry["location"] not in self._maps:
                self._maps[entry["location"]] = np.memmap(self._folder / entry["location"], np.uint8, "r")
            raw = self._maps[entry["location"]]
            start, length = int(entry.get("offset", 0)), int(entry["length"])
            return raw[start : start + length].view(kind).reshape(tuple(tensor.dims))
        except (OSError, KeyError, ValueError) as error:
            raise ExportError(f"{self._folder}: weights of {tensor.name} cannot be read: {error}") from error


def layer_of(name: str) -> str:
    """The module that a node belongs to: `down_blocks.0.resnets.0` of `down_blocks.0.resnets.0/ResidualBlock/y`."""
    return name.partition("/")[0]
