"""Whole layers as custom operators, such as `torch.ops.moebius.feed_forward`. For inference: no gradients.

Each is one node of an exported graph (domain `moebius`, see `moebius_export.graph.layers`), which a runtime may fuse.
The implementations here use PyTorch's own operations, with the weights as they are in the checkpoint.

Letters in shapes: B batch, n positions (H*W), C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("moebius::feed_forward", mutates_args=())
def feed_forward(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    size: Sequence[int],
) -> Tensor:
    """Mix-FFN (paper, section 3.2): expand, SiLU, 3x3 depthwise, gate, project.

    Args:
        x: tokens [B, n, C] of a picture of `size` (H, W), n = H*W in raster order.
        expand, expand_bias: [hidden, C, 1, 1] and [hidden]; the second half of the channels is the gate.
        depthwise, depthwise_bias: [hidden, 1, 3, 3] and [hidden].
        project: [C, hidden / 2, 1, 1].
        size: (H, W).

    Returns:
        [B, n, C].
    """
    image = x.transpose(1, 2).unflatten(2, tuple(size))  # [B, n, C] -> [B, C, H, W]
    active = F.silu(F.conv2d(image, expand, expand_bias))
    value, gate = F.conv2d(active, depthwise, depthwise_bias, padding=1, groups=depthwise.shape[0]).chunk(2, dim=1)
    return F.conv2d(value * F.silu(gate), project).flatten(2).transpose(1, 2).contiguous()  # [B, n, C]


@feed_forward.register_fake
def _(
    x: Tensor,
    expand: Tensor,
    expand_bias: Tensor,
    depthwise: Tensor,
    depthwise_bias: Tensor,
    project: Tensor,
    size: Sequence[int],
) -> Tensor:
    if x.shape[1] != size[0] * size[1]:
        raise ValueError(f"x is {list(x.shape)}; expected {size[0] * size[1]} positions for a picture of {list(size)}")
    return torch.empty_like(x)


@torch.library.custom_op("moebius::residual_block", mutates_args=())
def residual_block(
    x: Tensor,
    time: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    shortcut: Sequence[Tensor],
    groups: int,
    epsilon: float,
) -> Tensor:
    """Residual block with its batch norms folded: two separable convolutions, the timestep added between them.

    Args:
        x: [B, in, H, W].
        time: the block's projection of the timestep, [1, out] or [B, out].
        first, second: group norm's gain and shift [channels], depthwise weight [channels, 1, 3, 3] and bias [channels],
            1x1 weight [out, channels, 1, 1] and bias [out]. A half whose channels are equal adds its normalised input.
        shortcut: 1x1 weight [out, in, 1, 1] and bias [out]; nothing where in = out.
        groups, epsilon: of both group norms.

    Returns:
        [B, out, H, W].
    """
    y = _separable(x, first, groups, epsilon) + time[:, :, None, None]
    y = _separable(y, second, groups, epsilon)
    return y + (F.conv2d(x, shortcut[0], shortcut[1]) if shortcut else x)


def _separable(x: Tensor, weights: Sequence[Tensor], groups: int, epsilon: float) -> Tensor:
    gain, shift, depthwise, depthwise_bias, pointwise, pointwise_bias = weights
    active = F.silu(F.group_norm(x, groups, gain, shift, epsilon))
    hidden = F.relu(F.conv2d(active, depthwise, depthwise_bias, padding=1, groups=depthwise.shape[0]))
    y = F.conv2d(hidden, pointwise, pointwise_bias)
    return active + y if pointwise.shape[0] == pointwise.shape[1] else y


@residual_block.register_fake
def _(
    x: Tensor,
    time: Tensor,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    shortcut: Sequence[Tensor],
    groups: int,
    epsilon: float,
) -> Tensor:
    return x.new_empty(x.shape[0], second[4].shape[0], x.shape[2], x.shape[3])


@torch.library.custom_op("moebius::conv3x3", mutates_args=())
def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution, stride 1, padding 1: x [B, in, H, W], weight [out, in, 3, 3], bias [out] -> [B, out, H, W]."""
    return F.conv2d(x, weight, bias, padding=1)


@conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], x.shape[2], x.shape[3])


@torch.library.custom_op("moebius::upsample_conv3x3", mutates_args=())
def upsample_conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Nearest x2 upsampling, then a 3x3 convolution: x [B, in, H, W] -> [B, out, 2H, 2W]; weights as `conv3x3`."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


@upsample_conv3x3.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], 2 * x.shape[2], 2 * x.shape[3])


@torch.library.custom_op("moebius::group_norm", mutates_args=())
def group_norm(x: Tensor, gain: Tensor, shift: Tensor, groups: int, epsilon: float) -> Tensor:
    """Group norm: x [B, C, ...], gain and shift [C] -> as x."""
    return F.group_norm(x, groups, gain, shift, epsilon)


@group_norm.register_fake
def _(x: Tensor, gain: Tensor, shift: Tensor, groups: int, epsilon: float) -> Tensor:
    return torch.empty_like(x)
