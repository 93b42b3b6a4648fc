// y = second(first(x) + time) + shortcut(x). Each half is SiLU(GroupNorm), depthwise 3x3, ReLU, 1x1, with an inner skip
// where channels are equal: always in the second half, in the first if there is no shortcut. A channel goes from its norm
// to the panels of the next matmul while it is in the cache; the shortcut's matmul accumulates into the same tile as the
// last one.
#pragma once

#include "group_norm.h"
#include "planes.h"

namespace MOEBIUS_VARIANT {

// relu(depthwise(silu(norm(x)))) in panels, and silu(norm(x)) itself if `active` is given.
inline void normal_to_panels(const float* x, Index channels, const Plane& plane, Index groups, float epsilon,
                             const moebius::Separable& s, float* in_panels, float* active,
                             const moebius::Threads& threads) {
  const Index n = plane.height * plane.width;
  moebius::Scratch factors(2 * channels);
  group_norm(x, channels, n, groups, s.gain, s.shift, epsilon, factors, threads);
  constexpr Index kChannels = 8;  // in a task
  threads.each((channels + kChannels - 1) / kChannels, [&](Index task) {
    moebius::Scratch padded(plane.size());
    plane.clear_border(padded);
    const Index last = (task + 1) * kChannels < channels ? (task + 1) * kChannels : channels;
    for (Index c = task * kChannels; c < last; ++c) {
      const vec scale = splat(factors[c]), offset = splat(factors[channels + c]);
      plane.fill(padded, [&](Index pixel, int lanes) {
        const vec value = silu(load(x + c * n + pixel, lanes) * scale + offset);
        if (active != nullptr) store(active + c * n + pixel, value, lanes);
        return value;
      });
      plane.convolve(padded, s.depthwise + c * 9, s.depthwise_bias[c], [&](Index pixel, vec value, int lanes) {
        to_panel(in_panels, channels, c, pixel, relu(value), lanes);
      });
    }
  });
  clear_tail(in_panels, channels, n);
}

inline void residual_block(const moebius::ResidualBlock& f, const moebius::Threads& threads) {
  const Plane plane{f.height, f.width};
  const Index n = f.height * f.width, count = panels(n);
  const bool projected = f.shortcut != nullptr;
  moebius::Scratch first(count * f.inputs * kWide), second(count * f.outputs * kWide);
  moebius::Scratch first_active(projected ? 0 : f.inputs * n), middle(f.outputs * n), second_active(f.outputs * n);
  moebius::Scratch raw(projected ? count * f.inputs * kWide : 0);
  for (Index b = 0; b < f.batch; ++b) {
    const float* x = f.x + b * f.inputs * n;
    const float* time = f.time + (f.time_rows == 1 ? 0 : b) * f.outputs;
    float* y = f.y + b * f.outputs * n;
    normal_to_panels(x, f.inputs, plane, f.groups, f.epsilon, f.first, first, projected ? nullptr : static_cast<float*>(first_active),
                     threads);
    each_tile(threads, f.outputs, count, f.inputs, [&](auto rows, Index row, Index p) {
      constexpr int R = decltype(rows)::value;
      Tile<R> tile = {};
      multiply<R>(tile, f.first.pointwise + row * f.inputs, f.inputs, first + p * f.inputs * kWide, f.inputs);
      each_vector<R>(n, p, [&](auto i, auto j, Index pixel, auto lanes) {
        vec value = tile[i][j] + splat(f.first.pointwise_bias[row + i] + time[row + i]);
        if (!projected) value += load(first_active + (row + i) * n + pixel);
        store(middle + (row + i) * n + pixel, value, lanes);
      });
    });
    normal_to_panels(middle, f.outputs, plane, f.groups, f.epsilon, f.second, second, second_active, threads);
    if (projected) {
      threads.each(f.inputs, [&](Index c) {
        for (Index i = 0; i < n; i += kLanes) {
          const int lanes = int(n - i < kLanes ? n - i : kLanes);
          to_panel(raw, f.inputs, c, i, load(x + c * n + i, lanes), lanes);
        }
      });
      clear_tail(raw, f.inputs, n);
    }
    each_tile(threads, f.outputs, count, f.outputs + (projected ? f.inputs : 0), [&](auto rows, Index row, Index p) {
      constexpr int R = decltype(rows)::value;
      Tile<R> tile = {};
      multiply<R>(tile, f.second.pointwise + row * f.outputs, f.outputs, second + p * f.outputs * kWide, f.outputs);
      if (projected)
        multiply<R>(tile, f.shortcut + row * f.inputs, f.inputs, raw + p * f.inputs * kWide, f.inputs);
      each_vector<R>(n, p, [&](auto i, auto j, Index pixel, auto lanes) {
        const Index at = (row + i) * n + pixel;
        vec value = tile[i][j] + splat(f.second.pointwise_bias[row + i]) + load(second_active + at);
        value += projected ? splat(f.shortcut_bias[row + i]) : load(x + at, lanes);
        store(y + at, value, lanes);
      });
    });
  }
}

}  // namespace MOEBIUS_VARIANT
