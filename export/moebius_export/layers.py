"""Whole layers as ONNX model-local functions of domain `moebius`, beside the λ operators of `moebius_export.functions`.

`FeedForward`, `ResidualBlock`, `ProjectedResidualBlock` (whose channels differ, so that it has a shortcut), `Conv3x3`,
`UpsampleConv3x3` and `GroupNorm`: the operators of `moebius.layer_ops`. Weights are inputs as the checkpoint has them
(batch norms folded), so that a kernel can use them as they lie in the file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_FEED_FORWARD = """
FeedForward <size, image_shape, hidden> (x, expand, expand_bias, depthwise, depthwise_bias, project) => (y) {
  channels_first = Transpose <perm = [0, 2, 1]> (x)
  to_image = Constant <value_ints: ints = @image_shape> ()
  image = Reshape (channels_first, to_image)
  expanded = Conv (image, expand, expand_bias)
  expanded_gate = Sigmoid (expanded)
  active = Mul (expanded, expanded_gate)
  convolved = Conv <pads = [1, 1, 1, 1], group: int = @hidden> (active, depthwise, depthwise_bias)
  value, gate = Split <axis = 1, num_outputs = 2> (convolved)
  gate_gate = Sigmoid (gate)
  gate_active = Mul (gate, gate_gate)
  gated = Mul (value, gate_active)
  projected = Conv (gated, project)
  to_rows = Constant <value = int64[3] {0, 0, -1}> ()
  rows = Reshape (projected, to_rows)
  y = Transpose <perm = [0, 2, 1]> (rows)
}
"""

# A group norm over [B, groups, rest]: ONNX's own operator of that name comes after opset 20.
_HALF = """
  {half}_sizes = Shape ({x})
  {half}_grouped = Reshape ({x}, to_groups)
  {half}_normal = InstanceNormalization <epsilon: float = @epsilon> ({half}_grouped, ones, zeros)
  {half}_image = Reshape ({half}_normal, {half}_sizes)
  {half}_gains = Unsqueeze ({half}_gain, pixels)
  {half}_shifts = Unsqueeze ({half}_shift, pixels)
  {half}_scaled = Mul ({half}_image, {half}_gains)
  {half}_shifted = Add ({half}_scaled, {half}_shifts)
  {half}_gate = Sigmoid ({half}_shifted)
  {half}_active = Mul ({half}_shifted, {half}_gate)
  {half}_convolved = Conv <pads = [1, 1, 1, 1], group: int = @{half}_channels> (
    {half}_active, {half}_depthwise, {half}_depthwise_bias)
  {half}_positive = Relu ({half}_convolved)
  {half}_product = Conv ({half}_positive, {half}_pointwise, {half}_pointwise_bias)
