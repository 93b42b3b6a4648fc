"""The functions of domain `moebius` in ONNX's text form: texts only, for the export and for the kernels' tests alike.

A function's body is made of standard operators, so every runtime loads the file. One body serves every resolution: what
depends on sizes is in the node's attributes and in index tables among its inputs, which a kernel may ignore.
"""

from __future__ import annotations

DOMAIN = "moebius"
VERSION = 1
# Opset 20 loads everywhere: ONNX Runtime, TensorRT 10.3 (JetPack 6) to 11, TensorRT-RTX.
OPSET = 20

_LAMBDA_SUMMARY = """
LambdaSummary (keys, values) => (summary) {
  weights = Softmax <axis = -1> (keys)
  summary = MatMul (weights, values)
}
"""

_INTERACTIVE_LAMBDA = """
InteractiveLambda <heads, heads_shape, rows_shape, tokens_shape> (query, keys, values) => (y) {
  to_heads = Constant <value_ints: ints = @heads_shape> ()
  per_head = Reshape (query, to_heads)
  one = Constant <value = int64[1] {1}> ()
  keys_of_all = Unsqueeze (keys, one)
  scores = MatMul (per_head, keys_of_all)
  to_rows = Constant <value_ints: ints = @rows_shape> ()
  rows = Reshape (scores, to_rows)
  values_of_all = Unsqueeze (values, one)
  out = MatMul (rows, values_of_all)
  to_tokens = Constant <value_ints: ints = @tokens_shape> ()
  y = Reshape (out, to_tokens)
}
"""

# Shifted kernels: see `lambda_ops.local_lambda`, which this follows line by line.
_LOCAL_LAMBDA = """
LocalLambda <heads, size, tile, depth_shape, image_shape, margin, near_shape, kernels_shape, tiles_shape, places_shape,
             bands_shape, products_shape, untiled_shape, tokens_shape>
    (query, values, summary, window, neighbours, taps) => (y) {
  to_depth = Constant <value_ints: ints = @depth_shape> ()
  per_head = Reshape (query, to_depth)
  content = MatMul (per_head, summary)

  to_image = Constant <value_ints: ints = @image_shape> ()
  image = Reshape (values, to_image)
  pads = Constant <value_ints: ints = @margin> ()
  bordered = Pad (image, pads)
  places_of_picture = Reshape (bordered, to_depth)
  gathered = Gather <axis = 1> (places_of_picture, neighbours)
  to_near = Constant <value_ints: ints = @near_shape> ()
  near = Reshape (gathered, to_near)

  flat = Constant <value = int64[2] {0, -1}> ()
  all_taps = Reshape (window, flat)
  no_tap = Constant <value = int64[4] {0, 0, 0, 1}> ()
  taps_and_zero = Pad (all_taps, no_tap)
  shifted = Gather <axis = 1> (taps_and_zero, taps)
  to_kernels = Constant <value_ints: ints = @kernels_shape> ()
  by_depth = Reshape (shifted, to_kernels)
  kernels = Transpose <perm = [1, 0, 2]> (by_depth)

  to_tiles = Constant <value_ints: ints = @tiles_shape> ()
  tiled = Reshape (query, to_tiles)
  by_place = Transpose <perm = [2, 4, 0, 1, 3, 5]> (tiled)
  to_places = Constant <value_ints: ints = @places_shape> ()
  q = Reshape (by_place, to_places)
  bands_by_place = MatMul (q, kernels)
  to_bands = Constant <value_ints: ints = @bands_shape> ()
  bands_of_tiles = Reshape (bands_by_place, to_bands)
  bands_by_tile = Transpose <perm = [1, 0, 2]> (bands_of_tiles)
  to_products = Constant <value_ints: ints = @products_shape> ()
  bands = Reshape (bands_by_tile, to_products)
  positions = MatMul (bands, near)
  to_untiled = Constant <value_ints: ints = @untiled_shape> ()
  by_tile = Reshape (positions, to_untiled)
  in_order = Transpose <perm = [0, 1, 3, 2, 4, 5]> (by_tile)
  to_tokens = Constant <value_ints: ints = @tokens_shape> ()
  position_tokens = Reshape (in_order, to_tokens)
  content_tokens = Reshape (content, to_tokens)
  y = Add (position_tokens, content_tokens)
}
"""

# The same by convolution, as the network is written: what a GPU without a kernel of its own likes best.
_LOCAL_LAMBDA_CONVOLUTION = """
LocalLambda <heads, size, planes_shape, margin_hw, lambdas_shape, heads_shape, tokens_shape>
    (query, values, summary, window) => (y) {
  channels_first = Transpose <perm = [0, 2, 1]> (values)
  to_planes = Constant <value_ints: ints = @planes_shape> ()
  planes = Reshape (channels_first, to_planes)
  one = Constant <value = int64[1] {1}> ()
  kernel = Unsqueeze (window, one)
  convolved = Conv <pads: ints = @margin_hw> (planes, kernel)
  to_lambdas = Constant <value_ints: ints = @lambdas_shape> ()
  by_value = Reshape (convolved, to_lambdas)
  lambdas = Transpose <perm = [0, 3, 2, 1]> (by_value)
  content = Unsqueeze (summary, one)
  both = Add (lambdas, content)
  to_heads = Constant <value_ints: ints = @heads_shape> ()
  per_head = Reshape (query, to_heads)
  out = MatMul (per_head, both)
  to_tokens = Constant <value_ints: ints = @tokens_shape> ()
  y = Reshape (out, to_tokens)
}
"""

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
# convolutions and a shuffle, 16 MACs instead of 36. The merged kernels are constants once the file is loaded.
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
GROUP_NORM = """
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

# The same for a picture whose size stays open: the phases one after the other are the channels of mode DCR.
_UPSAMPLE_OPEN = (
    _UPSAMPLE[: _UPSAMPLE.index("  axis = Constant")]
    + """  phases = Concat <axis = 1> (phase_00, phase_01, phase_10, phase_11)
  y = DepthToSpace <blocksize = 2, mode = "DCR"> (phases)
}
"""
)

FORMS = ("tiles", "convolution")
"""The exact bodies of `LocalLambda`."""


def bodies(form: str, *, open_sizes: bool = False) -> dict[str, str]:
    """Name -> function, with the body of `LocalLambda` in one of `FORMS`; each with the header that a parser needs.

    With `open_sizes`, `UpsampleConv3x3` and `GroupNorm` take pictures whose height and width the graph leaves open.
    """
    texts = {
        "Conv3x3": _CONV3X3,
        "FeedForward": _FEED_FORWARD,
        "GroupNorm": GROUP_NORM,
        "InteractiveLambda": _INTERACTIVE_LAMBDA,
        "LambdaSummary": _LAMBDA_SUMMARY,
        "LocalLambda": {"tiles": _LOCAL_LAMBDA, "convolution": _LOCAL_LAMBDA_CONVOLUTION}[form],
        "ProjectedResidualBlock": _residual_block(projected=True),
        "ResidualBlock": _residual_block(projected=False),
        "UpsampleConv3x3": _UPSAMPLE_OPEN if open_sizes else _UPSAMPLE,
    }
    header = f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">'
    return {name: header + text for name, text in texts.items()}
