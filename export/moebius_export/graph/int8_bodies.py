"""INT8 layers, as functions of domain `moebius` in ONNX's text format.

An activation x of channel c becomes the whole number round(x * inverse[c] + zero[c]), kept within 0 to 255; weights
are signed bytes with one scale per output; an output is its sum of products times `scale` plus `offset`, into which
bias and zero points went. The bodies compute with these whole numbers in float32, so every runtime loads the file and
gives nearly the same; the compiled kernels (docs/int8-cpu.md) compute with bytes.

Weights of tokens are packed for the kernels, [outputs / 16, inputs / 4, 16, 4], rows of zeros behind the last output.
"""

from __future__ import annotations

from moebius_export.graph.function_bodies import DOMAIN, GROUP_NORM, OPSET

PACKED = 16
"""Outputs that packed weights hold side by side."""

_LIMITS = """
  least = Constant <value = float {0.0}> ()
  most = Constant <value = float {255.0}> ()
"""

# Whole numbers of `x`, whose channels are its last axis.
_TOKEN_NUMBERS = """
  {name}_scaled = Mul ({x}, {name}_inverse)
  {name}_moved = Add ({name}_scaled, {name}_zero)
  {name}_rounded = Round ({name}_moved)
  {name}_numbers = Clip ({name}_rounded, least, most)
"""

# The same of a picture [batch, channels, height, width].
_PICTURE_NUMBERS = """
  {name}_inverses = Unsqueeze ({name}_inverse, pixels)
  {name}_zeros = Unsqueeze ({name}_zero, pixels)
  {name}_scaled = Mul ({x}, {name}_inverses)
  {name}_moved = Add ({name}_scaled, {name}_zeros)
  {name}_rounded = Round ({name}_moved)
  {name}_numbers = Clip ({name}_rounded, least, most)
"""

# Packed weights as a matrix [inputs, outputs] of float32.
_UNPACKED = """
  {name}_by_input = Transpose <perm = [1, 3, 0, 2]> ({name})
  {name}_matrix = Flatten <axis = 2> ({name}_by_input)
  {name}_bytes = Cast <to = 1> ({name}_matrix)
  {name}_first = Constant <value = int64[1] {{0}}> ()
  {name}_axis = Constant <value = int64[1] {{1}}> ()
  {name}_outputs = Shape ({name}_scale)
  {name}_values = Slice ({name}_bytes, {name}_first, {name}_outputs, {name}_axis)
"""

_TOKEN_PRODUCT = """
  {name}_sums = MatMul ({x}, {name}_values)
  {name}_worth = Mul ({name}_sums, {name}_scale)
  {name}_product = Add ({name}_worth, {name}_offset)
"""

_PICTURE_PRODUCT = """
  {name}_values = Cast <to = 1> ({name})
  {name}_sums = Conv ({x}, {name}_values)
  {name}_scales = Unsqueeze ({name}_scale, pixels)
  {name}_offsets = Unsqueeze ({name}_offset, pixels)
  {name}_worth = Mul ({name}_sums, {name}_scales)
  {name}_product = Add ({name}_worth, {name}_offsets)
"""

_TOKEN_NORM = """
  normed = LayerNormalization <axis = -1, epsilon: float = @epsilon> (x, gain, shift)
"""


def _linear(head: str, before: str = "", tokens: str = "x") -> str:
    """A linear layer of `tokens`, which `before` computes."""
    return f"""
{head}, x_inverse, x_zero, weight, weight_scale, weight_offset) => (y) {{
  {_LIMITS}
  {before}
  {_TOKEN_NUMBERS.format(name="x", x=tokens)}
  {_UNPACKED.format(name="weight")}
  {_TOKEN_PRODUCT.format(name="weight", x="x_numbers")}
  y = Identity (weight_product)
}}
"""


# A group norm without gain and shift, and the picture's pixels as tokens.
_PICTURE_TOKENS = """
  count = Constant <value_ints: ints = @ones_shape> ()
  ones = ConstantOfShape <value = float[1] {1.0}> (count)
  no_shifts = ConstantOfShape <value = float[1] {0.0}> (count)
  to_groups = Constant <value_ints: ints = @groups_shape> ()
  grouped = Reshape (x, to_groups)
  normal = InstanceNormalization <epsilon: float = @epsilon> (grouped, ones, no_shifts)
  to_rows = Constant <value_ints: ints = @rows_shape> ()
  rows = Reshape (normal, to_rows)
  tokens = Transpose <perm = [0, 2, 1]> (rows)
"""


