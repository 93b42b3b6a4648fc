"""Local-λ by a Triton kernel: `torch.ops.moebius.local_lambda_triton`, the λ layers' form "triton".

The fast form (`moebius.network.lambda_ops.local_lambda`) writes its bands to memory; the kernel keeps them in
registers. It computes the forward pass only; gradients are those of the fast form. Triton is imported at the first use.

CUDA tensors, or CPU tensors where the environment variable TRITON_INTERPRET=1 was set before Triton was imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moebius.network.lambda_ops import _check_local, eager_tile, local_lambda_backward

if TYPE_CHECKING:
    from moebius.network.triton_kernel import Blocks

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def unavailable(device: torch.device) -> str | None:
    """Why the kernel cannot run on a device, and what to do; None if it can."""
    try:
        import triton
    except ImportError as error:
        return (
            f"the λ form 'triton' needs Triton, which cannot be imported ({error}); install PyTorch's CUDA build, "
            "which brings it, or choose the form 'fast'"
        )
    if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
        return None
    return (
        f"the λ form 'triton' runs on CUDA, the tensors are on {device}; choose the form 'fast' there, or set "
        "TRITON_INTERPRET=1 to test the kernel, slowly, on a CPU"
    )


def launch(
    query: Tensor, values: Tensor, summary: Tensor, window: Tensor, size: Sequence[int], blocks: Blocks | None = None
) -> Tensor:
    """Runs the kernel, with the given blocks or, on a GPU, those that the tuner found fastest.

    Arguments, result and errors as `local_lambda_triton`.
    """
    _check_local(query, values, summary, window, size, (1, 1))
    dtypes = {tensor.dtype for tensor in (query, values, summary, window)}
    if len(dtypes) > 1 or query.dtype not in DTYPES:
        raise ValueError(
            f"dtypes {sorted(str(dtype) for dtype in dtypes)}: the Triton kernel takes one for all its inputs, "
            "float32, float16 or bfloat16; the form 'fast' takes others"
        )
    if problem := unavailable(query.device):
        raise RuntimeError(problem)
    from moebius.network import triton_kernel

    (height, width), (depth, reach, _) = size, window.shape
    batch, _, channels = query.shape
    heads = channels // depth
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    tensors = [tensor.contiguous() for tensor in (query, values, summary, window)]
    sizes: dict[str, Any] = {
        "HEIGHT": height,
        "WIDTH": width,
        "HEADS": heads,
        "DEPTH": depth,
        "REACH": reach,
        "PRECISION": "ieee",  # float32 as float32, not as TF32
        "WIDEN": query.device.type == "cpu",
    }
    if blocks is None and query.device.type == "cpu":  # interpreted: nothing to time
        blocks = triton_kernel.block_choices(heads, depth, query.element_size())[0]
    if blocks is not None:
        grid = (*blocks.grid((height, width), heads, depth), batch)
        chosen = blocks.constants(reach) | {"num_warps": blocks.warps, "num_stages": blocks.stages}
        triton_kernel.local_lambda_kernel[grid](*tensors, output, **sizes, **chosen)
        return output

    def grid_of(chosen: dict[str, int]) -> tuple[int, int, int]:
        return (*triton_kernel.grid((height, width), heads, depth, chosen), batch)

    with torch.cuda.device(query.device):
        triton_kernel.tuned_kernel(heads, depth, reach, query.element_size())[grid_of](*tensors, output, **sizes)
    return output


@torch.library.custom_op("moebius::local_lambda_triton", mutates_args=())
def local_lambda_triton(query: Tensor, values: Tensor, summary: Tensor, window: Tensor, size: Sequence[int]) -> Tensor:
    """Local-λ of a picture by the Triton kernel; the same function as `moebius.network.lambda_ops.local_lambda`.

    Args:
        query: [B, n, h*k], after its norm; float32, float16 or bfloat16, as all others. Sums are float32.
        values: [B, n, v], after their norm.
        summary: [B, k, v], from `lambda_summary`; the bias of the position convolution is added to it.
        window: [k, r, r], the position convolution's weight; r is odd.
        size: (H, W), n = H*W in raster order.

    Returns:
        [B, n, h*v], contiguous.

    Raises:
        ValueError: shapes that do not fit each other, other or mixed dtypes.
        RuntimeError: Triton is not there, or the tensors are on a device that it does not serve.
    """
    return launch(query, values, summary, window, size)


@local_lambda_triton.register_fake
def _(query: Tensor, values: Tensor, summary: Tensor, window: Tensor, size: Sequence[int]) -> Tensor:
    _check_local(query, values, summary, window, size, (1, 1))
    return query.new_empty(query.shape)


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.size = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)


def _gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tensors, size = ctx.saved_tensors, ctx.size  # type: ignore[attr-defined]
    return (*local_lambda_backward(gradient.contiguous(), *tensors, size, eager_tile(*size)), None)


local_lambda_triton.register_autograd(_gradient, setup_context=_keep)
