// INT8 linear layer of tokens. Tokens are the rows of the matmul; the output is tokens again, or a picture by channel.
#pragma once

#include "int8.h"
#include "kernels.h"

namespace MOEBIUS_VARIANT {

// Tokens [count, depth] -> INT8 of the same sizes.
inline void quantise_tokens(const float* x, Index count, Index depth, const moebius::Quantiser& q, std::uint8_t* to) {
  for (Index t = 0; t < count; ++t, x += depth, to += depth) {
    Index c = 0;
    for (; c + kLanes <= depth; c += kLanes)
      store_bytes(to + c, quantise(load(x + c), load(q.inverse + c), load(q.zero + c)));
    if (const int rest = int(depth - c))
      store_bytes(to + c, quantise(load(x + c, rest), load(q.inverse + c, rest), load(q.zero + c, rest)), rest);
  }
}

// y [tokens, outputs] of INT8 tokens [tokens, depth].
inline void multiply_tokens(const std::uint8_t* x, Index tokens, Index depth, const moebius::Int8Product& p, Index outputs,
                            float* y) {
  Bytes for_rows(rows_bytes<false>(tokens, depth)), for_columns(columns_bytes(depth));
  const Rows rows = rows_of<false>(x, tokens, depth, for_rows);
  for (Index column = 0; column < outputs; column += kWide) {
    const Panel panel = columns_of(p.weight, depth, outputs, column, for_columns);
    even_blocks(tokens, [&](auto size, Index token) {
      constexpr int R = decltype(size)::value;
      Sums<R> sums;
      multiply8<false, R>(sums, rows + token, panel, depth);
      for (int j = 0; j < kVectors; ++j) {
        const Index c = column + j * kLanes, left = outputs - c;
        if (left <= 0) break;
        const int lanes = int(left < kLanes ? left : kLanes);
        const vec scale = load(p.scale + c, lanes), offset = load(p.offset + c, lanes);
        for (int i = 0; i < R; ++i)
          store(y + (token + i) * outputs + c, as_floats(sums[i][j]) * scale + offset, lanes);
      }
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
    quantise_tokens(f.x + first * f.inputs, count, f.inputs, f.quantiser, x);
    multiply_tokens(x, count, f.inputs, f.product, f.outputs, f.y + first * f.outputs);
  });
}

}  // namespace MOEBIUS_VARIANT
