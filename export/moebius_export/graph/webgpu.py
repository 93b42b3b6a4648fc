"""Rewrites of a graph for ONNX Runtime's WebGPU provider, native and in browsers.

They avoid what the provider computes wrongly or not on the GPU (versions 1.27 and 1.30 of November 2026):

- `pad_conv_channels`: a dense convolution over 6, 9, 15, 18, ... input channels (divisible by 3, not by 4) with a
  kernel above 1x1 gives garbage where its output channels are a multiple of 4. Zero channels are added to input and
  weights.
- `explicit_pads`: `auto_pad` is replaced by the pads that it means (issue #26734 of ONNX Runtime).
- `tabulate_casts`: a cast of the timestep from int64 to float32 would run on the CPU, so it becomes a gather from a
  table of the whole numbers, which the provider runs on the GPU.
- `int32_indices`: stored indices of gathers become int32, because WebGPU has no int64 (issue #29756).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_export.errors import ExportError
from moebius_export.graph.opened import with_types

RULES = ("pad_conv_channels", "explicit_pads", "tabulate_casts", "int32_indices")
_TIMESTEPS = 10_000  # more than any schedule of a manifest has
Read = Callable[[TensorProto], np.ndarray]


def for_webgpu(
    model: onnx.ModelProto, read: Read | None = None, rules: Sequence[str] = RULES
) -> tuple[onnx.ModelProto, dict[str, int]]:
    """Returns an equal model for the WebGPU provider, and how often each rule fired.

    Args:
        model: of standard operators with inferred types, see `moebius_export.graph.standard`. It is changed.
        read: returns the values of an initializer in another file; None leaves such indices int64.
        rules: the rules to apply.

    Raises:
        ExportError: `auto_pad` at an operator or with a size for which the pads are not known.
    """
    dims = _dims(model.graph)
    apply = {
        "pad_conv_channels": lambda: _pad_conv_channels(model.graph, dims),
        "explicit_pads": lambda: _explicit_pads(model.graph, dims),
        "tabulate_casts": lambda: _tabulate_casts(model.graph),
        "int32_indices": lambda: _int32_indices(model.graph, read),
    }
    counts = {rule: apply[rule]() if rule in rules else 0 for rule in RULES}
    del model.graph.value_info[:]
    return with_types(model), counts


def computed_wrongly(weight: Sequence[int], group: int) -> bool:
    """Whether the provider computes a convolution wrongly.

    Args:
        weight: [out, in / group, kernel ...].
        group: of the convolution.
    """
    channels, taps = weight[1], int(np.prod(weight[2:]))
    return group == 1 and taps > 1 and channels > 3 and channels % 3 == 0 and channels % 4 != 0


def _pad_conv_channels(graph: onnx.GraphProto, dims: dict[str, list[int]]) -> int:
    nodes: list[onnx.NodeProto] = []
    fired = 0
    for node in graph.node:
        weight = dims.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or not computed_wrongly(weight, _integer(node, "group", 1)):
            nodes.append(node)
            continue
        fired += 1
        extra = -weight[1] % 4
        ends = np.zeros(2 * len(weight), np.int64)  # [begin of each axis, end of each axis]
        ends[len(weight) + 1] = extra
        pads = f"{node.name}/pads"
        graph.initializer.append(numpy_helper.from_array(ends, pads))
        for index, what in ((0, "input"), (1, "weight")):
            padded = f"{node.name}/{what}_padded"
            nodes.append(helper.make_node("Pad", [node.input[index], pads], [padded], name=padded, mode="constant"))
            node.input[index] = padded
        nodes.append(node)
    kept = list(nodes)
    del graph.node[:]
    graph.node.extend(kept)
    return fired


def _explicit_pads(graph: onnx.GraphProto, dims: dict[str, list[int]]) -> int:
    fired = 0
    for node in graph.node:
        mode = next((a.s.decode() for a in node.attribute if a.name == "auto_pad"), "NOTSET")
        if mode == "NOTSET":
            continue
        size = dims.get(node.input[0])
        known = node.op_type in ("Conv", "MaxPool", "AveragePool") and size is not None
        if mode != "VALID" and not known:
            raise ExportError(
                f"node {node.name} ({node.op_type}) has auto_pad {mode}, whose pads are not known here; give it pads"
            )
        pads = [0, 0] if size is None else [0] * (2 * (len(size) - 2))
        if mode != "VALID":
            assert size is not None
            pads = _same(node, size[2:], dims, upper=mode == "SAME_UPPER")
        kept = [attribute for attribute in node.attribute if attribute.name not in ("auto_pad", "pads")]
        del node.attribute[:]
        node.attribute.extend(kept)
        if any(pads):
            node.attribute.append(helper.make_attribute("pads", pads))
        fired += 1
    return fired


def _same(node: onnx.NodeProto, size: Sequence[int], dims: dict[str, list[int]], *, upper: bool) -> list[int]:
    """The pads [begin ..., end ...] of `SAME_UPPER` or `SAME_LOWER`: the output has ceil(size / stride) places."""
    ones = [1] * len(size)
    kernel = _integers(node, "kernel_shape", dims.get(node.input[1], [])[2:] if len(node.input) > 1 else [])
    if len(kernel) != len(size):
        raise ExportError(f"node {node.name} ({node.op_type}): the shape of its kernel is not known")
    totals = []
    for places, taps, stride, dilation in zip(
        size, kernel, _integers(node, "strides", ones), _integers(node, "dilations", ones), strict=True
    ):
        reach = (-(-places // stride) - 1) * stride + (taps - 1) * dilation + 1
        totals.append(max(0, reach - places))
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*less, *more] if upper else [*more, *less]


def _tabulate_casts(graph: onnx.GraphProto) -> int:
    """Replaces casts of the input `timestep` to float32 by a gather from 0, 1, ..., in place. They are equal for every
    timestep of a schedule."""
    fired = 0
    for node in graph.node:
        to_float = any(a.name == "to" and a.i == TensorProto.FLOAT for a in node.attribute)
        if node.op_type != "Cast" or list(node.input) != ["timestep"] or not to_float:
            continue
        if not fired:
            table = np.arange(_TIMESTEPS, dtype=np.float32)
            graph.initializer.append(numpy_helper.from_array(table, "timestep_numbers"))
        del node.attribute[:], node.input[:]
        node.op_type = "Gather"
        node.input.extend(["timestep_numbers", "timestep"])
        fired += 1
    return fired


def _int32_indices(graph: onnx.GraphProto, read: Read | None) -> int:
    """Makes stored int64 indices int32 where gathers alone read them, in place."""
    readers: dict[str, list[bool]] = {value.name: [False] for value in graph.output}
    for node in graph.node:
        for index, name in enumerate(node.input):
            gathers = node.op_type in ("Gather", "GatherElements") and index == 1
            readers.setdefault(name, []).append(gathers)
    fired = 0
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.INT64 or not all(readers.get(tensor.name, [False])):
            continue
        if tensor.external_data and read is None:
            continue
        values = numpy_helper.to_array(tensor) if not tensor.external_data else read(tensor)  # type: ignore[misc]
        if values.size and (values.max() > 2**31 - 1 or values.min() < -(2**31)):
            continue
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values.astype(np.int32)), tensor.name))
        fired += 1
    return fired


def _dims(graph: onnx.GraphProto) -> dict[str, list[int]]:
    """The dimensions of every value that has only static ones."""
    found = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dimensions = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in dimensions):
            found[value.name] = [d.dim_value for d in dimensions]
    return found


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


def _integers(node: onnx.NodeProto, name: str, default: Sequence[int]) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == name), list(default))
