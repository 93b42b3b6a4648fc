// INT8 linear layer of tokens. Tokens are the rows of the matmul; the output is tokens again, or a picture by channel.
#pragma once

#include <cmath>

#include "group_norm.h"
#include "int8.h"
#include "kernels.h"

namespace MOEBIUS_VARIANT {

// Tokens [count, depth] -> INT8 of the same sizes.
inline void quantise_tokens(const float* x, Index count, Index depth, const moebius::TokenNorm& norm,
                            const moebius::Quantiser& q, std::uint8_t* to) {
  const auto each = [&](auto&& value) {
    Index c = 0;
    for (; c + kLanes <= depth; c += kLanes)
      store_bytes(to + c, quantise(value(c, std::integral_constant<int, kLanes>{}), load(q.inverse + c), load(q.zero + c)));
    if (const int rest = int(depth - c))
      store_bytes(to + c, quantise(value(c, rest), load(q.inverse + c, rest), load(q.zero + c, rest)), rest);
  };
  for (Index t = 0; t < count; ++t, x += depth, to += depth) {
    if (norm.gain == nullptr) {
      each([&](Index c, auto lanes) { return load(x + c, lanes); });
      continue;
    }
    Moments all;
    all.add(x, depth);
    const vec middle = splat(float(all.mean)), scale = splat(1 / std::sqrt(float(all.squares) / float(depth) + norm.epsilon));
    each([&](Index c, auto lanes) {
      return (load(x + c, lanes) - middle) * scale * load(norm.gain + c, lanes) + load(norm.shift + c, lanes);
    });
  }
}

// y [tokens, outputs] of INT8 tokens [tokens, depth], plus `skip` of the size of y if it is not null.
inline void multiply_tokens(const std::uint8_t* x, Index tokens, Index depth, const moebius::Int8Product& p, Index outputs,
                            const float* skip, float* y) {
  Bytes for_rows(rows_bytes<false>(tokens, depth)), for_columns(columns_bytes(depth));
  const Rows rows = rows_of<false>(x, tokens, depth, for_rows);
  for (Index column = 0; column < outputs; column += kWide) {
    const Panel panel = columns_of(p.weight, depth, outputs, column, for_columns);
    vec scale[kVectors] = {}, offset[kVectors] = {};
    for (int j = 0; j < kVectors; ++j) {
      const Index c = column + j * kLanes, left = outputs - c;
      if (left <= 0) break;
      const int lanes = int(left < kLanes ? left : kLanes);
      scale[j] = load(p.scale + c, lanes), offset[j] = load(p.offset + c, lanes);
    }
    even_blocks(tokens, [&](auto size, Index token) {
      constexpr int R = decltype(size)::value;
      fetch<R, 1>(y + token * outputs + column, outputs);
      if (skip != nullptr) fetch<R, 0>(skip + token * outputs + column, outputs);
      Sums<R> sums;
      multiply8<false, R>(sums, rows + token, panel, depth);
      each_vector<R>(outputs, column / kWide, [&](auto i, auto j, Index c, auto lanes) {
        vec value = as_floats(sums[i][j]) * scale[j] + offset[j];
        if (skip != nullptr) value += load(skip + (token + i) * outputs + c, lanes);
        store(y + (token + i) * outputs + c, value, lanes);
      });
    });
  }
}

// Tokens per task: as many as a second-level cache holds, but few enough that threads end together. They share the
// conversion of the weights to the operand format.
inline Index token_group(Index tokens) {
  constexpr Index kMost = kRows < 14 ? 96 : 112, kTasks = 8;
  const Index even = (tokens + kTasks - 1) / kTasks;
  return even < kMost ? even : kMost;
}

inline void int8_linear(const moebius::Int8Linear& f, const moebius::Threads& threads) {
  const Index group = token_group(f.tokens);
  threads.each((f.tokens + group - 1) / group, [&](Index task) {
    const Index first = task * group, count = f.tokens - first < group ? f.tokens - first : group;
    Bytes x(count * f.inputs);
    quantise_tokens(f.x + first * f.inputs, count, f.inputs, f.norm, f.quantiser, x);
    multiply_tokens(x, count, f.inputs, f.product, f.outputs, f.skip ? f.skip + first * f.outputs : nullptr,
                    f.y + first * f.outputs);
  });
}

// INT8 tokens [count, inputs] of the pixels [first, first + count) of a picture [inputs, n] by scale and offset by channel.
inline void tokens_of_picture(const moebius::Int8LinearOfPicture& f, const float* x, const float* factors, Index first,
                              Index count, std::uint8_t* to) {
  constexpr Index kGroups = 16;  // of four channels: a cache line of a token
  std::uint32_t numbers[kGroups][kLanes];
  for (Index c = 0; c < f.inputs; c += 4 * kGroups) {
    const Index groups = f.inputs - c < 4 * kGroups ? (f.inputs - c) / 4 : kGroups;
    for (Index t = 0; t < count; t += kLanes) {
      const int lanes = int(count - t < kLanes ? count - t : kLanes);
      for (Index g = 0; g < groups; ++g) {
        ivec four{};
        for (Index i = 0; i < 4; ++i) {
          const Index channel = c + 4 * g + i;
          const vec value = load(x + channel * f.n + first + t, lanes) * splat(factors[channel]) +
                            splat(factors[f.inputs + channel]);
          four |= quantise(value, splat(f.quantiser.inverse[channel]), splat(f.quantiser.zero[channel])) << int(8 * i);
        }
        store_ints(numbers[g], four);
      }
      for (Index l = 0; l < lanes; ++l)
        for (Index g = 0; g < groups; ++g) std::memcpy(to + (t + l) * f.inputs + c + 4 * g, &numbers[g][l], 4);
    }
  }
}

inline void int8_linear_of_picture(const moebius::Int8LinearOfPicture& f, const moebius::Threads& threads) {
  const Index group = token_group(f.batch * f.n), groups = (f.n + group - 1) / group;
  moebius::Scratch factors(f.batch * 2 * f.inputs);
  for (Index b = 0; b < f.batch; ++b)
    group_norm(f.x + b * f.inputs * f.n, f.inputs, f.n, f.groups, nullptr, nullptr, f.epsilon, factors + b * 2 * f.inputs,
               threads);
  threads.each(f.batch * groups, [&](Index task) {
    const Index b = task / groups, first = task % groups * group, count = f.n - first < group ? f.n - first : group;
    Bytes x(count * f.inputs);
    tokens_of_picture(f, f.x + b * f.inputs * f.n, factors + b * 2 * f.inputs, first, count, x);
    multiply_tokens(x, count, f.inputs, f.product, f.outputs, nullptr, f.y + (b * f.n + first) * f.outputs);
  });
}

}  // namespace MOEBIUS_VARIANT
