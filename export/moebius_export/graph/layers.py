"""Whole layers as ONNX model-local functions of domain `moebius`, beside the λ operators of
`moebius_export.graph.functions`.

`FeedForward`, `ResidualBlock`, `ProjectedResidualBlock` (whose channels differ, so that it has a shortcut), `Conv3x3`,
`UpsampleConv3x3` and `GroupNorm`: the operators of `moebius.network.layer_ops`. Weights are inputs as the checkpoint
has them
(batch norms folded), so that a kernel can use them as they lie in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

OPEN = 0
"""Stands for a size that stays open in a shape attribute."""


def translations(operators: dict[str, Any]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` writes for each operator of `moebius.network.layer_ops`."""

    def feed_forward(
        x: Any, expand: Any, expand_bias: Any, depthwise: Any, depthwise_bias: Any, project: Any, size: Sequence[int]
    ) -> Any:
        return operators["FeedForward"](
            x,
            expand,
            expand_bias,
            depthwise,
            depthwise_bias,
            project,
            size=list(size),
            image_shape=[0, 0, *size],
            hidden=expand.shape[0],
        )

    def residual_block(
        x: Any,
        time: Any,
        first: Sequence[Any],
        second: Sequence[Any],
        shortcut: Sequence[Any],
        groups: int,
        epsilon: float,
    ) -> Any:
        return operators["ProjectedResidualBlock" if shortcut else "ResidualBlock"](
            x,
            time,
            *first,
            *second,
            *shortcut,
            groups=groups,
            epsilon=epsilon,
            ones_shape=[groups],
            groups_shape=[0, groups, -1],
            first_channels=first[2].shape[0],
            second_channels=second[2].shape[0],
        )

    def conv3x3(x: Any, weight: Any, bias: Any) -> Any:
        return operators["Conv3x3"](x, weight, bias)

    def upsample_conv3x3(x: Any, weight: Any, bias: Any) -> Any:
        sizes = [size if isinstance(size, int) else OPEN for size in x.shape[2:]]
        return operators["UpsampleConv3x3"](x, weight, bias, phases_shape=[0, -1, *sizes])

    def group_norm(x: Any, gain: Any, shift: Any, groups: int, epsilon: float) -> Any:
        width, others = x.shape[-1], len(x.shape) - 2
        if not isinstance(width, int):
            width = OPEN  # the fourth size of what is reshaped, which is the picture's width
        return operators["GroupNorm"](
            x,
            gain,
            shift,
            groups=groups,
            epsilon=epsilon,
            groups_shape=[0, groups, -1, width],
            row_shape=[-1, *[1] * others],
        )

    return {
        torch.ops.moebius.group_norm.default: group_norm,
        torch.ops.moebius.feed_forward.default: feed_forward,
        torch.ops.moebius.residual_block.default: residual_block,
        torch.ops.moebius.conv3x3.default: conv3x3,
        torch.ops.moebius.upsample_conv3x3.default: upsample_conv3x3,
    }