def _linear_to_picture(head: str, more: str, after: str) -> str:
    """A linear layer whose output is a picture by channel [batch, outputs, tokens], which `after` takes."""
    return f"""
{head} (x, x_inverse, x_zero, weight, weight_scale, weight_offset{more}) => (y) {{
  {_LIMITS}
  {_TOKEN_NUMBERS.format(name="x", x="x")}
  columns = Transpose <perm = [0, 2, 1]> (x_numbers)
  weight_values = Cast <to = 1> (weight)
  sums = MatMul (weight_values, columns)
  last = Constant <value = int64[1] {{1}}> ()
  scales = Unsqueeze (weight_scale, last)
  offsets = Unsqueeze (weight_offset, last)
  worth = Mul (sums, scales)
  product = Add (worth, offsets)
  {after}
}}
"""


_ADDED = """sizes = Shape (skip)
  image = Reshape (product, sizes)
  y = Add (skip, image)"""


def _feed_forward(head: str, before: str = "", tokens: str = "x", after: str = "Identity (project_product)") -> str:
    """A Mix-FFN of `tokens`, which `before` computes."""
    return f"""
{head}, x_inverse, x_zero, expand, expand_scale, expand_offset, depthwise, depthwise_bias,
     gated_inverse, gated_zero, project, project_scale, project_offset) => (y) {{
  {_LIMITS}
  {before}
  {_TOKEN_NUMBERS.format(name="x", x=tokens)}
  {_UNPACKED.format(name="expand")}
  {_TOKEN_PRODUCT.format(name="expand", x="x_numbers")}
  expanded_gate = Sigmoid (expand_product)
  active = Mul (expand_product, expanded_gate)
  channels_first = Transpose <perm = [0, 2, 1]> (active)
  to_image = Constant <value_ints: ints = @image_shape> ()
  image = Reshape (channels_first, to_image)
  convolved = Conv <pads = [1, 1, 1, 1], group: int = @hidden> (image, depthwise, depthwise_bias)
  value, gate = Split <axis = 1, num_outputs = 2> (convolved)
  gate_gate = Sigmoid (gate)
  gate_active = Mul (gate, gate_gate)
  gated_image = Mul (value, gate_active)
  to_rows = Constant <value = int64[3] {{0, 0, -1}}> ()
  gated_rows = Reshape (gated_image, to_rows)
  gated = Transpose <perm = [0, 2, 1]> (gated_rows)
  {_TOKEN_NUMBERS.format(name="gated", x="gated")}
  {_UNPACKED.format(name="project")}
  {_TOKEN_PRODUCT.format(name="project", x="gated_numbers")}
  y = {after}
}}
"""


_HALF = (
    """
  {half}_sizes = Shape ({x})
  {half}_grouped = Reshape ({x}, to_groups)
  {half}_normal = InstanceNormalization <epsilon: float = @epsilon> ({half}_grouped, ones, no_shifts)
  {half}_image = Reshape ({half}_normal, {half}_sizes)
  {half}_gains = Unsqueeze ({half}_gain, pixels)
  {half}_shifts = Unsqueeze ({half}_shift, pixels)
  {half}_normed = Mul ({half}_image, {half}_gains)
  {half}_shifted = Add ({half}_normed, {half}_shifts)
  {half}_gate = Sigmoid ({half}_shifted)
  {half}_active = Mul ({half}_shifted, {half}_gate)
  {half}_convolved = Conv <pads = [1, 1, 1, 1], group: int = @{half}_channels> (
    {half}_active, {half}_depthwise, {half}_depthwise_bias)
  {half}_positive = Relu ({half}_convolved)
"""
    + _PICTURE_NUMBERS.replace("{name}", "{half}").replace("{x}", "{half}_positive")
    + _PICTURE_PRODUCT.replace("{name}", "{half}_pointwise").replace("{x}", "{half}_numbers")
)

HALF_INPUTS = (
    "gain",
    "shift",
    "depthwise",
    "depthwise_bias",
    "inverse",
    "zero",
    "pointwise",
    "pointwise_scale",
    "pointwise_offset",
)
"""Of each half of a residual block."""

SHORTCUT_INPUTS = ("shortcut_inverse", "shortcut_zero", "shortcut", "shortcut_scale", "shortcut_offset")


