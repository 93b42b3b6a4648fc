// The operators' arguments, and a table of their kernels per instruction set.
#pragma once

#include <cstdint>

#include "work.h"

namespace moebius {

// tokens [batch, height*width, channels] -> the same: expand, SiLU, depthwise 3x3, gate, project.
struct FeedForward {
  Index batch, height, width, channels, hidden;
  const float *x, *expand, *expand_bias, *depthwise, *depthwise_bias, *project;
  float* y;
};

// query [batch, n, heads*depth], values [batch, n, depth], summary [batch, depth, depth], window [depth, reach, reach].
struct LocalLambda {
  Index batch, height, width, heads, depth, reach;
  const float *query, *values, *summary, *window;
  float* y;
};

// query [branches, batch, n, heads*depth], keys [branches, n, depth, tokens], values [branches, tokens, width]
// -> [branches, batch, n, heads*width]: (query of a head @ keys of its position) @ values.
struct InteractiveLambda {
  Index branches, batch, n, heads, depth, tokens, width;
  const float *query, *keys, *values;
  float* y;
};

// A separable convolution behind SiLU(GroupNorm): depthwise 3x3, ReLU, 1x1.
struct Separable {
  const float *gain, *shift, *depthwise, *depthwise_bias, *pointwise, *pointwise_bias;
};

// x [batch, inputs, height, width] -> [batch, outputs, height, width]; time [outputs] or [batch, outputs].
struct ResidualBlock {
  Index batch, inputs, outputs, height, width, groups, time_rows;
  float epsilon;
  const float *x, *time;
  Separable first, second;
  const float *shortcut, *shortcut_bias;  // null where x itself is added; inputs == outputs then
  float* y;
};

// x [batch, inputs, height, width], weight [outputs, inputs, 3, 3]; padding 1, stride 1.
struct Conv3x3 {
  Index batch, inputs, outputs, height, width;
  const float *x, *weight, *bias;
  float* y;
};

// x [batch, channels, pixels] -> the same, normalised by groups of channels, times gain plus shift, both [channels].
struct GroupNorm {
  Index batch, channels, pixels, groups;
  float epsilon;
  const float *x, *gain, *shift;
  float* y;
};

// Quantization of activations by channel, see int8.h.
struct Quantiser {
  const float *inverse, *zero;
};

// INT8 weights, and scale and offset by output. Weights of token layers are packed, see int8.h.
struct Int8Product {
  const std::int8_t* weight;
  const float *scale, *offset;
};

// Layer norm of tokens, which is quantized in place of x; `gain` is null where there is none.
struct TokenNorm {
  float epsilon;
  const float *gain, *shift;
};

// x [batch, tokens / batch, inputs] -> [batch, tokens / batch, outputs], or with the last two sizes exchanged, plus `skip`
// of that size if it is not null.
struct Int8Linear {
  Index batch, tokens, inputs, outputs;
  const float* x;
  TokenNorm norm;
  Quantiser quantiser;
  Int8Product product;
  const float* skip;
  float* y;
};

// x [batch, inputs, n], normalised by groups of channels without gain and shift, -> tokens [batch, n, outputs].
struct Int8LinearOfPicture {
  Index batch, n, inputs, outputs, groups;
  float epsilon;
  const float* x;
  Quantiser quantiser;
  Int8Product product;
  float* y;
};

// As FeedForward; with a norm, x itself is added to the result.
struct Int8FeedForward {
  Index batch, height, width, channels, hidden;
  const float* x;
  TokenNorm norm;
  Quantiser quantiser;
  Int8Product expand;
  const float *depthwise, *depthwise_bias;
  Quantiser gated;
  Int8Product project;
  float* y;
};

// As Separable.
struct Int8Separable {
  const float *gain, *shift, *depthwise, *depthwise_bias;
  Quantiser quantiser;
  Int8Product product;
};

// As ResidualBlock.
struct Int8ResidualBlock {
  Index batch, inputs, outputs, height, width, groups, time_rows;
  float epsilon;
  const float *x, *time;
  Int8Separable first, second;
  Quantiser shortcut_quantiser;
  Int8Product shortcut;  // its weight is null where x itself is added
  float* y;
};

// SiLU(GroupNorm), which a convolution applies to its input; `gain` is null where there is none.
struct ActiveNorm {
  Index groups;
  float epsilon;
  const float *gain, *shift;
};

// x [batch, inputs, height, width]; weight by output, tap and input: [outputs, 9, inputs], or after upsampling
// [4, outputs, 4, inputs] with the four output phases first, also in its scale and offset. `before`: the padding above
// and to the left; below and to the right it is 1.
struct Int8Convolution {
  Index batch, inputs, outputs, height, width, before;
  const float* x;
  ActiveNorm norm;
  Quantiser quantiser;
  Int8Product product;
  float* y;
};

// x [batch, inputs, pixels] -> [batch, outputs, pixels].
struct Int8Pointwise {
  Index batch, inputs, outputs, pixels;
  const float* x;
  Quantiser quantiser;
  Int8Product product;
  float* y;
};

struct Kernels {
  const char* name;
  void (*feed_forward)(const FeedForward&, const Threads&);
  void (*local_lambda)(const LocalLambda&, const Threads&);
  void (*interactive_lambda)(const InteractiveLambda&, const Threads&);
  void (*residual_block)(const ResidualBlock&, const Threads&);
  void (*conv3x3)(const Conv3x3&, const Threads&);
  void (*upsample_conv3x3)(const Conv3x3&, const Threads&);  // of x upsampled to [2*height, 2*width] (nearest)
  void (*group_norm)(const GroupNorm&, const Threads&);
  void (*int8_linear)(const Int8Linear&, const Threads&);
  void (*int8_linear_to_picture)(const Int8Linear&, const Threads&);
  void (*int8_linear_of_picture)(const Int8LinearOfPicture&, const Threads&);
  void (*int8_feed_forward)(const Int8FeedForward&, const Threads&);
  void (*int8_residual_block)(const Int8ResidualBlock&, const Threads&);
  void (*int8_conv3x3)(const Int8Convolution&, const Threads&);
  void (*int8_downsample_conv3x3)(const Int8Convolution&, const Threads&);
  void (*int8_upsample_conv3x3)(const Int8Convolution&, const Threads&);
  void (*int8_conv1x1)(const Int8Pointwise&, const Threads&);
};

}  // namespace moebius
