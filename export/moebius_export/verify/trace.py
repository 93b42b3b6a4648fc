"""Records a small sample of every tensor that a PyTorch module computes, operation by operation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._decomp import get_decompositions
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from moebius_export.trajectories.scenes import Inputs

SAMPLES = 1 << 14
_MIN_VALUES = 16  # smaller tensors are alike by chance

# Operations that an exporter writes as several nodes are decomposed here too, so that each node has a counterpart.
_DECOMPOSED = get_decompositions(
    [
        torch.ops.aten.native_group_norm.default,
        torch.ops.aten.silu.default,
    ]
)
# They keep the values in the same order, so there is nothing new to record.
_SAME_ORDER = frozenset(
    {"view", "_unsafe_view", "unsqueeze", "squeeze", "detach", "alias", "_reshape_alias", "lift_fresh"}
)


@lru_cache(maxsize=256)
def positions(size: int) -> np.ndarray:
    """Indices of the sampled elements of a tensor with `size` elements: all, or `SAMPLES` at even distances."""
    if size <= SAMPLES:
        return np.arange(size)
    return np.linspace(0, size - 1, SAMPLES).astype(np.int64)


def sample(values: np.ndarray) -> np.ndarray:
    """Samples an array in C order, float32 [n]."""
    return values.reshape(-1)[positions(values.size)].astype(np.float32)  # [numel] -> [n]


@dataclass
class Trace:
    """Samples and names (`MODULE operation`), by the number of elements of their tensor."""

    names: dict[int, list[str]] = field(default_factory=lambda: defaultdict(list))
    samples: dict[int, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Adds a sample of a float tensor."""
        size = tensor.numel()
        if size < _MIN_VALUES or not tensor.is_floating_point():
            return
        self.names[size].append(name)
        self.samples[size].append(torch.take(tensor, torch.from_numpy(positions(size))).float().numpy())


class _Watching(TorchDispatchMode):
    """Adds every result of every operation to the trace."""

    def __init__(self, trace: Trace, path: list[str]) -> None:
        super().__init__()
        self._trace, self._path = trace, path

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DECOMPOSED:
            with self:
                return _DECOMPOSED[func](*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        operation = func.overloadpacket.__name__
        if operation not in _SAME_ORDER:
            for one in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(one, torch.Tensor):
                    self._trace.add(f"{self._path[-1]} {operation}".strip(), one)
        return result


def trace_module(module: nn.Module, inputs: Inputs) -> Trace:
    """Runs a module and records a sample of every tensor that it computes."""
    trace = Trace()
    with _module_path(module) as path, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Watching(trace, path):
        module(*(torch.from_numpy(array) for array in inputs.values()))
    return trace


@contextmanager
def _module_path(module: nn.Module) -> Iterator[list[str]]:
    """A stack of module names; the last one is running."""
    path = [""]
    handles = []
    for name, child in module.named_modules():

        def enter(_module: nn.Module, _inputs: object, name: str = name) -> None:
            path.append(name)

        def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
            path.pop()

        handles += [child.register_forward_pre_hook(enter), child.register_forward_hook(leave)]
    try:
        yield path
    finally:
        for handle in handles:
            handle.remove()
