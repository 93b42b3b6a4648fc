// Local-λ, reassociated: per position the window's weights for each head, A[h, d] = sum_k Q[h, k] w[k, d], as one
// matmul; then Y[h, v] = sum_d A[h, d] V[n + d, v] + sum_k Q[h, k] λc[k, v] from rows of V around n.
#pragma once

#include "kernels.h"
#include "planes.h"

namespace MOEBIUS_VARIANT {

constexpr int kHeads = kRows < 8 ? 4 : 8;  // heads at a time: kHeads * 3 accumulators, of 16 registers or of 32

// sums [H heads][V vectors] += weights [H, count] (rows `stride` apart) * rows [count, ...] (`step` apart).
template <int H, int V>
inline void accumulate(vec (&sums)[H][V], const float* weights, Index stride, const float* rows, Index step, Index count) {
  for (Index i = 0; i < count; ++i, rows += step) {
    vec value[V];
    for (int j = 0; j < V; ++j) value[j] = load(rows + j * kLanes);
    for (int h = 0; h < H; ++h) {
      const vec weight = splat(weights[h * stride + i]);
      for (int j = 0; j < V; ++j) sums[h][j] += weight * value[j];
    }
  }
}

struct Neighbourhood {
  const float* bands;    // [heads, band_stride]: A of this position
  const float* query;    // [heads, depth]
  const float* summary;  // [depth, width]
  const float* values;   // the window's first row: [reach, row_stride / width, width]
  Index band_stride, depth, reach, row_stride, width;
};

template <int H, int V>
inline void position(const Neighbourhood& n, Index head, Index column, Index valid, float* y) {
  vec sums[H][V] = {};
  accumulate<H, V>(sums, n.query + head * n.depth, n.depth, n.summary + column, n.width, n.depth);
  for (Index dy = 0; dy < n.reach; ++dy)
    accumulate<H, V>(sums, n.bands + head * n.band_stride + dy * n.reach, n.band_stride,
                     n.values + dy * n.row_stride + column, n.width, n.reach);
  for (int h = 0; h < H; ++h)
    for (int j = 0; j < V; ++j) {
      const Index left = valid - column - j * kLanes;
      if (left > 0) store(y + (head + h) * valid + column + j * kLanes, sums[h][j], int(left < kLanes ? left : kLanes));
    }
}

template <int H>
inline void heads_of(const Neighbourhood& n, Index head, Index valid, float* y) {
  const Index vectors = n.width / kLanes;
  for (Index done = 0; done < vectors;) {
    const Index left = vectors - done, now = left == 4 ? 2 : left < 3 ? left : 3;
    const Index column = done * kLanes;
    if (now == 3) position<H, 3>(n, head, column, valid, y);
    if (now == 2) position<H, 2>(n, head, column, valid, y);
    if (now == 1) position<H, 1>(n, head, column, valid, y);
    done += now;
  }
}

inline void local_lambda(const moebius::LocalLambda& f, const moebius::Threads& threads) {
  const Index n = f.height * f.width, channels = f.heads * f.depth, taps = f.reach * f.reach, edge = f.reach / 2;
  const Index width = (f.depth + kLanes - 1) / kLanes * kLanes;  // of a row of V, with zeros
  const Index across = f.width + 2 * edge, down = f.height + 2 * edge, groups = panels(taps), bands = groups * kWide;
  moebius::Scratch window(groups * f.depth * kWide), padded(down * across * width), summary(f.depth * width);
  for (Index c = 0; c < f.depth; ++c)
    for (Index d = 0; d < bands; ++d)
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
    constexpr Index kPositions = 16;
    const Index parts = (f.width + kPositions - 1) / kPositions;
    threads.each(f.height * parts, [&](Index task) {
      const Index y = task / parts, first = task % parts * kPositions;
      const Index count = f.width - first < kPositions ? f.width - first : kPositions;
      const Index start = y * f.width + first;
      moebius::Scratch band(count * f.heads * bands);
      row_blocks(0, count * f.heads, [&](auto rows, Index row) {
        constexpr int R = decltype(rows)::value;
        for (Index g = 0; g < groups; ++g) {
          Tile<R> tile = {};
          multiply<R>(tile, query + start * channels + row * f.depth, f.depth, window + g * f.depth * kWide, f.depth);
          for (int i = 0; i < R; ++i)
            for (int j = 0; j < kVectors; ++j)
              store(band + (row + i) * bands + g * kWide + j * kLanes, tile[i][j]);
        }
      });
      for (Index i = 0; i < count; ++i) {
        const Neighbourhood near{band + i * f.heads * bands, query + (start + i) * channels, summary,
                                 padded + (y * across + first + i) * width, bands, f.depth, f.reach, across * width,
                                 width};
        float* out = f.y + (b * n + start + i) * channels;
        Index head = 0;
        for (; head + kHeads <= f.heads; head += kHeads) heads_of<kHeads>(near, head, f.depth, out);
        for (; head < f.heads; ++head) heads_of<1>(near, head, f.depth, out);
      }
    });
  }
}

}  // namespace MOEBIUS_VARIANT
