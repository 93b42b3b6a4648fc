// Group norm with statistics in two sweeps: sums of a channel in float, of channels in double. A sum of a million values
// in float only has an error of 1e-5.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace MOEBIUS_VARIANT {

// Group norm as scale and offset per channel: x [groups * channels of one, n] -> factors [2][channels].
inline void group_norm(const float* x, Index channels, Index n, Index groups, const float* gain, const float* shift,
                       float epsilon, float* factors, const moebius::Threads& threads) {
  const Index each = channels / groups;
  threads.each(groups, [&](Index g) {
    const float* first = x + g * each * n;
    double mean = 0, squares = 0;
    for (Index c = 0; c < each; ++c) mean += total(n, [&](Index i) { return load(first + c * n + i); },
                                                  [&](Index i) { return first[c * n + i]; });
    const float middle = float(mean / double(each * n));
    const vec centre = splat(middle);
    const auto square = [](auto value) { return value * value; };
    for (Index c = 0; c < each; ++c)
      squares += total(n, [&](Index i) { return square(load(first + c * n + i) - centre); },
                       [&](Index i) { return square(first[c * n + i] - middle); });
    const float scale = float(1 / std::sqrt(squares / double(each * n) + epsilon));
    for (Index c = g * each; c < (g + 1) * each; ++c) {
      factors[c] = scale * gain[c];
      factors[channels + c] = shift[c] - middle * scale * gain[c];
    }
  });
}

inline void group_norm(const moebius::GroupNorm& f, const moebius::Threads& threads) {
  moebius::Scratch factors(2 * f.channels);
  for (Index b = 0; b < f.batch; ++b) {
    const float* x = f.x + b * f.channels * f.pixels;
    float* y = f.y + b * f.channels * f.pixels;
    group_norm(x, f.channels, f.pixels, f.groups, f.gain, f.shift, f.epsilon, factors, threads);
    threads.each(f.channels, [&](Index c) {
      const vec scale = splat(factors[c]), offset = splat(factors[f.channels + c]);
      for (Index i = 0; i < f.pixels; i += kLanes) {
        const int lanes = int(f.pixels - i < kLanes ? f.pixels - i : kLanes);
        store(y + c * f.pixels + i, load(x + c * f.pixels + i, lanes) * scale + offset, lanes);
      }
    });
  }
}

}  // namespace MOEBIUS_VARIANT
