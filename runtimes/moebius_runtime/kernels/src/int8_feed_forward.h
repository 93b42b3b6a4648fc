// Mix-FFN with both matmuls in INT8, channels last. A task computes some channels of all pixels, a few rows of the picture
// at a time, so that expanded rows are convolved and gated while they are in the cache.
#pragma once

#include "int8_linear.h"

namespace MOEBIUS_VARIANT {

constexpr Index kChunk = 64;  // channels of each half in a task: a cache line of bytes per token

// Some expanded channels of a picture: the first `size` of value, then as many of gate.
class ExpandedRows {
 public:
  ExpandedRows(const moebius::Int8FeedForward& f, const std::uint8_t* x, Index first, Index size)
      : f_(f), x_(x), first_(first), size_(size), band_(rows_of_band(f)), line_((f.width + 2) * 2 * size),
        rows_((band_ + 3) * line_), taps_(2 * size * 9), for_tokens_(rows_bytes<false>((band_ + 1) * f.width, f.channels)),
        for_columns_(columns_bytes(f.channels)) {
    std::memset(rows_, 0, (band_ + 3) * line_ * sizeof(float));  // borders and the last row stay zero
    for (Index c = 0; c < 2 * size; ++c)
      for (Index i = 0; i < 9; ++i) taps_[(c / kLanes * 9 + i) * kLanes + c % kLanes] = f.depthwise[channel(c) * 9 + i];
  }

  // The gated channels of every pixel in INT8, in tokens of `half` bytes.
  void gate_into(std::uint8_t* to, Index half) const {
    Index done = 0;
    for (Index top = 0; top < f_.height; top += band_) {
      const Index bottom = top + band_ < f_.height ? top + band_ : f_.height;
      const Index needed = bottom + 1 < f_.height ? bottom + 1 : f_.height;
      expand(done, needed);
      done = needed;
      for (Index y = top; y < bottom; ++y)
        for (Index c = 0; c < size_; c += kLanes) gate(y, c, to + y * f_.width * half + first_ + c, half);
    }
  }

 private:
  static Index rows_of_band(const moebius::Int8FeedForward& f) {
    constexpr Index kTokens = 128;
    const Index rows = kTokens / f.width < 1 ? 1 : kTokens / f.width;
    return rows < f.height ? rows : f.height;
  }

  Index channel(Index c) const { return c < size_ ? first_ + c : f_.hidden / 2 + first_ + c - size_; }

  float* row(Index y) const {  // [width + 2, 2 * size]
    const bool inside = y >= 0 && y < f_.height;
    return rows_ + (inside ? y % (band_ + 2) : band_ + 2) * line_;
  }

  void expand(Index from, Index to) const {
    const Index begin = from * f_.width, count = to * f_.width - begin;
    const Rows tokens = rows_of<false>(x_ + begin * f_.channels, count, f_.channels, for_tokens_);
    for (Index c = 0; c < 2 * size_; c += c < size_ && size_ - c < kWide ? size_ - c : kWide) {
      const Index end = c < size_ ? size_ : 2 * size_, whole = channel(c);
      const Panel panel = columns_of(f_.expand.weight, f_.channels, whole + end - c, whole, for_columns_);
      const int vectors = end - c > kLanes ? 2 : 1;
      vec scale[kVectors] = {}, offset[kVectors] = {};
      for (int j = 0; j < vectors; ++j) {
        scale[j] = load(f_.expand.scale + whole + j * kLanes);
        offset[j] = load(f_.expand.offset + whole + j * kLanes);
      }
      even_blocks(count, [&](auto size, Index token) {
        constexpr int R = decltype(size)::value;
        Sums<R> sums;
        multiply8<false, R>(sums, tokens + token, panel, f_.channels);
        Index y = (begin + token) / f_.width, x = (begin + token) % f_.width;
        float* at = nullptr;
        each_cell<R>([&](auto i, auto j) {
          if (j == 0) at = row(y) + (x + 1) * 2 * size_ + c;
          if (j < vectors) store(at + j * kLanes, silu(as_floats(sums[i][j]) * scale[j] + offset[j]));
          if (j + 1 == kVectors && ++x == f_.width) x = 0, ++y;
        });
      });
    }
  }

  // Channels [c, c + kLanes) of a row of pixels.
  void gate(Index y, Index c, std::uint8_t* to, Index half) const {
    const float *above = row(y - 1) + c, *here = row(y) + c, *below = row(y + 1) + c;
    const vec inverse = load(f_.gated.inverse + first_ + c), zero = load(f_.gated.zero + first_ + c);
    const vec value_bias = load(f_.depthwise_bias + channel(c)), gate_bias = load(f_.depthwise_bias + channel(size_ + c));
    const float *value_taps = taps_ + c * 9, *gate_taps = taps_ + (size_ + c) * 9;
    vec value_tap[9], gate_tap[9];
    for (int i = 0; i < 9; ++i) value_tap[i] = load(value_taps + i * kLanes), gate_tap[i] = load(gate_taps + i * kLanes);
    for (Index x = 0; x < f_.width; ++x) {
      vec value = value_bias, gate = gate_bias;
      const float* rows[3] = {above + x * 2 * size_, here + x * 2 * size_, below + x * 2 * size_};
      for (int dy = 0; dy < 3; ++dy)
        for (int dx = 0; dx < 3; ++dx) {
          value += value_tap[3 * dy + dx] * load(rows[dy] + dx * 2 * size_);
          gate += gate_tap[3 * dy + dx] * load(rows[dy] + dx * 2 * size_ + size_);
        }
      store_bytes(to + x * half, quantise(value * silu(gate), inverse, zero), kLanes);
    }
  }

  const moebius::Int8FeedForward& f_;
  const std::uint8_t* x_;
  Index first_, size_, band_, line_;
  moebius::Scratch rows_, taps_;
  Bytes for_tokens_, for_columns_;
};

inline void int8_feed_forward(const moebius::Int8FeedForward& f, const moebius::Threads& threads) {
  const Index n = f.height * f.width, tokens = f.batch * n, half = f.hidden / 2;
  Bytes x(tokens * f.channels), gated(tokens * half);
  const Index group = token_group(tokens), groups = (tokens + group - 1) / group;
  threads.each(groups, [&](Index task) {
    const Index first = task * group, count = tokens - first < group ? tokens - first : group;
    quantise_tokens(f.x + first * f.channels, count, f.channels, f.norm, f.quantiser, x + first * f.channels);
  });
  const Index chunks = (half + kChunk - 1) / kChunk;
  threads.each(f.batch * chunks, [&](Index task) {  // the last chunk of every picture, which may be small, at the end
    const Index picture = task % f.batch, first = task / f.batch * kChunk;
    const Index size = half - first < kChunk ? half - first : kChunk;
    const ExpandedRows rows(f, x + picture * n * f.channels, first, size);
    rows.gate_into(gated + picture * n * half, half);
  });
  threads.each(groups, [&](Index task) {
    const Index first = task * group, count = tokens - first < group ? tokens - first : group;
    multiply_tokens(gated + first * half, count, half, f.project, f.channels,
                    f.norm.gain ? f.x + first * f.channels : nullptr, f.y + first * f.channels);
  });
}

}  // namespace MOEBIUS_VARIANT
