"""How much memory engines will need, from the parsed graphs and before anything is built.

Weights are counted in the ONNX files. Activations come from liveness: layers run in the parser's order, a tensor
lives from the layer that makes it to the last that reads it, and the peak is the largest sum of what lives at once.
The builder fuses layers, so that fewer tensors exist and the peak is lower, and it takes scratch memory for its
kernels, up to the workspace. What is computed from constants alone is folded while building and costs nothing here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from moebius_runtime.bundle.manifest import GraphName

_BITS = {"FLOAT": 32, "INT32": 32, "HALF": 16, "BF16": 16, "INT64": 64, "INT8": 8, "UINT8": 8, "BOOL": 8, "FP8": 8}
_BITS |= {"INT4": 4, "FP4": 4, "E8M0": 8}
_SAME_MEMORY = ("IDENTITY", "SQUEEZE", "UNSQUEEZE")  # the output is the input under another name


@dataclass(frozen=True)
class GraphNeeds:
    """Bytes that one graph needs. `ends` are its inputs and outputs, which `activations` include."""

    graph: GraphName
    weights: int
    activations: int
    ends: int


@dataclass(frozen=True)
class Forecast:
    """What the engines need together and what there is.

    Activations are counted once, for the graph with the most: the runtime gives all engines one allocation in turn.
    `workspace` and `free` are None where nobody said, `device` is the GPU's name.
    """

    needs: tuple[GraphNeeds, ...]
    workspace: int | None
    free: int | None
    device: str | None

    @property
    def running(self) -> int:
        """Bytes with all engines loaded."""
        return sum(one.weights for one in self.needs) + max(one.activations for one in self.needs)

    @property
    def in_turn(self) -> int:
        """Bytes with one engine loaded at a time: the low-memory mode, and what building needs without workspace."""
        return max(one.weights + one.activations for one in self.needs)

    @property
    def building(self) -> int:
        """Bytes while the largest graph is built: its weights and activations and, where it is limited, workspace."""
        return self.in_turn + (self.workspace or 0)

    @property
    def least(self) -> int:
        """Bytes below which the largest graph surely does not run: its weights, inputs and outputs."""
        return max(one.weights + one.ends for one in self.needs)

    @property
    def cannot_fit(self) -> bool:
        """Whether the memory that is free surely does not suffice."""
        return self.free is not None and self.least > self.free

    @property
    def advice(self) -> list[str]:
        """What to change where it may not fit; empty where it does or nobody knows what is free."""
        if self.free is None or (self.building <= self.free and self.running <= self.free):
            return []
        words = []
        left = self.free - self.in_turn
        if self.in_turn > self.free:
            words.append(
                "close what else uses the GPU, or take a smaller precision (--fp16 halves what --fp32 needs)"
                " and a smaller batch"
            )
        elif self.building > self.free:
            words.append(f"give the builder less scratch memory: --workspace {max(1, left >> 20)}MiB")
        if self.running > self.free:
            words.append("run with one engine loaded at a time: moebius-inpaint without --keep-loaded")
        return words


def graph_needs(graph: GraphName, network: Any, weights: int, open_size: int = 1) -> GraphNeeds:
    """The needs of a graph that TensorRT's parser has read.

    Args:
        graph: its name.
        network: the `INetworkDefinition`.
        weights: bytes of its weights.
        open_size: what stands for a dimension that is not known before the build.
    """
    ends = sum(
        _bytes(tensor, open_size)
        for tensor in (
            *(network.get_input(i) for i in range(network.num_inputs)),
            *(network.get_output(i) for i in range(network.num_outputs)),
        )
    )
    return GraphNeeds(graph, weights, activation_peak(network, open_size), ends)


def activation_peak(network: Any, open_size: int = 1) -> int:
    """The largest sum in bytes of tensors that live at once, inputs and outputs included; constants are not."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    sizes: dict[str, int] = {tensor.name: _bytes(tensor, open_size) for tensor in inputs}
    born: dict[str, int] = dict.fromkeys(sizes, 0)
    died: dict[str, int] = dict.fromkeys(sizes, 0)
    owner: dict[str, str] = {name: name for name in sizes}  # whose memory a tensor is in
    layers = 0
    for index, layer in enumerate(network.get_layer(i) for i in range(network.num_layers)):
        layers = index + 1
        read = [tensor.name for tensor in _inputs(layer)]
        moving = [name for name in read if name in owner]
        if layer.type.name == "CONSTANT" or (read and not moving):
            continue
        for name in moving:
            died[owner[name]] = index
        for tensor in (layer.get_output(i) for i in range(layer.num_outputs)):
            name = tensor.name
            if layer.type.name in _SAME_MEMORY and moving:
                owner[name] = owner[moving[0]]
                continue
            owner[name], sizes[name], born[name], died[name] = name, _bytes(tensor, open_size), index, index
    for name in outputs:
        if name in owner:
            died[owner[name]] = max(layers - 1, 0)
    return _peak(sizes, born, died)


def _peak(sizes: Mapping[str, int], born: Mapping[str, int], died: Mapping[str, int]) -> int:
    changes: dict[int, int] = {}
    for name, size in sizes.items():
        changes[born[name]] = changes.get(born[name], 0) + size
        changes[died[name] + 1] = changes.get(died[name] + 1, 0) - size
    now = peak = 0
    for index in sorted(changes):
        now += changes[index]
        peak = max(peak, now)
    return peak


def _inputs(layer: Any) -> Iterator[Any]:
    for index in range(layer.num_inputs):
        tensor = layer.get_input(index)
        if tensor is not None:
            yield tensor


def _bytes(tensor: Any, open_size: int) -> int:
    if tensor.is_shape_tensor:  # it lives in the host's memory
        return 0
    try:
        shape = [int(size) for size in tensor.shape]
    except ValueError:  # a rank that is not known before the build
        return 0
    bits = _BITS.get(tensor.dtype.name, 32)
    return ceil(prod(open_size if size < 0 else size for size in shape) * bits / 8)
