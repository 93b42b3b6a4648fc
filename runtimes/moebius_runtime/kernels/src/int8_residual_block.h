// INT8 residual block, in the order of residual_block.h. Pictures by channel are the panels of the matmuls, weights the
// rows.
#pragma once

#include "group_norm.h"
#include "int8_linear.h"
#include "planes.h"

namespace MOEBIUS_VARIANT {

// Pictures as INT8 panels in the operand format.
struct BytePanels {
  std::uint8_t* at;
  Index depth;

  std::uint8_t* panel(Index p) const { return at + p * panel_bytes(depth); }
};

// Collects four channels of a picture of n pixels before they are written to the panels, which are too far apart for the
// cache to hold a line of each.
class FourChannels {
 public:
  explicit FourChannels(Index n) : n_(n), row_(n + kWide) {}

  // Values of `count` pixels in channel c.
  void write(Index c, Index pixel, ivec values, int count) const {
    float* to = row_ + pixel;
    const int shift = int(c % 4) * 8;
    values <<= shift;
    if (shift) values |= load_bytes(to);
    store_ints(to, values, count);
  }

  // After channel c, the last of its four.
  void flush(Index c, const BytePanels& panels) const {
    for (Index pixel = 0; pixel < n_; pixel += kWide)
      put_group(panels.panel(pixel / kWide), panels.depth, c / 4, row_ + pixel);
  }

