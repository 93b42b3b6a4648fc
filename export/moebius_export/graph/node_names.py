"""Names nodes after the module that they come from, so that a profile of the file shows the network's modules."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Sequence

import onnx

from moebius_export.errors import ExportError
from moebius_runtime.kernels import DOMAIN

# What the exporter writes at each node: the modules around it, outermost first, and at the end the traced operation.
_SCOPES = "pkg.torch.onnx.name_scopes"
_PARAMETERS = (".weight", ".bias", ".rel_pos_emb")
_SUBGRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_TOP = "graph"  # the module of nodes that belong to none


def name_nodes(model: onnx.ModelProto, drop: Sequence[str] = ("student.diff_model", "student")) -> None:
    """Renames every node and its outputs, in place, to `MODULE/OPERATOR`, from the second on `MODULE/OPERATOR_2`.

    `MODULE` is the path of the module in the state dict, as in
    `down_blocks.0.attentions.1.transformer_blocks.0.attn1/Einsum_3`. It is the owner of the node's parameters
    where it has any: a fused convolution keeps its own name, not that of the normalisation folded into it. Nodes
    that an exporter or simplifier made without saying whence get the module that their neighbours share. Nodes that
    have such a name already keep its module, so a graph can be named again after nodes were added.

    Args:
        model: with the exporter's metadata still at its nodes, or named before.
        drop: outer modules that are left out of the names, longest first.

    Raises:
        ExportError: the graph has control flow, whose bodies use names of the graph around them.
    """
    if any(a.type in _SUBGRAPHS for node in model.graph.node for a in node.attribute):
        raise ExportError("the graph has control flow; nodes of such a graph are not named")
    parameters = {tensor.name for tensor in model.graph.initializer if tensor.name.endswith(_PARAMETERS)}
    scopes = [_scope(node, parameters) for node in model.graph.node]
    producers = {name: i for i, node in enumerate(model.graph.node) for name in node.output}
    neighbours: list[set[int]] = [set() for _ in scopes]
    for index, node in enumerate(model.graph.node):
        for name in node.input:
            if name in producers:
                neighbours[index].add(producers[name])
                neighbours[producers[name]].add(index)
    for index, scope in enumerate(scopes):
        if scope is None:
            scopes[index] = _common(s for i in sorted(neighbours[index]) if (s := scopes[i]) is not None)
    used: Counter[str] = Counter()
    for node, scope in zip(model.graph.node, scopes, strict=True):
        name = f"{_without(scope or '', drop) or _TOP}/{node.op_type}"
        used[name] += 1
        node.name = name if used[name] == 1 else f"{name}_{used[name]}"
    _name_values(model.graph)


def _name_values(graph: onnx.GraphProto) -> None:
    """Names each value after the node that makes it: runtimes call the nodes that they rewrite after their output.

    The graph's own inputs, outputs and initializers keep their names.
    """
    kept = {value.name for value in graph.output}
    names = {
        output: node.name if index == 0 else f"{node.name}.{index}"
        for node in graph.node
        for index, output in enumerate(node.output)
        if output and output not in kept
    }
    for node in graph.node:
        for fields in (node.input, node.output):
            for index, name in enumerate(fields):
                fields[index] = names.get(name, name)
    for value in graph.value_info:
        value.name = names.get(value.name, value.name)


def _scope(node: onnx.NodeProto, parameters: set[str]) -> str | None:
    if "/" in node.name:
        scope = node.name.rpartition("/")[0]
        return "" if scope == _TOP else scope
    owners = [name.rpartition(".")[0] for name in node.input if name in parameters]
    if owners:  # a whole layer has several, and is the module around them
        return _common(owners) if node.domain == DOMAIN else owners[0]
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return None


def _common(scopes: Iterable[str]) -> str:
    """The innermost module that holds all of them."""
    paths = [scope.split(".") for scope in scopes]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _without(scope: str, drop: Sequence[str]) -> str:
    for outer in drop:
        if scope == outer:
            return ""
        if scope.startswith(f"{outer}."):
            return scope[len(outer) + 1 :]
    return scope
