// Checks the arguments of the INT8 operators. int8.h explains them.
#pragma once

#include <string>

#include "call.h"
#include "kernels.h"

namespace {

constexpr int64_t kPackedOutputs = 16;

// Checked sizes of a picture.
inline Tensor picture(const Call& call) {
  const Tensor x = call.input(0);
  expect(x.sizes.size() == 4 && x.sizes[1] > 0 && x.sizes[2] > 0 && x.sizes[3] > 0, "x", x.sizes,
         "[batch, inputs, height, width]");
  return x;
}

inline void check_epsilon(const Attributes& attributes) {
  if (!(attributes.epsilon >= 0))
    throw Refusal("epsilon is " + std::to_string(attributes.epsilon) + " or missing; expected 0 or more");
}

// Of a norm over `inputs` channels, and one over `outputs`.
inline void check_groups(const Attributes& attributes, int64_t inputs, int64_t outputs) {
  const int64_t groups = attributes.groups;
  if (groups < 1 || inputs % groups || outputs % groups)
    throw Refusal("groups is " + std::to_string(groups) + "; expected a divisor of " + std::to_string(inputs) +
                  (inputs == outputs ? "" : " and " + std::to_string(outputs)));
  check_epsilon(attributes);
}

// Arguments that float and INT8 blocks share: x, time, sizes and attributes.
template <class Block>
void read_block(Block& f, const Attributes& attributes, const Call& call, bool projected) {
  const Tensor x = call.input(0), time = call.input(1);
  expect(x.sizes.size() == 4 && x.sizes[1] > 0 && x.sizes[2] > 0 && x.sizes[3] > 0, "x", x.sizes,
         "[batch, inputs, height, width]");
  f.batch = x.sizes[0], f.inputs = x.sizes[1], f.height = x.sizes[2], f.width = x.sizes[3];
  expect(time.sizes.size() == 2 && (time.sizes[0] == 1 || time.sizes[0] == f.batch) && time.sizes[1] > 0 &&
             (projected || time.sizes[1] == f.inputs),
         "time", time.sizes, projected ? "[1 or batch, outputs]" : "[1 or batch, channels of x]");
  f.time_rows = time.sizes[0], f.outputs = time.sizes[1];
  check_groups(attributes, f.inputs, f.outputs);
  f.groups = attributes.groups, f.epsilon = attributes.epsilon;
  f.x = x.data, f.time = time.data;
}

void expect_fours(int64_t size, const char* name) {
  if (size % 4) throw Refusal(std::string(name) + " is " + std::to_string(size) + "; expected a multiple of 4");
}

inline moebius::Quantiser quantiser(const Call& call, size_t first, const std::string& name, int64_t channels) {
  return {call.input(first, (name + "_inverse").c_str(), {channels}),
          call.input(first + 1, (name + "_zero").c_str(), {channels})};
}

// Weight, scale and offset; the weight of tokens is packed.
inline moebius::Int8Product product(const Call& call, size_t first, const std::string& name, int64_t inputs, int64_t outputs,
                                    bool packed, bool picture) {
  expect_fours(inputs, (name + "'s input channels").c_str());
  const int64_t panels = outputs / kPackedOutputs + (outputs % kPackedOutputs != 0);
  const Sizes sizes = packed    ? Sizes{panels, inputs / 4, kPackedOutputs, 4}
                      : picture ? Sizes{outputs, inputs, 1, 1}
                                : Sizes{outputs, inputs};
  return {call.bytes(first, name.c_str(), sizes), call.input(first + 1, (name + "_scale").c_str(), {outputs}),
          call.input(first + 2, (name + "_offset").c_str(), {outputs})};
}

// A norm's gain and shift [channels], which come after x.
inline moebius::TokenNorm token_norm(const Attributes& attributes, const Call& call, int64_t channels) {
  check_epsilon(attributes);
  return {attributes.epsilon, call.input(1, "gain", {channels}), call.input(2, "shift", {channels})};
}

enum class Linear { tokens, normed, to_picture, added_to_picture };

inline moebius::Int8Linear int8_linear_of(const Attributes& attributes, const Call& call, Linear kind) {
  const bool to_picture = kind == Linear::to_picture || kind == Linear::added_to_picture;
  const size_t next = kind == Linear::normed ? 3 : 1;
  const Tensor x = call.input(0), scale = call.input(next + 3);
  expect((x.sizes.size() == 3 || (x.sizes.size() == 2 && !to_picture)) && x.sizes.back() > 0, "x", x.sizes,
         to_picture ? "[batch, tokens, channels]" : "[batch, tokens, channels] or [tokens, channels]");
  expect(scale.sizes.size() == 1 && scale.sizes[0] > 0, "weight_scale", scale.sizes, "[outputs]");
  moebius::Int8Linear f{};
  const bool batched = x.sizes.size() == 3;
  f.batch = batched ? x.sizes[0] : 1, f.inputs = x.sizes.back(), f.outputs = scale.sizes[0];
  const int64_t each = batched ? x.sizes[1] : x.sizes[0];
  f.tokens = f.batch && each ? f.batch * each : 0;
  f.x = x.data;
  if (kind == Linear::normed) f.norm = token_norm(attributes, call, f.inputs);
  f.quantiser = quantiser(call, next, "x", f.inputs);
  f.product = product(call, next + 2, "weight", f.inputs, f.outputs, !to_picture, false);
  Sizes sizes = x.sizes;
  sizes.back() = f.outputs;
  if (to_picture) sizes = {f.batch, f.outputs, each};
  if (kind == Linear::added_to_picture) {
    const Tensor skip = call.input(6);
    expect(skip.sizes.size() == 4 && skip.sizes[0] == f.batch && skip.sizes[1] == f.outputs &&
               is_product(each, skip.sizes[2], skip.sizes[3]),
           "skip", skip.sizes, "[batch, outputs, height, width] with a pixel for each token");
    f.skip = skip.data, sizes = skip.sizes;
  }
  f.y = call.output(sizes);
  return f;
}

inline moebius::Int8LinearOfPicture int8_linear_of_picture_of(const Attributes& attributes, const Call& call) {
  const Tensor x = picture(call), scale = call.input(4);
  expect(scale.sizes.size() == 1 && scale.sizes[0] > 0, "weight_scale", scale.sizes, "[outputs]");
  moebius::Int8LinearOfPicture f{};
  f.batch = x.sizes[0], f.inputs = x.sizes[1], f.n = x.sizes[2] * x.sizes[3], f.outputs = scale.sizes[0];
  check_groups(attributes, f.inputs, f.inputs);
  f.groups = attributes.groups, f.epsilon = attributes.epsilon;
  f.x = x.data;
  f.quantiser = quantiser(call, 1, "x", f.inputs);
  f.product = product(call, 3, "weight", f.inputs, f.outputs, true, false);
  f.y = call.output({f.batch, f.n, f.outputs});
  return f;
}

inline moebius::Int8FeedForward int8_feed_forward_of(const Attributes& attributes, const Call& call, bool normed) {
  const size_t next = normed ? 3 : 1;
  const Tensor x = call.input(0), scale = call.input(next + 3);
  const int64_t height = attributes.size[0], width = attributes.size[1];
  expect(x.sizes.size() == 3 && is_product(x.sizes[1], height, width) && x.sizes[2] > 0, "x", x.sizes,
         "[batch, height*width, channels]");
  expect(scale.sizes.size() == 1 && scale.sizes[0] > 0 && scale.sizes[0] % (2 * kPackedOutputs) == 0, "expand_scale",
         scale.sizes, "[hidden] with a multiple of 32");
  moebius::Int8FeedForward f{};
  f.batch = x.sizes[0], f.height = height, f.width = width, f.channels = x.sizes[2], f.hidden = scale.sizes[0];
  f.x = x.data;
  if (normed) f.norm = token_norm(attributes, call, f.channels);
  f.quantiser = quantiser(call, next, "x", f.channels);
  f.expand = product(call, next + 2, "expand", f.channels, f.hidden, true, false);
  f.depthwise = call.input(next + 5, "depthwise", {f.hidden, 1, 3, 3});
  f.depthwise_bias = call.input(next + 6, "depthwise_bias", {f.hidden});
  f.gated = quantiser(call, next + 7, "gated", f.hidden / 2);
  f.project = product(call, next + 9, "project", f.hidden / 2, f.channels, true, false);
  f.y = call.output(x.sizes);
  return f;
}

// Nine of a block's inputs: gain, shift, depthwise, its bias, quantiser, product.
inline moebius::Int8Separable int8_separable(const Call& call, size_t first, const std::string& name, int64_t inputs,
                                             int64_t outputs) {
  moebius::Int8Separable s{};
  s.gain = call.input(first, (name + "_gain").c_str(), {inputs});
  s.shift = call.input(first + 1, (name + "_shift").c_str(), {inputs});
  s.depthwise = call.input(first + 2, (name + "_depthwise").c_str(), {inputs, 1, 3, 3});
  s.depthwise_bias = call.input(first + 3, (name + "_depthwise_bias").c_str(), {inputs});
  s.quantiser = quantiser(call, first + 4, name, inputs);
  s.product = product(call, first + 6, name + "_pointwise", inputs, outputs, false, true);
  return s;
}

inline moebius::Int8ResidualBlock int8_residual_block_of(const Attributes& attributes, const Call& call, bool projected) {
  moebius::Int8ResidualBlock f{};
  read_block(f, attributes, call, projected);
  f.first = int8_separable(call, 2, "first", f.inputs, f.outputs);
  f.second = int8_separable(call, 11, "second", f.outputs, f.outputs);
  if (projected) {
    f.shortcut_quantiser = quantiser(call, 20, "shortcut", f.inputs);
    f.shortcut = product(call, 22, "shortcut", f.inputs, f.outputs, false, true);
  }
  f.y = call.output({f.batch, f.outputs, f.height, f.width});
  return f;
}

enum class Resized { no, half, twice };

// Stride 1 or 2, or after upsampling by 2, when each of the four output phases has its own weights. With a norm, its gain
// and shift come after x.
inline moebius::Int8Convolution int8_convolution_of(const Attributes& attributes, const Call& call, Resized resized,
                                                    bool normed) {
  const bool enlarged = resized == Resized::twice;
  const size_t next = normed ? 3 : 1;
  const Tensor x = picture(call), scale = call.input(next + 3);
  const size_t rank = enlarged ? 2 : 1;
  expect(scale.sizes.size() == rank && scale.sizes.back() > 0 && (!enlarged || scale.sizes[0] == 4), "weight_scale",
         scale.sizes, enlarged ? "[4, outputs]" : "[outputs]");
  moebius::Int8Convolution f{};
  f.batch = x.sizes[0], f.inputs = x.sizes[1], f.height = x.sizes[2], f.width = x.sizes[3], f.before = 1;
  f.outputs = scale.sizes.back();
  expect_fours(f.inputs, "weight's input channels");
  f.x = x.data;
  if (normed) {
    check_groups(attributes, f.inputs, f.inputs);
    f.norm = {attributes.groups, attributes.epsilon, call.input(1, "gain", {f.inputs}), call.input(2, "shift", {f.inputs})};
  }
  if (resized == Resized::half) {
    const Sizes& pads = attributes.pads;
    expect(pads == Sizes{1, 1, 1, 1} || pads == Sizes{0, 0, 1, 1}, "pads", pads, "[1, 1, 1, 1] or [0, 0, 1, 1]");
    expect(pads[0] == 1 || (f.height > 1 && f.width > 1), "x", x.sizes, "a height and width of 2 or more");
    f.before = pads[0];
  }
  f.quantiser = quantiser(call, next, "x", f.inputs);
  const Sizes sizes = enlarged ? Sizes{4, f.outputs, 2, 2, f.inputs} : Sizes{f.outputs, 3, 3, f.inputs};
  f.product = {call.bytes(next + 2, "weight", sizes), call.input(next + 3, "weight_scale", scale.sizes),
               call.input(next + 4, "weight_offset", scale.sizes)};
  f.y = call.output(enlarged                    ? Sizes{f.batch, f.outputs, 2 * f.height, 2 * f.width}
                    : resized == Resized::half ? Sizes{f.batch, f.outputs, (f.height + f.before) / 2, (f.width + f.before) / 2}
                                               : Sizes{f.batch, f.outputs, f.height, f.width});
  return f;
}

inline moebius::Int8Pointwise int8_pointwise_of(const Call& call) {
  const Tensor x = picture(call), scale = call.input(4);
  expect(scale.sizes.size() == 1 && scale.sizes[0] > 0, "weight_scale", scale.sizes, "[outputs]");
  moebius::Int8Pointwise f{};
  f.batch = x.sizes[0], f.inputs = x.sizes[1], f.outputs = scale.sizes[0], f.pixels = x.sizes[2] * x.sizes[3];
  f.x = x.data;
  f.quantiser = quantiser(call, 1, "x", f.inputs);
  f.product = product(call, 3, "weight", f.inputs, f.outputs, false, true);
  f.y = call.output({f.batch, f.outputs, x.sizes[2], x.sizes[3]});
  return f;
}

}  // namespace
