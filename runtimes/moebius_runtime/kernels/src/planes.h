// Pictures by channel with a border of zeros, and the depthwise 3x3 convolution over them.
#pragma once

#include "gemm.h"

namespace MOEBIUS_VARIANT {

// One channel of a picture [height, width] with a border of one pixel: rows are width + 2 apart.
struct Plane {
  Index height, width;

  Index stride() const { return width + 2; }
  Index size() const { return (height + 2) * stride(); }
  Index at(Index pixel) const { return (pixel / width + 1) * stride() + pixel % width + 1; }

  void clear_border(float* plane) const {
    std::memset(plane, 0, stride() * sizeof(float));
    for (Index y = 1; y <= height; ++y) plane[y * stride()] = plane[y * stride() + width + 1] = 0;
    std::memset(plane + (height + 1) * stride(), 0, stride() * sizeof(float));
  }

  // Values of consecutive pixels, given as floats in raster order.
  void write(float* plane, Index pixel, const float* values, Index count) const {
    while (count > 0) {
      const Index x = pixel % width, run = count < width - x ? count : width - x;
      std::memcpy(plane + at(pixel), values, run * sizeof(float));
      pixel += run, values += run, count -= run;
    }
  }

  // The values f(pixel, count) of runs of at most kLanes pixels of a row.
  template <class F>
  void fill(float* plane, F&& f) const {
    for (Index y = 0; y < height; ++y)
      for (Index x = 0; x < width; x += kLanes) {
        const int lanes = int(width - x < kLanes ? width - x : kLanes);
        store(plane + (y + 1) * stride() + x + 1, f(y * width + x, lanes), lanes);
      }
  }

  // Depthwise convolution with taps [9] and a bias: f(pixel, values, count) for runs of at most kLanes pixels of a row.
  template <class F>
  void convolve(const float* plane, const float* taps, float bias, F&& f) const {
    vec tap[9];
    for (int i = 0; i < 9; ++i) tap[i] = splat(taps[i]);
    for (Index y = 0; y < height; ++y) {
      const float* above = plane + y * stride();
      for (Index x = 0; x < width; x += kLanes) {
        vec total = splat(bias);
        for (int dy = 0; dy < 3; ++dy)
          for (int dx = 0; dx < 3; ++dx) total += tap[3 * dy + dx] * load(above + dy * stride() + x + dx);
        f(y * width + x, total, int(width - x < kLanes ? width - x : kLanes));
      }
    }
  }
};

// Values of `count` pixels in row `c` of a matrix of `depth` rows in panels.
inline void to_panel(float* panels, Index depth, Index c, Index pixel, vec values, int count) {
  const Index column = pixel % kWide;
  if (column + count <= kWide) {
    store(panels + (pixel / kWide * depth + c) * kWide + column, values, count);
    return;
  }
  for (int i = 0; i < count; ++i)
    panels[((pixel + i) / kWide * depth + c) * kWide + (pixel + i) % kWide] = values[i];
}

// Zero in the columns of the last panel that no pixel has.
inline void clear_tail(float* panels_, Index depth, Index columns) {
  const Index used = columns % kWide;
  if (used == 0) return;
  float* last = panels_ + columns / kWide * depth * kWide;
  for (Index c = 0; c < depth; ++c) std::memset(last + c * kWide + used, 0, (kWide - used) * sizeof(float));
}

}  // namespace MOEBIUS_VARIANT
