// Group norm with statistics in one sweep through memory: mean and squares of a block that the first-level cache holds,
// in float, then merged in double (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
// sample variances"). A sum of a million values in float only has an error of 1e-5.
#pragma once

#include <cmath>

#include "kernels.h"
#include "simd.h"

namespace MOEBIUS_VARIANT {

// Count, mean and sum of squared distances from it, of values so far.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  void add(const float* x, Index n) {
    const float middle = total(n, [&](Index i) { return load(x + i); }, [&](Index i) { return x[i]; }) / float(n);
    const vec centre = splat(middle);
    const auto square = [](auto value) { return value * value; };
    const double own = total(n, [&](Index i) { return square(load(x + i) - centre); },
                             [&](Index i) { return square(x[i] - middle); });
    const double before = count, apart = middle - mean;
    count += double(n);
    mean += apart * double(n) / count;
    squares += own + apart * apart * before * double(n) / count;
  }
};

// Group norm as scale and offset per channel: x [groups * channels of one, n] -> factors [2][channels]. Gain and shift may
// be null: 1 and 0.
inline void group_norm(const float* x, Index channels, Index n, Index groups, const float* gain, const float* shift,
                       float epsilon, float* factors, const moebius::Threads& threads) {
  constexpr Index kBlock = 4096;
  const Index each = channels / groups, size = each * n;
  threads.each(groups, [&](Index g) {
    Moments all;
    for (Index i = 0; i < size; i += kBlock) all.add(x + g * size + i, size - i < kBlock ? size - i : kBlock);
    const float middle = float(all.mean), scale = float(1 / std::sqrt(all.squares / double(size) + epsilon));
    for (Index c = g * each; c < (g + 1) * each; ++c) {
      factors[c] = gain ? scale * gain[c] : scale;
      factors[channels + c] = (shift ? shift[c] : 0) - middle * factors[c];
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
