// Mix-FFN in two sweeps. A few expanded channels at a time are computed, activated, convolved and gated while they are
// in the cache, so that only the gated half is written to memory.
#pragma once

#include "kernels.h"
#include "planes.h"

namespace MOEBIUS_VARIANT {

// Tokens [count, channels] -> one panel [channels, kWide].
inline void tokens_to_panel(const float* x, Index count, Index channels, float* panel) {
  constexpr Index kBlock = 16;  // channels of a cache line
  for (Index first = 0; first < channels; first += kBlock) {
    const Index last = first + kBlock < channels ? first + kBlock : channels;
    for (Index t = 0; t < count; ++t)
      for (Index c = first; c < last; ++c) panel[c * kWide + t] = x[t * channels + c];
    for (Index c = first; c < last; ++c)
      if (count < kWide) std::memset(panel + c * kWide + count, 0, (kWide - count) * sizeof(float));
  }
}

inline void feed_forward(const moebius::FeedForward& f, const moebius::Threads& threads) {
  const Index n = f.height * f.width, half = f.hidden / 2, count = panels(n);
  const Plane plane{f.height, f.width};
  // Channels of each half in a task: their planes fill about half of a core's second-level cache.
  Index chunk = (384 << 10) / (2 * plane.size() * Index(sizeof(float)));
  chunk = chunk < kRows ? kRows : chunk / kRows * kRows;
  if (chunk > 4 * kRows) chunk = 4 * kRows;
  moebius::Scratch packed(count * f.channels * kWide), gated(count * half * kWide);
  for (Index b = 0; b < f.batch; ++b) {
    const float* x = f.x + b * n * f.channels;
    float* y = f.y + b * n * f.channels;
    threads.each(count, [&](Index p) {
      const Index first = p * kWide, tokens = n - first < kWide ? n - first : kWide;
      tokens_to_panel(x + first * f.channels, tokens, f.channels, packed + p * f.channels * kWide);
    });
    threads.each((half + chunk - 1) / chunk, [&](Index task) {
      const Index first = task * chunk, size = half - first < chunk ? half - first : chunk;
      moebius::Scratch planes(2 * size * plane.size());
      for (Index i = 0; i < 2 * size; ++i) plane.clear_border(planes + i * plane.size());
      for (Index p = 0; p < count; ++p) {
        const Index begin = p * kWide, tokens = n - begin < kWide ? n - begin : kWide;
        for (int side = 0; side < 2; ++side)
          row_blocks(0, size, [&](auto rows, Index row) {
            constexpr int R = decltype(rows)::value;
            const Index channel = side * half + first + row;
            Tile<R> tile = {};
            multiply<R>(tile, f.expand + channel * f.channels, f.channels, packed + p * f.channels * kWide, f.channels);
            float values[R * kWide];
            each_cell<R>([&](auto i, auto j) { tile[i][j] = silu(tile[i][j] + splat(f.expand_bias[channel + i])); });
            spill<R>(tile, values);
            for (int i = 0; i < R; ++i)
              plane.write(planes + (side * size + row + i) * plane.size(), begin, values + i * kWide, tokens);
          });
      }
      moebius::Scratch value(n);
      for (Index i = 0; i < size; ++i) {
        const Index c = first + i;
        plane.convolve(planes + i * plane.size(), f.depthwise + c * 9, f.depthwise_bias[c],
                       [&](Index pixel, vec v, int lanes) { store(value + pixel, v, lanes); });
        plane.convolve(planes + (size + i) * plane.size(), f.depthwise + (half + c) * 9, f.depthwise_bias[half + c],
                       [&](Index pixel, vec gate, int lanes) {
                         to_panel(gated, half, c, pixel, load(value + pixel) * silu(gate), lanes);
                       });
      }
    });
    clear_tail(gated, half, n);
    each_tile(threads, f.channels, count, half, [&](auto rows, Index row, Index p) {
      constexpr int R = decltype(rows)::value;
      const Index begin = p * kWide, tokens = n - begin < kWide ? n - begin : kWide;
      Tile<R> tile = {};
      multiply<R>(tile, f.project + row * half, half, gated + p * half * kWide, half);
      float values[R * kWide];
      spill<R>(tile, values);
      for (Index t = 0; t < tokens; ++t) {
        const Index at = (begin + t) * f.channels + row;
        for (int i = 0; i < R; ++i) y[at + i] = values[i * kWide + t];
      }
    });
  }
}

}  // namespace MOEBIUS_VARIANT
