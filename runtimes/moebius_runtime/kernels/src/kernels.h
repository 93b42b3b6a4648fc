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

// x [batch, tokens / batch, inputs] -> [batch, tokens / batch, outputs], or with the last two sizes exchanged.
struct Int8Linear {
  Index batch, tokens, inputs, outputs;
  const float* x;
  Quantiser quantiser;
  Int8Product product;
  float* y;
};

// As FeedForward.
struct Int8FeedForward {
  Index batch, height, width, channels, hidden;
  const float* x;
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

// x [batch, inputs, height, width]; weight by output, tap and input: [outputs, 9, inputs], or after upsampling
// [4, outputs, 4, inputs] with the four output phases first, also in its scale and offset.
struct Int8Convolution {
  Index batch, inputs, outputs, height, width;
  const float* x;
  Quantiser quantiser;
  Int8Product product;
  float* y;
};

struct Kernels {
  const char* name;
  void (*feed_forward)(const FeedForward&, const Threads&);
  void (*local_lambda)(const LocalLambda&, const Threads&);
  void (*residual_block)(const ResidualBlock&, const Threads&);
  void (*conv3x3)(const Conv3x3&, const Threads&);
  void (*upsample_conv3x3)(const Conv3x3&, const Threads&);  // of x upsampled to [2*height, 2*width] (nearest)
  void (*group_norm)(const GroupNorm&, const Threads&);
  void (*int8_linear)(const Int8Linear&, const Threads&);
  void (*int8_linear_to_picture)(const Int8Linear&, const Threads&);
  void (*int8_feed_forward)(const Int8FeedForward&, const Threads&);
  void (*int8_residual_block)(const Int8ResidualBlock&, const Threads&);
  void (*int8_conv3x3)(const Int8Convolution&, const Threads&);
  void (*int8_downsample_conv3x3)(const Int8Convolution&, const Threads&);
  void (*int8_upsample_conv3x3)(const Int8Convolution&, const Threads&);
};

}  // namespace moebius