"""

_HALF_INPUTS = ("gain", "shift", "depthwise", "depthwise_bias", "pointwise", "pointwise_bias")


def _residual_block(projected: bool) -> str:
    inputs = ["x", "time", *(f"{half}_{name}" for half in ("first", "second") for name in _HALF_INPUTS)]
    inputs += ["shortcut", "shortcut_bias"] if projected else []
    name = "ProjectedResidualBlock" if projected else "ResidualBlock"
    return f"""
{name} <groups, epsilon, ones_shape, groups_shape, first_channels, second_channels> ({", ".join(inputs)}) => (y) {{
  count = Constant <value_ints: ints = @ones_shape> ()
  ones = ConstantOfShape <value = float[1] {{1.0}}> (count)
  zeros = ConstantOfShape <value = float[1] {{0.0}}> (count)
  to_groups = Constant <value_ints: ints = @groups_shape> ()
  pixels = Constant <value = int64[2] {{1, 2}}> ()
  {_HALF.format(half="first", x="x")}
  first_sum = {"Identity (first_product)" if projected else "Add (first_active, first_product)"}
  to_image = Constant <value = int64[2] {{2, 3}}> ()
  time_image = Unsqueeze (time, to_image)
  middle = Add (first_sum, time_image)
  {_HALF.format(half="second", x="middle")}
  second_sum = Add (second_active, second_product)
  skip = {"Conv (x, shortcut, shortcut_bias)" if projected else "Identity (x)"}
  y = Add (second_sum, skip)
}}
"""


_CONV3X3 = """
Conv3x3 (x, weight, bias) => (y) {
  y = Conv <pads = [1, 1, 1, 1]> (x, weight, bias)
}
"""

# Row 2i + a of the enlarged picture's convolution sees two rows of the small one, columns likewise: four 2x2
# convolutions and a shuffle, 16 products instead of 36. The merged kernels are constants once the file is loaded.
_UPSAMPLE = """
UpsampleConv3x3 <phases_shape> (x, weight, bias) => (y) {
  top, middle, bottom = Split <axis = 2, num_outputs = 3> (weight)
  lower = Add (middle, bottom)
  upper = Add (top, middle)
  even = Concat <axis = 2> (top, lower)
  odd = Concat <axis = 2> (upper, bottom)
  even_left, even_centre, even_right = Split <axis = 3, num_outputs = 3> (even)
  even_after = Add (even_centre, even_right)
  even_before = Add (even_left, even_centre)
  kernel_00 = Concat <axis = 3> (even_left, even_after)
  kernel_01 = Concat <axis = 3> (even_before, even_right)
  odd_left, odd_centre, odd_right = Split <axis = 3, num_outputs = 3> (odd)
  odd_after = Add (odd_centre, odd_right)
  odd_before = Add (odd_left, odd_centre)
  kernel_10 = Concat <axis = 3> (odd_left, odd_after)
  kernel_11 = Concat <axis = 3> (odd_before, odd_right)
  phase_00 = Conv <pads = [1, 1, 0, 0]> (x, kernel_00, bias)
  phase_01 = Conv <pads = [1, 0, 0, 1]> (x, kernel_01, bias)
  phase_10 = Conv <pads = [0, 1, 1, 0]> (x, kernel_10, bias)
  phase_11 = Conv <pads = [0, 0, 1, 1]> (x, kernel_11, bias)
  axis = Constant <value = int64[1] {2}> ()
  stack_00 = Unsqueeze (phase_00, axis)
  stack_01 = Unsqueeze (phase_01, axis)
  stack_10 = Unsqueeze (phase_10, axis)
  stack_11 = Unsqueeze (phase_11, axis)
  stacked = Concat <axis = 2> (stack_00, stack_01, stack_10, stack_11)
  to_phases = Constant <value_ints: ints = @phases_shape> ()
  phases = Reshape (stacked, to_phases)
  y = DepthToSpace <blocksize = 2, mode = "CRD"> (phases)
}
"""

# The mean of rows first, then the mean of these: a mean of a million values at once is off by 1e-5 in ONNX Runtime's
# InstanceNormalization.
_GROUP_NORM = """
GroupNorm <groups, epsilon, groups_shape, row_shape> (x, gain, shift) => (y) {
  sizes = Shape (x)
  to_groups = Constant <value_ints: ints = @groups_shape> ()
  grouped = Reshape (x, to_groups)
  last = Constant <value = int64[1] {-1}> ()
  row_means = ReduceMean <keepdims = 1> (grouped, last)
  middle = Constant <value = int64[1] {2}> ()
  mean = ReduceMean <keepdims = 1> (row_means, middle)
  centred = Sub (grouped, mean)
  squares = Mul (centred, centred)
  row_squares = ReduceMean <keepdims = 1> (squares, last)
  variance = ReduceMean <keepdims = 1> (row_squares, middle)
  small = Constant <value_float: float = @epsilon> ()
  above = Add (variance, small)
  deviation = Sqrt (above)
  normal = Div (centred, deviation)
  image = Reshape (normal, sizes)
  to_channels = Constant <value_ints: ints = @row_shape> ()
  gains = Reshape (gain, to_channels)
  shifts = Reshape (shift, to_channels)
  scaled = Mul (image, gains)
  y = Add (scaled, shifts)
}
"""

BODIES = {
    "GroupNorm": _GROUP_NORM,
    "FeedForward": _FEED_FORWARD,
    "ResidualBlock": _residual_block(projected=False),
    "ProjectedResidualBlock": _residual_block(projected=True),
    "Conv3x3": _CONV3X3,
    "UpsampleConv3x3": _UPSAMPLE,
}
"""Name -> function in ONNX's text form."""


def translations(operators: dict[str, Any]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What `torch.onnx.export` writes for each operator of `moebius.layer_ops`."""

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
        height, width = x.shape[2:]
        return operators["UpsampleConv3x3"](x, weight, bias, phases_shape=[0, -1, height, width])

    def group_norm(x: Any, gain: Any, shift: Any, groups: int, epsilon: float) -> Any:
        width, others = x.shape[-1], len(x.shape) - 2
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
