// Local-λ, reassociated: per position the window's weights for each head, A[h, d] = sum_k Q[h, k] w[k, d], as one
// matmul; then Y[h, v] = sum_d A[h, d] V[n + d, v] + sum_k Q[h, k] λc[k, v] from rows of V around n.
#pragma once

#include "kernels.h"
#include "planes.h"

namespace MOEBIUS_VARIANT {

constexpr int kHeads = kRows < 8 ? 4 : 8;      // heads at a time: kHeads * 3 accumulators, of 16 registers or of 32
constexpr Index kPositions = kRows < 14 ? 6 : 7;  // of a task: with 8 heads whole blocks of rows

// Half a vector, where half of the last one of V would be zeros.
#if MOEBIUS_LANES == 16
typedef float half_vec __attribute__((vector_size(kLanes / 2 * sizeof(float))));
inline half_vec lower_half(vec value) { return half_vec(_mm512_castps512_ps256(__m512(value))); }
#else
typedef vec half_vec;
inline half_vec lower_half(vec value) { return value; }
#endif

inline half_vec load_half(const float* from) {
  half_vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// sums [H heads][V vectors] and half vectors [H] += weights [H, count] (rows `stride` apart) * rows [count, ...] (`step` apart).
template <bool Half, int H, int V>
MOEBIUS_INLINE void accumulate(vec (&sums)[H][V + 1], half_vec (&halves)[H], const float* weights, Index stride,
                               const float* rows, Index step, Index count) {
  for (Index i = 0; i < count; ++i, rows += step) {
    vec value[V + 1];
    half_vec last{};
    for (int j = 0; j < V; ++j) value[j] = load(rows + j * kLanes);
    if (Half) last = load_half(rows + V * kLanes);
    for (int h = 0; h < H; ++h) {
      const vec weight = splat(weights[h * stride + i]);
      for (int j = 0; j < V; ++j) sums[h][j] += weight * value[j];
      if (Half) halves[h] += lower_half(weight) * last;
    }
  }
}

struct Neighbourhood {
  const float* bands;    // [heads, band_stride]: A of this position
  const float* query;    // [heads, depth]
  const float* summary;  // [depth, width]: vectors are loaded whole, also of a row's end
  const float* values;   // the window's first row: [reach, row_stride / width, width]
  Index band_stride, depth, reach, row_stride, width;
};

// V vectors of the result from `column` on, and half a vector behind them.
template <int H, int V, bool Half>
inline void position(const Neighbourhood& n, Index head, Index column, Index valid, float* y) {
  vec sums[H][V + 1] = {};
  half_vec halves[H] = {};
  accumulate<Half, H, V>(sums, halves, n.query + head * n.depth, n.depth, n.summary + column, n.width, n.depth);
  for (Index dy = 0; dy < n.reach; ++dy)
    accumulate<Half, H, V>(sums, halves, n.bands + head * n.band_stride + dy * n.reach, n.band_stride,
                           n.values + dy * n.row_stride + column, n.width, n.reach);
  for (int h = 0; h < H; ++h) {
    float* to = y + (head + h) * valid + column;
    for (int j = 0; j < V; ++j) {
      const Index left = valid - column - j * kLanes;
      if (left > 0) store(to + j * kLanes, sums[h][j], int(left < kLanes ? left : kLanes));
    }
    if (Half) std::memcpy(to + V * kLanes, &halves[h], (valid - column - V * kLanes) * sizeof(float));
  }
}

template <int H>
inline void heads_of(const Neighbourhood& n, Index head, Index valid, float* y) {
  const Index rest = valid % kLanes;
  const bool half = kLanes == 16 && rest > 0 && rest <= kLanes / 2;
  const Index vectors = (half ? valid : valid + kLanes - 1) / kLanes;
  for (Index done = 0; done < vectors || (half && done == vectors);) {
    const Index left = vectors - done, now = left == 4 ? 2 : left < 3 ? left : 3, column = done * kLanes;
    const bool last = half && now == left && now < 3;
    if (now == 3) position<H, 3, false>(n, head, column, valid, y);
    if (now == 2) last ? position<H, 2, true>(n, head, column, valid, y) : position<H, 2, false>(n, head, column, valid, y);
    if (now == 1) last ? position<H, 1, true>(n, head, column, valid, y) : position<H, 1, false>(n, head, column, valid, y);
    if (now == 0) position<H, 0, true>(n, head, column, valid, y);
    done += last ? now + 1 : now;
  }
}

// A of `rows` pairs of position and head: [rows, bands] of queries [rows, depth] and the window in panels.
inline void windows_of(const float* query, Index rows, Index depth, const float* window, Index bands, float* to) {
  row_blocks(0, rows, [&](auto size, Index row) {
    constexpr int R = decltype(size)::value;
    for (Index first = 0; first < bands; first += kWide) {
      Tile<R> tile = {};
      if (bands - first >= kWide) {
        multiply<R>(tile, query + row * depth, depth, window + first * depth, depth);
        each_cell<R>([&](auto i, auto j) { store(to + (row + i) * bands + first + j * kLanes, tile[i][j]); });
        continue;
      }
      for (Index k = 0; k < depth; ++k) {  // the last panel, of which one vector is used
        const vec column = load(window + first * depth + k * kWide);
        for (int i = 0; i < R; ++i) tile[i][0] += splat(query[(row + i) * depth + k]) * column;
      }
      for (int i = 0; i < R; ++i) store(to + (row + i) * bands + first, tile[i][0]);
    }
  });
}

// The products of H heads at a time.
inline void all_heads(const Neighbourhood& n, Index heads, Index valid, float* y) {
  Index head = 0;
  for (; head + kHeads <= heads; head += kHeads) heads_of<kHeads>(n, head, valid, y);
  for (; head < heads; ++head) heads_of<1>(n, head, valid, y);
}

// Interactive-λ: two small matmuls a position, [heads, depth] by its keys [depth, tokens] by values [tokens, width].
inline void interactive_lambda(const moebius::InteractiveLambda& f, const moebius::Threads& threads) {
  const Index wide = (f.width + kLanes - 1) / kLanes * kLanes, of_keys = f.depth * f.tokens;
  moebius::Scratch values(f.tokens * wide);
  for (Index branch = 0; branch < f.branches; ++branch) {
    for (Index t = 0; t < f.tokens; ++t)
      for (Index v = 0; v < wide; ++v)
        values[t * wide + v] = v < f.width ? f.values[(branch * f.tokens + t) * f.width + v] : 0;
    const float* keys = f.keys + branch * f.n * of_keys;
    constexpr Index kMany = 64;  // positions of a task
    const Index groups = (f.n + kMany - 1) / kMany;
    threads.each(f.batch * groups, [&](Index task) {
      const Index b = task / groups, first = task % groups * kMany, last = first + kMany < f.n ? first + kMany : f.n;
      moebius::Scratch scores(f.heads * f.tokens), copy(of_keys);
      for (Index i = first; i < last; ++i) {
        const float* own = keys + i * of_keys;
        if (i == f.n - 1) {  // vector loads beyond the last keys would leave the tensor; those of scratch memory may
          std::memcpy(copy, own, of_keys * sizeof(float));
          own = copy;
        }
        const Index place = (branch * f.batch + b) * f.n + i;
        const float* query = f.query + place * f.heads * f.depth;
        all_heads({nullptr, query, own, nullptr, 0, f.depth, 0, 0, f.tokens}, f.heads, f.tokens, scores);
        all_heads({nullptr, scores, values, nullptr, 0, f.tokens, 0, 0, wide}, f.heads, f.width,
                  f.y + place * f.heads * f.width);
      }
    });
  }
}

inline void local_lambda(const moebius::LocalLambda& f, const moebius::Threads& threads) {
  const Index n = f.height * f.width, channels = f.heads * f.depth, taps = f.reach * f.reach, edge = f.reach / 2;
  const Index width = (f.depth + kLanes - 1) / kLanes * kLanes;  // of a row of V, with zeros
  const Index bands = (taps + kLanes - 1) / kLanes * kLanes;     // of a row of A
  const Index across = f.width + 2 * edge, down = f.height + 2 * edge, padded_taps = panels(taps) * kWide;
  moebius::Scratch window(padded_taps * f.depth), padded(down * across * width), summary(f.depth * width);
  for (Index c = 0; c < f.depth; ++c)
    for (Index d = 0; d < padded_taps; ++d)
      window[(d / kWide * f.depth + c) * kWide + d % kWide] = d < taps ? f.window[c * taps + d] : 0;
  for (Index b = 0; b < f.batch; ++b) {
    const float* query = f.query + b * n * channels;
    for (Index k = 0; k < f.depth; ++k)
      for (Index v = 0; v < width; ++v)
        summary[k * width + v] = v < f.depth ? f.summary[(b * f.depth + k) * f.depth + v] : 0;
    threads.each(down, [&](Index row) {
      float* to = padded + row * across * width;
      std::memset(to, 0, across * width * sizeof(float));
      const Index y = row - edge;
      if (y < 0 || y >= f.height) return;
      for (Index x = 0; x < f.width; ++x)
        std::memcpy(to + (x + edge) * width, f.values + ((b * f.height + y) * f.width + x) * f.depth,
                    f.depth * sizeof(float));
    });
    threads.each((n + kPositions - 1) / kPositions, [&](Index task) {
      const Index start = task * kPositions, count = n - start < kPositions ? n - start : kPositions;
      moebius::Scratch band(count * f.heads * bands);
      windows_of(query + start * channels, count * f.heads, f.depth, window, bands, band);
      for (Index i = 0; i < count; ++i) {
        const Index y = (start + i) / f.width, x = (start + i) % f.width;
        const Neighbourhood near{band + i * f.heads * bands, query + (start + i) * channels, summary,
                                 padded + (y * across + x) * width, bands, f.depth, f.reach, across * width, width};
        all_heads(near, f.heads, f.depth, f.y + (b * n + start + i) * channels);
      }
    });
  }
}

}  // namespace MOEBIUS_VARIANT