def _residual_block(projected: bool) -> str:
    inputs = ["x", "time", *(f"{half}_{name}" for half in ("first", "second") for name in HALF_INPUTS)]
    inputs += SHORTCUT_INPUTS if projected else []
    skip = "skip = Identity (x)"
    if projected:
        skip = _PICTURE_NUMBERS.format(name="shortcut", x="x")
        skip += _PICTURE_PRODUCT.format(name="shortcut", x="shortcut_numbers") + "skip = Identity (shortcut_product)"
    name = "Int8ProjectedResidualBlock" if projected else "Int8ResidualBlock"
    product = "first_pointwise_product"
    return f"""
{name} <groups, epsilon, ones_shape, groups_shape, first_channels, second_channels> ({", ".join(inputs)}) => (y) {{
  {_LIMITS}
  count = Constant <value_ints: ints = @ones_shape> ()
  ones = ConstantOfShape <value = float[1] {{1.0}}> (count)
  no_shifts = ConstantOfShape <value = float[1] {{0.0}}> (count)
  to_groups = Constant <value_ints: ints = @groups_shape> ()
  pixels = Constant <value = int64[2] {{1, 2}}> ()
  {_HALF.format(half="first", x="x")}
  first_sum = {f"Identity ({product})" if projected else f"Add (first_active, {product})"}
  to_image = Constant <value = int64[2] {{2, 3}}> ()
  time_image = Unsqueeze (time, to_image)
  middle = Add (first_sum, time_image)
  {_HALF.format(half="second", x="middle")}
  second_sum = Add (second_active, second_pointwise_product)
  {skip}
  y = Add (second_sum, skip)
}}
"""


# The border of a picture is worth 0, which is the number `zero` of its channel. Convolutions pad with 0, so these sum
# the numbers less their zeros, and add what the zeros are worth.
_CENTRED = f"""
  {_LIMITS}
  pixels = Constant <value = int64[2] {{1, 2}}> ()
  {_PICTURE_NUMBERS.replace("{name}", "x").replace("{x}", "INPUT")}
  less_zero = Sub (x_numbers, x_zeros)
  weight_bytes = Cast <to = 1> (weight)
"""

_CONVOLUTION = f"""
  {_CENTRED}
  weight_values = Transpose <perm = [0, 3, 1, 2]> (weight_bytes)
  sums = Conv <PLACES> (less_zero, weight_values)
  taps = Constant <value = int64[2] {{2, 3}}> ()
  by_input = ReduceSum <keepdims = 0> (weight_values, taps)
  of_zeros = MatMul (by_input, x_zero)
  lost = Unsqueeze (of_zeros, pixels)
  all_sums = Add (sums, lost)
  scales = Unsqueeze (weight_scale, pixels)
  offsets = Unsqueeze (weight_offset, pixels)
  worth = Mul (all_sums, scales)
  y = Add (worth, offsets)
}}
"""


def _convolution(head: str, places: str, before: str = "", picture: str = "x") -> str:
    """A convolution of `picture`, which `before` computes, with these pads and strides."""
    inputs = "x_inverse, x_zero, weight, weight_scale, weight_offset"
    body = _CONVOLUTION.replace("INPUT", picture).replace("PLACES", places)
    return f"{head}, {inputs}) => (y) {{{before}{body}"


# SiLU(GroupNorm(x)), then the convolution.
_NORM = (
    GROUP_NORM[GROUP_NORM.index("{") + 1 : GROUP_NORM.rindex("}")].replace("  y = Add", "  normed = Add")
    + """  norm_gate = Sigmoid (normed)
  active = Mul (normed, norm_gate)
"""
)

_CONV1X1 = f"""
Int8Conv1x1 (x, x_inverse, x_zero, weight, weight_scale, weight_offset) => (y) {{
  {_LIMITS}
  pixels = Constant <value = int64[2] {{1, 2}}> ()
  {_PICTURE_NUMBERS.format(name="x", x="x")}
  {_PICTURE_PRODUCT.format(name="weight", x="x_numbers")}
  y = Identity (weight_product)
}}
"""