 private:
  Index n_;
  moebius::Scratch row_;
};

// relu(depthwise(silu(norm(x)))) as INT8 panels, and silu(norm(x)) itself if `active` is given, and x itself as INT8 in
// the panels `raw` if these are.
inline void normal_to_bytes(const float* x, Index channels, const Plane& plane, Index groups, float epsilon,
                            const moebius::Int8Separable& s, const BytePanels& panels, float* active,
                            const BytePanels* raw, const moebius::Quantiser& raw_quantiser,
                            const moebius::Threads& threads) {
  const Index n = plane.height * plane.width;
  moebius::Scratch factors(2 * channels);
  group_norm(x, channels, n, groups, s.gain, s.shift, epsilon, factors, threads);
  constexpr Index kChannels = 8;  // in a task
  threads.each((channels + kChannels - 1) / kChannels, [&](Index task) {
    moebius::Scratch padded(plane.size());
    const FourChannels four(n), raw_four(raw ? n : 0);
    plane.clear_border(padded);
    const Index last = (task + 1) * kChannels < channels ? (task + 1) * kChannels : channels;
    for (Index c = task * kChannels; c < last; ++c) {
      const vec scale = splat(factors[c]), offset = splat(factors[channels + c]);
      const auto normal = [&](vec value) { return silu(value * scale + offset); };
      if (raw) {
        const vec inverse = splat(raw_quantiser.inverse[c]), zero = splat(raw_quantiser.zero[c]);
        plane.fill(padded, [&](Index pixel, int lanes) {
          const vec value = load(x + c * n + pixel, lanes);
          raw_four.write(c, pixel, quantise(value, inverse, zero), lanes);
          return normal(value);
        });
      } else {
        plane.fill(padded, [&](Index pixel, int lanes) {
          const vec value = normal(load(x + c * n + pixel, lanes));
          if (active != nullptr) store(active + c * n + pixel, value, lanes);
          return value;
        });
      }
      const vec inverse = splat(s.quantiser.inverse[c]), zero = splat(s.quantiser.zero[c]);
      plane.convolve(padded, s.depthwise + c * 9, s.depthwise_bias[c], [&](Index pixel, vec value, int lanes) {
        four.write(c, pixel, quantise(relu(value), inverse, zero), lanes);
      });
      if (c % 4 < 3) continue;
      four.flush(c, panels);
      if (raw) raw_four.flush(c, *raw);
    }
  });
}

inline void picture_to_bytes(const float* x, Index channels, Index n, const moebius::Quantiser& q, const BytePanels& to,
                             const moebius::Threads& threads) {
  constexpr Index kPixels = 4096;  // of a block, whose four channels the first-level cache holds
  const Index blocks = (n + kPixels - 1) / kPixels;
  threads.each(channels / 4 * blocks, [&](Index task) {
    const Index group = task / blocks, first = task % blocks * kPixels, count = n - first < kPixels ? n - first : kPixels;
    const FourChannels four(count);
    for (Index c = group * 4; c < group * 4 + 4; ++c) {
      const vec inverse = splat(q.inverse[c]), zero = splat(q.zero[c]);
      for (Index i = 0; i < count; i += kLanes) {
        const int lanes = int(count - i < kLanes ? count - i : kLanes);
        four.write(c, i, quantise(load(x + c * n + first + i, lanes), inverse, zero), lanes);
      }
    }
    four.flush(group * 4, {to.panel(first / kWide), channels});
  });
}

// f(integral_constant R, first row, rows of weights, rows of other weights, panel) for every tile of a matmul of int8
// weights [rows, depth] by panels. The other weights, of as many rows, are null where there are none.
template <class F>
inline void each_byte_tile(const moebius::Threads& threads, Index rows, Index count, const std::int8_t* weight, Index depth,
                           const std::int8_t* other, Index other_depth, F&& f) {
  each_task(threads, rows, count, (depth + other_depth) / 4, [&](Index top, Index bottom, Index first, Index last) {
    Bytes for_rows(rows_bytes<true>(kRows, depth)), for_others(rows_bytes<true>(kRows, other_depth));
    row_blocks(top, bottom, [&](auto size, Index row) {
      const Rows block = rows_of<true>(weight + row * depth, size, depth, for_rows);
      Rows others{};
      if (other != nullptr) others = rows_of<true>(other + row * other_depth, size, other_depth, for_others);
      for (Index p = first; p < last; ++p) f(size, row, block, others, p);
    });
  });
}

// The sums of a tile of panel p.
template <int R>
inline void multiply_panel(Sums<R>& sums, const Rows& rows, const BytePanels& panels, Index p) {
  multiply8<true, R>(sums, rows, panel_of(panels.panel(p), panels.depth), panels.depth);
}

inline void int8_residual_block(const moebius::Int8ResidualBlock& f, const moebius::Threads& threads) {
  const Plane plane{f.height, f.width};
  const Index n = f.height * f.width, count = panels(n);
  const bool projected = f.shortcut.weight != nullptr;
  Bytes first_bytes(count * panel_bytes(f.inputs)), second_bytes(count * panel_bytes(f.outputs));
  Bytes raw_bytes(projected ? count * panel_bytes(f.inputs) : 0);
  const BytePanels first{first_bytes, f.inputs}, second{second_bytes, f.outputs}, raw{raw_bytes, f.inputs};
  moebius::Scratch first_active(projected ? 0 : f.inputs * n), middle(f.outputs * n), second_active(f.outputs * n);
  for (Index b = 0; b < f.batch; ++b) {
    const float* x = f.x + b * f.inputs * n;
    const float* time = f.time + (f.time_rows == 1 ? 0 : b) * f.outputs;
    float* y = f.y + b * f.outputs * n;
    normal_to_bytes(x, f.inputs, plane, f.groups, f.epsilon, f.first, first,
                    projected ? nullptr : static_cast<float*>(first_active), projected ? &raw : nullptr,
                    f.shortcut_quantiser, threads);
    const auto from_first = [&](auto size, Index row, const Rows& weights, const Rows&, Index p) {
      constexpr int R = decltype(size)::value;
      const moebius::Int8Product& product = f.first.product;
      const Index start = row * n + p * kWide;
      fetch<R, 1>(middle + start, n);
      if (!projected) fetch<R, 0>(first_active + start, n);
      Sums<R> sums;
      multiply_panel<R>(sums, weights, first, p);
      each_vector<R>(n, p, [&](auto i, auto j, Index pixel, auto lanes) {
        vec value = as_floats(sums[i][j]) * splat(product.scale[row + i]) + splat(product.offset[row + i] + time[row + i]);
        if (!projected) value += load(first_active + (row + i) * n + pixel);
        store(middle + (row + i) * n + pixel, value, lanes);
      });
    };
    each_byte_tile(threads, f.outputs, count, f.first.product.weight, f.inputs, nullptr, 0, from_first);
    normal_to_bytes(middle, f.outputs, plane, f.groups, f.epsilon, f.second, second, second_active, nullptr, {}, threads);
    const auto from_second = [&](auto size, Index row, const Rows& weights, const Rows& shortcut, Index p) {
      constexpr int R = decltype(size)::value;
      const moebius::Int8Product& product = f.second.product;
      const Index start = row * n + p * kWide;
      fetch<R, 1>(y + start, n);
      fetch<R, 0>(second_active + start, n);
      if (!projected) fetch<R, 0>(x + start, n);
      Sums<R> sums, skip;
      multiply_panel<R>(sums, weights, second, p);
      if (projected) multiply_panel<R>(skip, shortcut, raw, p);
      each_vector<R>(n, p, [&](auto i, auto j, Index pixel, auto lanes) {
        const Index at = (row + i) * n + pixel;
        vec value = as_floats(sums[i][j]) * splat(product.scale[row + i]) + splat(product.offset[row + i]);
        value += load(second_active + at);
        value += projected ? as_floats(skip[i][j]) * splat(f.shortcut.scale[row + i]) + splat(f.shortcut.offset[row + i])
                           : load(x + at, lanes);
        store(y + at, value, lanes);
      });
    };
    each_byte_tile(threads, f.outputs, count, f.second.product.weight, f.outputs, f.shortcut.weight,
                   projected ? f.inputs : 0, from_second);
  }
}

// y [outputs, n] of INT8 panels, plus `skip` of the size of y if it is not null.
inline void multiply_pictures(const BytePanels& panels, const moebius::Int8Product& product, Index outputs, Index n,
                              const float* skip, float* y, const moebius::Threads& threads) {
  const auto tile = [&](auto size, Index row, const Rows& weights, const Rows&, Index p) {
    constexpr int R = decltype(size)::value;
    fetch<R, 1>(y + row * n + p * kWide, n);
    if (skip != nullptr) fetch<R, 0>(skip + row * n + p * kWide, n);
    Sums<R> sums;
    multiply_panel<R>(sums, weights, panels, p);
    each_vector<R>(n, p, [&](auto i, auto j, Index pixel, auto lanes) {
      vec value = as_floats(sums[i][j]) * splat(product.scale[row + i]) + splat(product.offset[row + i]);
      if (skip != nullptr) value += load(skip + (row + i) * n + pixel, lanes);
      store(y + (row + i) * n + pixel, value, lanes);
    });
  };
  each_byte_tile(threads, outputs, (n + kWide - 1) / kWide, product.weight, panels.depth, nullptr, 0, tile);
}

// Tokens to a picture by channel: y [batch, outputs, n].
inline void int8_linear_to_picture(const moebius::Int8Linear& f, const moebius::Threads& threads) {
  const Index n = f.tokens / f.batch, count = panels(n), k = f.inputs;
  Bytes packed(f.batch * count * panel_bytes(k));
  threads.each(f.batch * count, [&](Index task) {
    const Index b = task / count, first = task % count * kWide, tokens = n - first < kWide ? n - first : kWide;
    Bytes rows(tokens * k);
    quantise_tokens(f.x + (b * n + first) * k, tokens, k, f.norm, f.quantiser, rows);
    std::uint8_t* to = packed + task * panel_bytes(k);
    std::uint8_t groups[16][4 * kWide] = {};  // of the channels of a token's cache line
    for (Index c = 0; c < k; c += 64) {
      const Index size = k - c < 64 ? k - c : 64;
      for (Index t = 0; t < tokens; ++t)
        for (Index i = 0; i < size; i += 4) std::memcpy(groups[i / 4] + t * 4, rows + t * k + c + i, 4);
      for (Index i = 0; i < size; i += 4) put_group(to, k, (c + i) / 4, groups[i / 4]);
    }
  });
  for (Index b = 0; b < f.batch; ++b)
    multiply_pictures({packed + b * count * panel_bytes(k), k}, f.product, f.outputs, n,
                      f.skip ? f.skip + b * f.outputs * n : nullptr, f.y + b * f.outputs * n, threads);
}

inline void int8_conv1x1(const moebius::Int8Pointwise& f, const moebius::Threads& threads) {
  Bytes packed(panels(f.pixels) * panel_bytes(f.inputs));
  const BytePanels x{packed, f.inputs};
  for (Index b = 0; b < f.batch; ++b) {
    picture_to_bytes(f.x + b * f.inputs * f.pixels, f.inputs, f.pixels, f.quantiser, x, threads);
    multiply_pictures(x, f.product, f.outputs, f.pixels, nullptr, f.y + b * f.outputs * f.pixels, threads);
  }
}

}  // namespace MOEBIUS_VARIANT
