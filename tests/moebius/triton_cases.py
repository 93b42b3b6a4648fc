"""Local-λ's Triton kernel in Triton's interpreter, run by `test_triton_lambda.py` in a process of its own.

The interpreter is chosen when triton is imported, by TRITON_INTERPRET=1. Prints one JSON object: case -> what came out.
The argument "short" or "long" chooses a part of the cases; no case is in both.
"""

import json
import sys

import torch

from moebius.network.lambda_layers import LocalLambda, set_lambda_form
from moebius.network.lambda_ops import local_lambda_reference
from moebius.network.triton_kernel import Blocks, block_choices
from moebius.network.triton_lambda import launch, local_lambda_triton

# name -> (B, (H, W), heads, depth, window): odd sizes, the released depths, pictures smaller than window and block.
SIZES = {
    "one position": (1, (1, 1), 1, 1, 1),
    "odd": (2, (5, 7), 3, 5, 3),
    "tiny preset": (2, (4, 16), 4, 8, 15),
    "narrow": (1, (5, 2), 8, 4, 15),
    "two tiles of a row": (1, (2, 20), 8, 40, 7),
    "deepest": (1, (2, 3), 8, 160, 15),
    "odd heads and depth": (1, (2, 17), 5, 33, 5),
}


SHORT = ("odd", "tiny preset")


def numbers(size, dtype):
    batch, (height, width), heads, depth, window = SIZES[size]
    generator = torch.Generator().manual_seed(len(size))
    shapes = [
        (batch, height * width, heads * depth),
        (batch, height * width, depth),
        (batch, depth, depth),
        (depth, window, window),
    ]
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(dtype) for tensor in tensors], (height, width)


def error(size, dtype, blocks=None):
    inputs, picture = numbers(size, dtype)
    expected = local_lambda_reference(*(tensor.double() for tensor in inputs), picture)
    got = launch(*inputs, picture, blocks)
    assert got.dtype == dtype
    assert got.shape == inputs[0].shape
    assert got.is_contiguous()
    return float((got.double() - expected).norm() / expected.norm())


def layer():
    """A Local-λ layer in training mode, forms "triton" and "reference": output and every gradient, the worst error."""
    found = []
    for form in ("reference", "triton"):
        torch.manual_seed(3)
        module = LocalLambda(24, 3, 5)
        set_lambda_form(module, form)
        x = torch.randn(2, 30, 24, requires_grad=True)
        output = module(x, (5, 6))
        output.backward(torch.randn(output.shape))
        found.append([output.detach(), x.grad, *(parameter.grad for parameter in module.parameters())])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found[1], found[0], strict=True))


def refusal(change):
    inputs, size = numbers("odd", torch.float32)
    try:
        launch(*change(inputs), size)
    except (ValueError, RuntimeError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def short():
    """Two sizes in float32, one in 16 bits, blocks that split the depth, the layer, and what is refused."""
    out = {f"{size}, float32": error(size, torch.float32) for size in SHORT}
    out |= {f"odd, {dtype}": error("odd", getattr(torch, dtype)) for dtype in ("float16", "bfloat16")}
    out["depth in three parts"] = error("odd heads and depth", torch.float32, Blocks(4, 4, 16, 16, 1))
    out["layer"] = layer()
    inputs, size = numbers("odd", torch.float32)
    torch.library.opcheck(local_lambda_triton, (*[tensor.requires_grad_() for tensor in inputs], size))
    out["mixed"] = refusal(lambda tensors: [tensors[0].half(), *tensors[1:]])
    out["double"] = refusal(lambda tensors: [tensor.double() for tensor in tensors])
    out["shapes"] = refusal(lambda tensors: [*tensors[:3], tensors[3][:2]])
    return out


def long():
    """Every size in 32 and 16 bits, and every choice of the tuner."""
    out = {f"{size}, float32": error(size, torch.float32) for size in SIZES if size not in SHORT}
    out |= {
        f"{size}, {dtype}": error(size, getattr(torch, dtype))
        for size in SIZES
        if size != "odd"
        for dtype in ("float16", "bfloat16")
    }
    for itemsize in (2, 4):
        for number, blocks in enumerate(block_choices(8, 40, itemsize)):
            out[f"choice {number} for {itemsize} bytes"] = error("two tiles of a row", torch.float32, blocks)
    return out


if __name__ == "__main__":
    json.dump({"short": short, "long": long}[sys.argv[1]](), sys.stdout)