_UPSAMPLE = f"""
Int8UpsampleConv3x3 <phases_shape> (x, x_inverse, x_zero, weight, weight_scale, weight_offset) => (y) {{
  {_CENTRED.replace("INPUT", "x")}
  weight_values = Transpose <perm = [0, 1, 4, 2, 3]> (weight_bytes)
  taps = Constant <value = int64[2] {{3, 4}}> ()
  by_input = ReduceSum <keepdims = 0> (weight_values, taps)
  of_zeros = MatMul (by_input, x_zero)
  kernels_00, kernels_01, kernels_10, kernels_11 = Split <axis = 0, num_outputs = 4> (weight_values)
  first = Constant <value = int64[1] {{0}}> ()
  kernel_00 = Squeeze (kernels_00, first)
  kernel_01 = Squeeze (kernels_01, first)
  kernel_10 = Squeeze (kernels_10, first)
  kernel_11 = Squeeze (kernels_11, first)
  phase_00 = Conv <pads = [1, 1, 0, 0]> (less_zero, kernel_00)
  phase_01 = Conv <pads = [1, 0, 0, 1]> (less_zero, kernel_01)
  phase_10 = Conv <pads = [0, 1, 1, 0]> (less_zero, kernel_10)
  phase_11 = Conv <pads = [0, 0, 1, 1]> (less_zero, kernel_11)
  axis = Constant <value = int64[1] {{2}}> ()
  stack_00 = Unsqueeze (phase_00, axis)
  stack_01 = Unsqueeze (phase_01, axis)
  stack_10 = Unsqueeze (phase_10, axis)
  stack_11 = Unsqueeze (phase_11, axis)
  sums = Concat <axis = 2> (stack_00, stack_01, stack_10, stack_11)
  to_image = Constant <value = int64[2] {{2, 3}}> ()
  lost_by_output = Transpose <perm = [1, 0]> (of_zeros)
  lost = Unsqueeze (lost_by_output, to_image)
  all_sums = Add (sums, lost)
  scale_by_output = Transpose <perm = [1, 0]> (weight_scale)
  scales = Unsqueeze (scale_by_output, to_image)
  offset_by_output = Transpose <perm = [1, 0]> (weight_offset)
  offsets = Unsqueeze (offset_by_output, to_image)
  worth = Mul (all_sums, scales)
  stacked = Add (worth, offsets)
  height_and_width = Shape <start = 2> (x)
  batch_and_rest = Constant <value = int64[2] {{0, -1}}> ()
  to_phases = Concat <axis = 0> (batch_and_rest, height_and_width)
  phases = Reshape (stacked, to_phases)
  y = DepthToSpace <blocksize = 2, mode = "CRD"> (phases)
}}
"""


def bodies() -> dict[str, str]:
    """Name -> function, each with the header that a parser needs."""
    texts = {
        "Int8Conv1x1": _CONV1X1,
        "Int8Conv3x3": _convolution("Int8Conv3x3 (x", "pads = [1, 1, 1, 1]"),
        "Int8DownsampleConv3x3": _convolution(
            "Int8DownsampleConv3x3 <pads> (x", "pads: ints = @pads, strides = [2, 2]"
        ),
        "Int8FeedForward": _feed_forward("Int8FeedForward <size, image_shape, hidden> (x"),
        "Int8Linear": _linear("Int8Linear (x"),
        "Int8LinearAddedToPicture": _linear_to_picture("Int8LinearAddedToPicture", ", skip", _ADDED),
        "Int8LinearOfPicture": _linear(
            "Int8LinearOfPicture <groups, epsilon, ones_shape, groups_shape, rows_shape> (x", _PICTURE_TOKENS, "tokens"
        ),
        "Int8LinearToPicture": _linear_to_picture("Int8LinearToPicture", "", "y = Identity (product)"),
        "Int8NormConv3x3": _convolution(
            "Int8NormConv3x3 <groups, epsilon, groups_shape, row_shape> (x, gain, shift",
            "pads = [1, 1, 1, 1]",
            _NORM,
            "active",
        ),
        "Int8NormFeedForward": _feed_forward(
            "Int8NormFeedForward <size, image_shape, hidden, epsilon> (x, gain, shift",
            _TOKEN_NORM,
            "normed",
            "Add (x, project_product)",
        ),
        "Int8NormLinear": _linear("Int8NormLinear <epsilon> (x, gain, shift", _TOKEN_NORM, "normed"),
        "Int8ProjectedResidualBlock": _residual_block(projected=True),
        "Int8ResidualBlock": _residual_block(projected=False),
        "Int8UpsampleConv3x3": _UPSAMPLE,
    }
    header = f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">'
    return {name: header + text for name, text in texts.items()}
