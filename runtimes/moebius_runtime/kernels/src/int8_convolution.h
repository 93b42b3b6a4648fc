// INT8 3x3 convolutions: with stride 2, and after nearest x2 upsampling, where the taps that read the same input pixel are
// added up, which leaves 2x2 taps for each of the four output phases. They are plain sums over taps and channels: INT8
// matmul is so fast that Winograd's transforms, which need more bits, would gain nothing.
#pragma once

#include "int8_residual_block.h"

namespace MOEBIUS_VARIANT {

// Pictures of four INT8 channels a pixel, with a border of the zero point: [channels / 4][height + 2][width + 2][4].
// `active`: factors [2][channels] of a norm, whose SiLU is quantized instead of x; or null.
inline void picture_to_padded_bytes(const moebius::Int8Convolution& f, const float* x, const float* active, std::uint8_t* to,
                                    const moebius::Threads& threads) {
  const Plane plane{f.height, f.width};
  threads.each(f.inputs / 4, [&](Index group) {
    std::uint8_t* pixels = to + group * plane.size() * 4;
    const float* rows[4];
    vec inverse[4], zero[4], scale[4], offset[4];
    ivec border{};
    for (Index c = 0; c < 4; ++c) {
      const Index channel = group * 4 + c;
      rows[c] = x + channel * f.height * f.width;
      inverse[c] = splat(f.quantiser.inverse[channel]), zero[c] = splat(f.quantiser.zero[channel]);
      if (active) scale[c] = splat(active[channel]), offset[c] = splat(active[f.inputs + channel]);
      border |= quantise(splat(0), inverse[c], zero[c]) << int(8 * c);
    }
    const auto fill_border = [&](Index pixel, Index count) {
      for (Index i = pixel; i < pixel + count; ++i) std::memcpy(pixels + 4 * i, &border, 4);
    };
    const auto numbers = [&](Index pixel, int lanes, auto function) {
      ivec four{};  // the channels of a pixel, the first in the lowest byte
      for (Index c = 0; c < 4; ++c)
        four |= quantise(function(load(rows[c] + pixel, lanes), c), inverse[c], zero[c]) << int(8 * c);
      store_ints(pixels + 4 * plane.at(pixel), four, lanes);
    };
    fill_border(0, plane.stride());
    for (Index y = 0; y < f.height; ++y) {
      fill_border((y + 1) * plane.stride(), 1);
      fill_border((y + 1) * plane.stride() + f.width + 1, 1);
      for (Index column = 0; column < f.width; column += kLanes) {
        const Index pixel = y * f.width + column;
        const int lanes = int(f.width - column < kLanes ? f.width - column : kLanes);
        if (active)
          numbers(pixel, lanes, [&](vec value, Index c) { return silu(value * scale[c] + offset[c]); });
        else
          numbers(pixel, lanes, [](vec value, Index) { return value; });
      }
    }
    fill_border((f.height + 1) * plane.stride(), plane.stride());
  });
}

// A convolution: results are `step` pixels of the padded picture apart. With two `phases` each way there are four pictures
// of results, which are interleaved; a task computes both of a row.
struct ByteConvolution {
  const moebius::Int8Convolution& f;
  Index reach, step, phases;  // taps each way, of each of phases * phases pictures
  Index high, wide;           // of one of these

  Index depth() const { return reach * reach * f.inputs; }

  // The panel of results [first, first + kWide) of a phase, its depth [taps][inputs], in the operand format. `groups`
  // holds the four channels of kWide results for one tap: [inputs / 4][kWide][4].
  void gather(const std::uint8_t* padded, Index phase, Index first, std::uint8_t* groups, std::uint8_t* to) const {
    const Plane plane{f.height, f.width};
    const Index corner = 1 - f.before;  // of the first result's taps
    const Index columns = high * wide - first < kWide ? high * wide - first : kWide;
    for (Index tap = 0; tap < reach * reach; ++tap) {
      const auto place = [&](Index y, Index x) {
        return padded + 4 * ((y * step + corner + phase / 2 + tap / reach) * plane.stride() + x * step + corner + phase % 2 +
                             tap % reach);
      };
      if (step == 1 && wide - first % wide >= kWide) {  // within a row
        const std::uint8_t* from = place(first / wide, first % wide);
        for (Index c = 0; c < f.inputs / 4; ++c)
          put_group(to, depth(), tap * f.inputs / 4 + c, from + c * plane.size() * 4);
        continue;
      }
      for (Index t = 0; t < columns;) {
        const Index y = (first + t) / wide, x = (first + t) % wide;
        const Index run = step > 1 ? 1 : wide - x < columns - t ? wide - x : columns - t;
        const std::uint8_t* from = place(y, x);
        std::uint8_t* at = groups + t * 4;
        for (Index c = 0; c < f.inputs / 4; ++c) std::memcpy(at + c * kWide * 4, from + c * plane.size() * 4, 4 * run);
        t += run;
      }
      for (Index c = 0; c < f.inputs / 4; ++c) put_group(to, depth(), tap * f.inputs / 4 + c, groups + c * kWide * 4);
    }
  }

  // Results [first, first + kWide) of output channels [row, row + R).
  template <int R>
  void outputs(const Rows& weights, const std::uint8_t* panel, Index first, Index row, float* y) const {
    const moebius::Int8Product& product = f.product;
    Sums<R> sums;
    fetch<R, 1>(y + row * high * wide + first, high * wide);
    multiply8<true, R>(sums, weights, panel_of(panel, depth()), depth());
    each_vector<R>(high * wide, first / kWide, [&](auto i, auto j, Index pixel, auto lanes) {
      const vec value = as_floats(sums[i][j]) * splat(product.scale[row + i]) + splat(product.offset[row + i]);
      store(y + (row + i) * high * wide + pixel, value, lanes);
    });
  }

