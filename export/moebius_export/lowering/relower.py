"""Exchanges the body of `LocalLambda` in an exported model.

Changes in a node: its shape attributes and, in the form "tiles", the tile and both index tables. Weights stay where
they are.
"""

from __future__ import annotations

import onnx
import torch

from moebius.network import lambda_ops
from moebius_export.errors import ExportError
from moebius_export.graph.functions import DOMAIN, convolution_shapes, function_protos, tile_shapes
from moebius_export.lowering.lowering import Lowering

_NAME = "LocalLambda"
_INPUTS = {"tiles": 6, "convolution": 4}


def local_lambdas(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes of `LocalLambda`, in the graph's order."""
    return [node for node in model.graph.node if node.domain == DOMAIN and node.op_type == _NAME]


def present_side(node: onnx.NodeProto) -> int:
    """The height of a node's picture."""
    return int(_attributes(node)["size"][0])


def present_lowering(model: onnx.ModelProto) -> Lowering:
    """Returns the present lowering of a model; with the body "convolution" every tile is the default.

    Raises:
        ExportError: the model has no Local-λ as one node, one that is not square, or not one lowering throughout.
    """
    found: dict[int, set[tuple[int, int]]] = {}
    forms = set()
    for node in local_lambdas(model):
        attributes = _attributes(node)
        height, width = attributes["size"]
        if height != width:
            raise ExportError(f"{node.name} is of {height}x{width} positions; expected a square")
        forms.add({count: form for form, count in _INPUTS.items()}.get(len(node.input), "unknown"))
        tall, wide = attributes.get("tile") or lambda_ops.default_tile(height, width)
        found.setdefault(height, set()).add((tall, wide))
    if not found:
        raise ExportError(
            "the U-Net has no node LocalLambda, so there is no lowering to choose: it was exported with --no-fuse, or "
            "without the rule reassociate_local_lambda. Export it again with that rule."
        )
    if len(forms) > 1 or not forms <= set(_INPUTS) or any(len(tiles) > 1 for tiles in found.values()):
        raise ExportError(f"its nodes LocalLambda are not lowered alike: {found}. Export the bundle again.")
    (form,) = forms
    tiles = {side: tile for side, (tile,) in sorted(found.items(), reverse=True)}
    try:
        return Lowering.model_validate({"form": form, "tiles": tiles})
    except ValueError as error:
        raise ExportError(f"its nodes LocalLambda make no sense: {' '.join(str(error).split())[:300]}") from error


def relowered(model: onnx.ModelProto, lowering: Lowering) -> onnx.ModelProto:
    """Returns a copy of the model with another lowering of Local-λ.

    Raises:
        ExportError: a node's window is no constant of the graph, or a tile does not divide its picture.
    """
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    shapes = {tensor.name: list(tensor.dims) for tensor in changed.graph.initializer}
    tables: dict[str, torch.Tensor] = {}
    for node in local_lambdas(changed):
        window = node.input[3]
        if len(shapes.get(window, [])) != 3:
            raise ExportError(f"{node.name}: its window {window} is no constant [k, r, r] of the graph")
        depth, reach, _ = shapes[window]
        attributes = _attributes(node)
        heads, (height, width) = attributes["heads"], attributes["size"]
        del node.input[4:]
        if lowering.form == "convolution":
            values = convolution_shapes((height, width), heads, depth, reach)
        else:
            tile = lowering.tile(height)
            if height % tile[0] or width % tile[1]:
                raise ExportError(f"{node.name}: tiles of {tile[0]}x{tile[1]} do not divide {height}x{width}")
            values = {"tile": list(tile)} | tile_shapes((height, width), tile, heads, depth, reach)
            words = f"{height}x{width}.{tile[0]}x{tile[1]}.{reach}"
            indices = {
                f"local_lambda.neighbours.{words}": lambda_ops.neighbourhoods(height, width, *tile, reach),
                f"local_lambda.taps.{words}": lambda_ops.window_places(*tile, reach),
            }
            node.input.extend(indices)
            tables |= indices
        del node.attribute[:]
        for name, value in {"heads": heads, "size": [height, width], **values}.items():
            node.attribute.append(onnx.helper.make_attribute(name, value))
    _replace_tables(changed.graph, tables)
    for function in changed.functions:
        if function.name == _NAME:
            function.CopyFrom(function_protos(lowering.form)[_NAME])
    return changed


def _replace_tables(graph: onnx.GraphProto, tables: dict[str, torch.Tensor]) -> None:
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used and tensor.name not in tables]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    graph.initializer.extend(onnx.numpy_helper.from_array(table.numpy(), name) for name, table in tables.items())


def _attributes(node: onnx.NodeProto) -> dict:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
