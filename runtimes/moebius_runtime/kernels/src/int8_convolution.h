// INT8 3x3 convolutions: with stride 2, and after nearest x2 upsampling, where the taps that read the same input pixel are
// added up, which leaves 2x2 taps for each of the four output phases. They are plain sums over taps and channels: INT8
// matmul is so fast that Winograd's transforms, which need more bits, would gain nothing.
#pragma once

#include "int8_residual_block.h"

namespace MOEBIUS_VARIANT {

// Pictures of four INT8 channels a pixel, with a border of the zero point: [channels / 4][height + 2][width + 2][4].
inline void picture_to_padded_bytes(const moebius::Int8Convolution& f, const float* x, std::uint8_t* to,
                                    const moebius::Threads& threads) {
  const Plane plane{f.height, f.width};
  threads.each(f.inputs / 4, [&](Index group) {
    std::uint8_t* pixels = to + group * plane.size() * 4;
    const float* rows[4];
    vec inverse[4], zero[4];
    ivec border{};
    for (Index c = 0; c < 4; ++c) {
      const Index channel = group * 4 + c;
      rows[c] = x + channel * f.height * f.width;
      inverse[c] = splat(f.quantiser.inverse[channel]), zero[c] = splat(f.quantiser.zero[channel]);
      border |= quantise(splat(0), inverse[c], zero[c]) << int(8 * c);
    }
    for (Index i = 0; i < plane.size(); ++i) std::memcpy(pixels + 4 * i, &border, 4);
    for (Index y = 0; y < f.height; ++y)
      for (Index column = 0; column < f.width; column += kLanes) {
        const int lanes = int(f.width - column < kLanes ? f.width - column : kLanes);
        ivec four{};  // the channels of a pixel, the first in the lowest byte
        for (Index c = 0; c < 4; ++c)
          four |= quantise(load(rows[c] + y * f.width + column, lanes), inverse[c], zero[c]) << int(8 * c);
        std::memcpy(pixels + 4 * plane.at(y * f.width + column), &four, 4 * lanes);
      }
  });
}

// A convolution: results are `step` pixels of the padded picture apart. The `phases` each way are computed sequentially
// and interleaved in the result.
struct ByteConvolution {
  const moebius::Int8Convolution& f;
  Index reach, step, phases;  // taps each way, of each of phases * phases pictures
  Index high, wide;           // of one of these

  Index depth() const { return reach * reach * f.inputs; }

  // The panel of results [first, first + kWide) of a phase, its depth [taps][inputs], in the operand format. `groups`
  // holds the four channels of kWide results for one tap: [inputs / 4][kWide][4].
  void gather(const std::uint8_t* padded, Index phase, Index first, std::uint8_t* groups, std::uint8_t* to) const {
    const Plane plane{f.height, f.width};
    const Index columns = high * wide - first < kWide ? high * wide - first : kWide;
    for (Index tap = 0; tap < reach * reach; ++tap) {
      for (Index t = 0; t < columns;) {
        const Index y = (first + t) / wide, x = (first + t) % wide;
        const Index run = step > 1 ? 1 : wide - x < columns - t ? wide - x : columns - t;
        const std::uint8_t* from =
            padded + 4 * ((y * step + phase / 2 + tap / reach) * plane.stride() + x * step + phase % 2 + tap % reach);
        std::uint8_t* at = groups + t * 4;
        for (Index c = 0; c < f.inputs / 4; ++c) std::memcpy(at + c * kWide * 4, from + c * plane.size() * 4, 4 * run);
        t += run;
      }
      for (Index c = 0; c < f.inputs / 4; ++c) put_group(to, depth(), tap * f.inputs / 4 + c, groups + c * kWide * 4);
    }
  }

  // Results [first, first + kWide) of output channels [row, row + R).
  template <int R>
  void outputs(const Rows& weights, const std::uint8_t* panel, Index phase, Index first, Index row, float* y) const {
    const moebius::Int8Product& product = f.product;
    const Index place = phase * f.outputs + row;
    Sums<R> sums;
    multiply8<true, R>(sums, weights, panel_of(panel, depth()), depth());
    const Index pixels = high * wide * phases * phases;
    Index places[kWide];
    if (phases > 1)
      for (Index t = 0, up = first / wide, left = first % wide; t < kWide; ++t) {
        places[t] = (up * phases + phase / 2) * wide * phases + left * phases + phase % 2;
        if (++left == wide) left = 0, ++up;
      }
    each_vector<R>(high * wide, first / kWide, [&](int i, int j, Index pixel, int lanes) {
      const vec value = as_floats(sums[i][j]) * splat(product.scale[place + i]) + splat(product.offset[place + i]);
      float* to = y + (row + i) * pixels;
      if (phases == 1) return store(to + pixel, value, lanes);
      for (int l = 0; l < lanes; ++l) to[places[j * kLanes + l]] = value[l];
    });
  }

  void run(const moebius::Threads& threads) const {
    const Index count = panels(high * wide), kinds = phases * phases, size = panel_bytes(depth());
    const Index fits = (384 << 10) / size, group = fits < 1 ? 1 : fits > 4 ? 4 : fits;
    const Index groups = (count + group - 1) / group;
    Bytes padded(f.inputs * Plane{f.height, f.width}.size());
    for (Index b = 0; b < f.batch; ++b) {
      picture_to_padded_bytes(f, f.x + b * f.inputs * f.height * f.width, padded, threads);
      float* y = f.y + b * f.outputs * kinds * high * wide;
      threads.each(kinds * groups, [&](Index task) {
        const Index phase = task / groups, begin = task % groups * group;
        const Index end = begin + group < count ? begin + group : count;
        Bytes gathered(group * size), tap(f.inputs * kWide), for_rows(rows_bytes<true>(kRows, depth()));
        for (Index p = begin; p < end; ++p) gather(padded, phase, p * kWide, tap, gathered + (p - begin) * size);
        row_blocks(0, f.outputs, [&](auto rows, Index row) {
          const std::int8_t* weight = f.product.weight + (phase * f.outputs + row) * depth();
          const Rows block = rows_of<true>(weight, rows, depth(), for_rows);
          for (Index p = begin; p < end; ++p)
            outputs<decltype(rows)::value>(block, gathered + (p - begin) * size, phase, p * kWide, row, y);
        });
      });
    }
  }
};

inline void int8_downsample_conv3x3(const moebius::Int8Convolution& f, const moebius::Threads& threads) {
  ByteConvolution{f, 3, 2, 1, (f.height + 1) / 2, (f.width + 1) / 2}.run(threads);
}

inline void int8_upsample_conv3x3(const moebius::Int8Convolution& f, const moebius::Threads& threads) {
  ByteConvolution{f, 2, 1, 2, f.height, f.width}.run(threads);
}

}  // namespace MOEBIUS_VARIANT
