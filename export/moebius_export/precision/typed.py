"""Makes a strongly typed mixed-precision graph of a float32 one; every cast is a node of the file."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import TensorProto, helper

from moebius_export.errors import ExportError
from moebius_export.graph.kinds import ELEMENT, FloatType, tensor_of
from moebius_export.graph.opened import MOVES, Opened, Weights, with_types


def typed(
    graph: Opened,
    weights: Weights | None,
    computes: Mapping[str, FloatType],
    stores: Mapping[str, FloatType],
) -> onnx.ModelProto:
    """Returns the mixed-precision graph. Its own inputs and outputs keep their types.

    A node's inputs are cast to its type where they have another. Nodes that only move values (`graph.MOVES`) have the
    type of what they move, or that of their readers where all of these have a lower one, so that fewer bytes move.
    Constants that are computed at loading are computed in float32. A weight may be stored in less than it is used in.

    Args:
        graph: a float32 model, see `graph.opened`.
        weights: of that model. None leaves them in their file as they are, and casts them to what they would be
            stored in: the same numbers, for trying a plan without writing it.
        computes: type of each node that `Opened.computes`; fp32 where missing.
        stores: type of each float initializer; fp32 where missing.

    Returns:
        The model with its weights inside it (if given), its types inferred and found consistent.

    Raises:
        ExportError: the types contradict each other, or a weight cannot be read.
    """
    return _Typing(graph, weights, computes, stores).run()


class _Typing:
    def __init__(
        self,
        graph: Opened,
        weights: Weights | None,
        computes: Mapping[str, FloatType],
        stores: Mapping[str, FloatType],
    ) -> None:
        self.graph, self.weights = graph, weights
        self.stores = stores
        self.types = {name: ELEMENT[kind] for name, kind in computes.items()}
        self.wanted: dict[str, int] = {}  # value -> the one type that all its readers want, else float32
        self.found: dict[str, int] = {}  # value -> its type in the new graph
        self.cast: dict[tuple[str, int], str] = {}
        self.stand_in: dict[str, str] = {}  # weight -> its value as it would be stored
        self.nodes: list[onnx.NodeProto] = []

    def run(self) -> onnx.ModelProto:
        model, graph = self.graph.model, self.graph
        self._want()
        tensors = []
        for tensor in model.graph.initializer:
            tensors.append(self._stored(tensor))
            self.found[tensor.name] = tensors[-1].data_type
            if self.weights is None and tensor.name in self.stores:
                self.stand_in[tensor.name] = self._as(tensor.name, ELEMENT[self.stores[tensor.name]])
        for value in model.graph.input:
            self.found[value.name] = value.type.tensor_type.elem_type
        outputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
        for original in model.graph.node:
            node = onnx.NodeProto()
            node.CopyFrom(original)
            kind = self._kind(original)
            if kind is not None:
                for index in graph.float_inputs(original):
                    node.input[index] = self._as(node.input[index], kind)
            self.nodes.append(node)
            for index, name in enumerate(original.output):
                own = kind if kind is not None and graph.is_float(name) else graph.types.get(name, 0)
                if name in outputs and own != outputs[name]:
                    node.output[index] = f"{name}/{TensorProto.DataType.Name(own).lower()}"
                    self.found[node.output[index]] = own
                    self.nodes.append(_cast(node.output[index], name, outputs[name], f"{name}/as_output"))
                    own = outputs[name]
                self.found[name] = own
        return self._model(tensors)

    def _want(self) -> None:
        """From the last node to the first: what the readers of each value want of it."""
        wants: dict[str, set[int]] = {}
        for value in self.graph.model.graph.output:
            wants.setdefault(value.name, set()).add(value.type.tensor_type.elem_type)
        for node in reversed(self.graph.model.graph.node):
            if not node.output or not self.graph.is_float(node.output[0]):
                continue
            if node.op_type in MOVES:
                kinds = set().union(*(wants.get(name, set()) for name in node.output))
            else:
                kinds = {self.types.get(node.name, TensorProto.FLOAT)}
            for index in self.graph.float_inputs(node):
                wants.setdefault(node.input[index], set()).update(kinds)
        self.wanted = {name: kinds.pop() if len(kinds) == 1 else TensorProto.FLOAT for name, kinds in wants.items()}

    def _stored(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        if self.weights is None:
            return tensor
        values = self.weights.array(tensor)
        if tensor.data_type == TensorProto.FLOAT:
            return tensor_of(values, tensor.name, self.stores.get(tensor.name, "fp32"))
        return onnx.numpy_helper.from_array(values, tensor.name)

    def _kind(self, node: onnx.NodeProto) -> int | None:
        """The type that a node runs in; None where it has no floating-point output, or is a cast."""
        if not node.output or not self.graph.is_float(node.output[0]) or node.op_type == "Cast":
            return None
        if node.op_type not in MOVES:
            return self.types.get(node.name, TensorProto.FLOAT)
        inputs = [node.input[index] for index in self.graph.float_inputs(node)]
        have = {self.found[self.stand_in.get(name, name)] for name in inputs}
        if len(have) == 1 and TensorProto.FLOAT not in have:
            return have.pop()  # never wider than it came: a reader that wants more casts what it reads
        wants = {self.wanted.get(name, TensorProto.FLOAT) for name in node.output if name in self.graph.consumers}
        return wants.pop() if len(wants) == 1 else TensorProto.FLOAT

    def _as(self, name: str, kind: int) -> str:
        """The value in that type, by a cast where it has another; one cast serves all that want it."""
        name = self.stand_in.get(name, name)
        if self.found[name] == kind:
            return name
        key = (name, kind)
        if key not in self.cast:
            self.cast[key] = f"{name}/as_{TensorProto.DataType.Name(kind).lower()}"
            self.nodes.append(_cast(name, self.cast[key], kind))
            self.found[self.cast[key]] = kind
        return self.cast[key]

    def _model(self, tensors: list[onnx.TensorProto]) -> onnx.ModelProto:
        names = [node.name for node in self.nodes]
        if len(set(names)) != len(names):
            raise ExportError("casts would get names that the graph has already; export the bundle again")
        new = onnx.ModelProto()
        new.CopyFrom(self.graph.model)
        del new.graph.value_info[:], new.graph.node[:], new.graph.initializer[:]
        new.graph.node.extend(self.nodes)
        for tensor in tensors:  # shapes and types alone, for the inference
            bare = new.graph.input.add()
            bare.CopyFrom(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        small = [tensor for tensor in tensors if not tensor.external_data and len(tensor.raw_data) <= 4096]
        new.graph.initializer.extend(small)
        new = with_types(new)
        inputs = list(new.graph.input)[: len(self.graph.model.graph.input)]
        del new.graph.input[:], new.graph.initializer[:]
        new.graph.input.extend(inputs)
        new.graph.initializer.extend(tensors)
        for value in new.graph.value_info:
            expected, got = self.found.get(value.name), value.type.tensor_type.elem_type
            if expected is not None and expected != got:
                raise ExportError(f"{value.name} came out as {TensorProto.DataType.Name(got)}; this is a bug")
        return new


def _cast(source: str, target: str, kind: int, name: str = "") -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=name or target, to=kind)
