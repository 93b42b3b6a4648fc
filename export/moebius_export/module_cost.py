"""Multiply-accumulates of a PyTorch module, operation by operation, on meta tensors: shapes only, no arithmetic.

What `moebius_export.cost` counts in a file, before there is one, so that each rewrite can say what it saved. Torch's
own operation counter has the formulas of the standard operators; those of `moebius.lambda_ops` and
`moebius.layer_ops` are here. Work whose result nothing uses is not counted, since no exported file holds it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from moebius import lambda_ops, layer_ops  # noqa: F401  registers the operators
from moebius_export.errors import CostError

_STANDARD = ("aten", "prim", "prims")


def module_macs(module: nn.Module, inputs: Iterable[Tensor], form: str = "tiles") -> dict[str, int]:
    """`{"all": MACs, "convolutions": MACs}` of one call.

    Args:
        module: on any device; its weights are looked at for their shapes only.
        inputs: example inputs, likewise.
        form: the body of `LocalLambda` that its calls stand for, one of `moebius_export.functions.FORMS`.

    Raises:
        CostError: an operator outside torch's own has no formula here.
    """
    # Attention as plain products: the fused forms of some devices are not known to the counter.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Recording(form) as recording:
        output = on_meta(module)(*(tensor.to("meta") for tensor in inputs))
    return recording.used_by(output)


def shared_copy(module: nn.Module, tensor: Callable[[Tensor], Tensor] = lambda one: one) -> nn.Module:
    """The same tree of modules anew over the same parameters and buffers, or what `tensor` makes of each once."""
    copies: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def mapped(one: Tensor | None) -> Any:
        if one is None:
            return None
        if id(one) not in tensors:
            tensors[id(one)] = tensor(one)
        return tensors[id(one)]

    def copied(source: nn.Module) -> nn.Module:
        if id(source) not in copies:
            result = copies[id(source)] = copy.copy(source)
            result._parameters = {name: mapped(one) for name, one in source._parameters.items()}
            result._buffers = {name: mapped(one) for name, one in source._buffers.items()}
            result._modules = {name: child and copied(child) for name, child in source._modules.items()}
        return copies[id(source)]

    return copied(module)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module whose parameters and buffers are meta tensors: they have shapes and types, and no numbers."""

    def meta(tensor: Tensor) -> Tensor:
        empty = tensor.to("meta")
        return nn.Parameter(empty, requires_grad=False) if isinstance(tensor, nn.Parameter) else empty

    return shared_copy(module, meta)


class _Recording(TorchDispatchMode):
    """Every operation with its products, the tensors it took and those that it made, in order."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._form = form
        self._made: list[tuple[str, int, list[Tensor], list[Tensor]]] = []  # tensors are kept, so that ids are theirs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "aten":
            with self:  # in inference mode some products arrive whole: matmul, linear
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        macs = self._macs(func, args, kwargs, result)
        self._made.append((func.name(), macs, _tensors((args, kwargs)), _tensors(result)))
        return result

    def used_by(self, output: Any) -> dict[str, int]:
        """The products that an output depends on."""
        needed = {id(tensor) for tensor in _tensors(output)}
        total = convolutions = 0
        for name, macs, taken, made in reversed(self._made):
            if any(id(tensor) in needed for tensor in made):
                needed.update(id(tensor) for tensor in taken)
                total += macs
                convolutions += macs if "convolution" in name or name in _CONVOLUTIONS else 0
        return {"all": total, "convolutions": convolutions}

    def _macs(self, func: Any, args: Any, kwargs: Any, result: Any) -> int:
        if formula := flop_registry.get(func.overloadpacket):
            return int(formula(*args, **kwargs, out_val=result)) // 2  # a MAC is two FLOPs there
        if func in LAMBDA_FORMULAS:
            return LAMBDA_FORMULAS[func](self._form, *args, **kwargs)
        if func in LAYER_FORMULAS:
            return LAYER_FORMULAS[func](*args, **kwargs)
        if func.namespace not in _STANDARD:
            raise CostError(
                f"operator {func.name()} is not known here, so the network's cost would be too low; "
                "add its products to moebius_export/module_cost.py"
            )
        return 0


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _summary(_form: str, keys: Tensor, values: Tensor) -> int:
    return keys.numel() * values.shape[2]  # [B, k, n] x v


def _interactive(_form: str, query: Tensor, keys: Tensor, values: Tensor) -> int:
    _, _, depth, tokens = keys.shape
    return query.numel() // depth * tokens * (depth + values.shape[2])  # [branch, B, n, h] x m (k + v)


def _local(form: str, query: Tensor, values: Tensor, summary: Tensor, window: Tensor, size: Any, tile: Any) -> int:
    depth, reach, _ = window.shape
    heads = query.shape[2] // depth
    return query.shape[0] * prod(size) * local_lambda_macs(form, size, tile, heads, depth, reach)


def local_lambda_macs(form: str, size: Sequence[int], tile: Sequence[int], heads: int, depth: int, reach: int) -> int:
    """Products of one position in `LocalLambda`, in one of `FORMS`."""
    if form == "convolution":
        return depth * depth * (reach * reach + heads)
    near = (tile[0] + reach - 1) * (tile[1] + reach - 1)
    return heads * (depth * depth + 2 * near * depth)


LAMBDA_FORMULAS: Mapping[Any, Callable[..., int]] = {
    torch.ops.moebius.lambda_summary.default: _summary,
    torch.ops.moebius.interactive_lambda.default: _interactive,
    torch.ops.moebius.local_lambda.default: _local,
}
"""Operator -> its products, from the form of `LocalLambda` and the operator's arguments. A new operator's go here."""


def _feed_forward(
    x: Tensor, expand: Tensor, _bias: Tensor, depthwise: Tensor, _: Tensor, project: Tensor, _s: Any
) -> int:
    return x.shape[0] * x.shape[1] * (expand.numel() + depthwise.numel() + project.numel())


def _residual_block(x: Tensor, _time: Tensor, *layers: Any) -> int:
    kernels = [tensor for layer in layers[:3] for tensor in layer if tensor.dim() == 4]
    return x.shape[0] * prod(x.shape[2:]) * sum(kernel.numel() for kernel in kernels)


def _conv3x3(x: Tensor, weight: Tensor, _bias: Tensor) -> int:
    return x.shape[0] * prod(x.shape[2:]) * weight.numel()


def _upsample_conv3x3(x: Tensor, weight: Tensor, _bias: Tensor) -> int:
    return _conv3x3(x, weight, _bias) // 9 * 16  # four 2x2 convolutions on the small picture


LAYER_FORMULAS: Mapping[Any, Callable[..., int]] = {
    torch.ops.moebius.feed_forward.default: _feed_forward,
    torch.ops.moebius.residual_block.default: _residual_block,
    torch.ops.moebius.conv3x3.default: _conv3x3,
    torch.ops.moebius.upsample_conv3x3.default: _upsample_conv3x3,
    torch.ops.moebius.group_norm.default: lambda *arguments: 0,
}
"""Operator -> the products of its function's body, all of them convolutions."""

_CONVOLUTIONS = {operator.name() for operator in LAYER_FORMULAS}
