"""Memory that engines will need, estimated from the parsed networks before anything is built.

Weights are counted in the ONNX files. Activations come from a liveness analysis: layers run in the parser's order, a
tensor lives from the layer that produces it to the last layer that reads it, and the peak is the largest sum of live
tensors. The builder fuses layers, which lowers the peak, and its kernels use scratch memory up to the workspace limit.
Values that depend on constants alone are folded by the builder and are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from moebius_runtime.bundle.manifest import GraphName

_BITS = {"FLOAT": 32, "INT32": 32, "HALF": 16, "BF16": 16, "INT64": 64, "INT8": 8, "UINT8": 8, "BOOL": 8, "FP8": 8}
_BITS |= {"INT4": 4, "FP4": 4, "E8M0": 8}
_SAME_MEMORY = ("IDENTITY", "SQUEEZE", "UNSQUEEZE")  # the output shares the memory of the input


@dataclass(frozen=True)
class GraphNeeds:
    """Bytes that one graph needs. `ends` counts its inputs and outputs, which `activations` includes."""

    graph: GraphName
    weights: int
    activations: int
    ends: int


@dataclass(frozen=True)
class Forecast:
    """Memory that the engines need together, and free memory.

    Activations are counted once, for the graph with the most, because the runtime shares one allocation among all
    engines. `workspace` is None where it is not limited, `free` None where there is no GPU. `device` is the GPU's name.
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
    def sequential(self) -> int:
        """Bytes with one engine loaded at a time (the low-memory mode), and of a build without workspace."""
        return max(one.weights + one.activations for one in self.needs)

    @property
    def building(self) -> int:
        """Bytes while the largest graph is built: weights, activations and the workspace if it is limited."""
        return self.sequential + (self.workspace or 0)

    @property
    def least(self) -> int:
        """Bytes without which the largest graph surely cannot run: its weights, inputs and outputs."""
        return max(one.weights + one.ends for one in self.needs)

    @property
    def cannot_fit(self) -> bool:
        """Whether the free memory surely does not suffice."""
        return self.free is not None and self.least > self.free

    @property
    def advice(self) -> list[str]:
        """What to change if the engines may not fit; empty if they do, or if the free memory is unknown."""
        if self.free is None or (self.building <= self.free and self.running <= self.free):
            return []
        words = []
        left = self.free - self.sequential
        if self.sequential > self.free:
            words.append(
                "close other programs that use the GPU, or choose a smaller precision (--fp16 halves what --fp32 needs)"
                " and a smaller batch"
            )
        elif self.building > self.free:
            words.append(f"limit the scratch memory of the builder: --workspace {max(1, left >> 20)}MiB")
        if self.running > self.free:
            words.append("run with one engine loaded at a time: moebius-inpaint without --keep-loaded")
        return words


def graph_needs(graph: GraphName, network: Any, weights: int, open_size: int = 1) -> GraphNeeds:
    """Counts the memory that a parsed graph needs.

    Args:
        graph: its name.
        network: the `INetworkDefinition`.
        weights: bytes of its weights.
        open_size: stands for a dimension that is unknown before the build.
    """
    ends = sum(
        _bytes(tensor, open_size)
        for tensor in (
            *(network.get_input(i) for i in range(network.num_inputs)),
            *(network.get_output(i) for i in range(network.num_outputs)),
        )
    )
    return GraphNeeds(graph, weights, activation_peak(network, open_size), ends)


@contextmanager
def input_shapes(network: Any, shapes: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Fixes the shapes of a network's open inputs inside the block, so that its tensors can be counted.

    Args:
        network: the `INetworkDefinition`; afterwards its inputs are open again, as a build with a profile needs.
        shapes: of the inputs, by name.
    """
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    before = [(tensor, tuple(tensor.shape)) for tensor in inputs if -1 in tuple(tensor.shape)]
    for tensor, _ in before:
        tensor.shape = tuple(shapes[tensor.name])
    try:
        yield
    finally:
        for tensor, shape in before:
            tensor.shape = shape


def activation_peak(network: Any, open_size: int = 1) -> int:
    """Peak bytes of live tensors, with inputs and outputs, without constants."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    sizes: dict[str, int] = {tensor.name: _bytes(tensor, open_size) for tensor in inputs}
    born: dict[str, int] = dict.fromkeys(sizes, 0)
    died: dict[str, int] = dict.fromkeys(sizes, 0)
    owner: dict[str, str] = {name: name for name in sizes}  # tensor -> the tensor whose memory it shares
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
    if tensor.is_shape_tensor:  # it is in host memory
        return 0
    try:
        shape = [int(size) for size in tensor.shape]
    except ValueError:  # its rank is unknown before the build
        return 0
    bits = _BITS.get(tensor.dtype.name, 32)
    return ceil(prod(open_size if size < 0 else size for size in shape) * bits / 8)