  // The same of one phase, [R][kWide].
  template <int R>
  void outputs_of_phase(const Rows& weights, const std::uint8_t* panel, Index phase, Index row, float* to) const {
    const moebius::Int8Product& product = f.product;
    const Index place = phase * f.outputs + row;
    Sums<R> sums;
    multiply8<true, R>(sums, weights, panel_of(panel, depth()), depth());
    each_cell<R>([&](auto i, auto j) {
      const vec value = as_floats(sums[i][j]) * splat(product.scale[place + i]) + splat(product.offset[place + i]);
      store(to + i * kWide + j * kLanes, value);
    });
  }

  // Interleaves the results of two phases, [rows][kWide] each, in a row of y: `top` 0 or 1.
  void interleaved(const float* left, const float* right, Index rows, Index top, Index first, Index row, float* y) const {
    const Index count = high * wide;
    for (int j = 0; j < kVectors; ++j) {
      const Index begin = first + j * kLanes, up = begin / wide, across = begin % wide;
      const Index lanes = count - begin < kLanes ? count - begin : kLanes;
      if (lanes <= 0) return;
      for (Index i = 0; i < rows; ++i) {
        const float *a = left + i * kWide + j * kLanes, *b = right + i * kWide + j * kLanes;
        float* to = y + (row + i) * 4 * count;
        if (lanes == kLanes && across + kLanes <= wide) {
          vec even = load(a), odd = load(b);
          join(even, odd, Lanes{});
          to += ((2 * up + top) * wide + across) * 2;
          store(to, even), store(to + kLanes, odd);
          continue;
        }
        for (Index l = 0; l < lanes; ++l) {
          const Index pixel = begin + l, at = ((2 * (pixel / wide) + top) * wide + pixel % wide) * 2;
          to[at] = a[l], to[at + 1] = b[l];
        }
      }
    }
  }

  // Panels [begin, end) of the results, of a row of phases.
  void panels_of_results(const std::uint8_t* padded, Index top, Index begin, Index end, float* y) const {
    const Index size = panel_bytes(depth());
    Bytes gathered((end - begin) * phases * size), tap(f.inputs * kWide);
    Bytes for_rows(rows_bytes<true>(kRows, depth())), for_others(phases > 1 ? rows_bytes<true>(kRows, depth()) : 0);
    const auto panel = [&](Index p, Index phase) { return gathered + ((p - begin) * phases + phase) * size; };
    for (Index p = begin; p < end; ++p)
      for (Index phase = 0; phase < phases; ++phase) gather(padded, 2 * top + phase, p * kWide, tap, panel(p, phase));
    const std::int8_t* weight = f.product.weight + top * phases * f.outputs * depth();
    row_blocks(0, f.outputs, [&](auto rows, Index row) {
      constexpr int R = decltype(rows)::value;
      const Rows block = rows_of<true>(weight + row * depth(), R, depth(), for_rows);
      if (phases == 1) {
        for (Index p = begin; p < end; ++p) outputs<R>(block, panel(p, 0), p * kWide, row, y);
        return;
      }
      const Rows other = rows_of<true>(weight + (f.outputs + row) * depth(), R, depth(), for_others);
      float left[R * kWide], right[R * kWide];
      for (Index p = begin; p < end; ++p) {
        outputs_of_phase<R>(block, panel(p, 0), 2 * top, row, left);
        outputs_of_phase<R>(other, panel(p, 1), 2 * top + 1, row, right);
        interleaved(left, right, R, top, p * kWide, row, y);
      }
    });
  }

  void run(const moebius::Threads& threads) const {
    const Index count = panels(high * wide), size = panel_bytes(depth()) * phases, pixels = f.height * f.width;
    const Index fits = (512 << 10) / size, group = fits < 1 ? 1 : fits > 4 ? 4 : fits;
    const Index groups = (count + group - 1) / group;
    const moebius::ActiveNorm& norm = f.norm;
    Bytes padded(f.inputs * Plane{f.height, f.width}.size());
    moebius::Scratch factors(2 * f.inputs);
    const float* active = norm.gain ? static_cast<float*>(factors) : nullptr;
    for (Index b = 0; b < f.batch; ++b) {
      const float* x = f.x + b * f.inputs * pixels;
      float* y = f.y + b * f.outputs * phases * phases * high * wide;
      if (active) group_norm(x, f.inputs, pixels, norm.groups, norm.gain, norm.shift, norm.epsilon, factors, threads);
      picture_to_padded_bytes(f, x, active, padded, threads);
      threads.each(phases * groups, [&](Index task) {
        const Index begin = task % groups * group, end = begin + group < count ? begin + group : count;
        panels_of_results(padded, task / groups, begin, end, y);
      });
    }
  }
};

inline void int8_downsample_conv3x3(const moebius::Int8Convolution& f, const moebius::Threads& threads) {
  ByteConvolution{f, 3, 2, 1, (f.height + f.before) / 2, (f.width + f.before) / 2}.run(threads);
}

inline void int8_upsample_conv3x3(const moebius::Int8Convolution& f, const moebius::Threads& threads) {
  ByteConvolution{f, 2, 1, 2, f.height, f.width}.run(threads);
}

}  // namespace MOEBIUS_VARIANT
