// 3x3 convolutions by Winograd's minimal filtering (Lavin and Gray, arXiv:1509.09308), with tiles of 4x4 results.
//
// In one dimension four results of a three-tap filter are A (G w . B x): x holds the six values they see, and A, G, B are
// Toom and Cook's for five points and infinity. In two dimensions that is 36 multiplications instead of 144. Over a
// picture each of the 36 is a matmul, [outputs, inputs] by [inputs, tiles].
//
// After nearest x2 upsampling the six values are four of the small picture, some twice: x0 x1 x1 x2 x2 x3. With 1 and
// -1 among the points, the row of B for -1 is the coefficients of (z - 1) z (z^2 - p^2) and infinity's zero: it takes
// differences of adjacent values at odd places only, where they are equal. That multiplication is always zero, so 25 are
// left: 6.25 for each small pixel where four 2x2 convolutions have 16.
#pragma once

#include <type_traits>
#include <utility>

#include "kernels.h"
#include "planes.h"

namespace MOEBIUS_VARIANT {

constexpr int kTile = 4;                 // results of a tile, each way
constexpr Index kDepth = 128;             // channels of a partial sum: shorter sums, less rounding
constexpr Index kStripBytes = 16L << 20;  // of transformed pictures: half a third-level cache
constexpr Index kGroup = 2;               // panels of tiles that are multiplied by the same rows of weights

template <int Rows, int Columns>
struct Matrix {
  float at[Rows][Columns];
};

// in[0] * M[I][J] + in[1] * M[I][J + 1] ..., where M is known to the compiler: zeros cost nothing.
template <const auto& M, int Columns, int I, int J>
inline vec row_of(const vec* in, vec total) {
  if constexpr (J == Columns) {
    return total;
  } else {
    constexpr float factor = M.at[I][J];
    if constexpr (factor == 1) total += in[J];
    if constexpr (factor == -1) total -= in[J];
    if constexpr (factor != 0 && factor != 1 && factor != -1) total += splat(factor) * in[J];
    return row_of<M, Columns, I, J + 1>(in, total);
  }
}

template <const auto& M, int Rows, int Columns, int... I>
inline void apply_rows(const Matrix<Rows, Columns>&, const vec* in, vec* out, std::integer_sequence<int, I...>) {
  ((out[I] = row_of<M, Columns, I, 0>(in, splat(0))), ...);
}

// out = M in
template <const auto& M>
inline void apply(const vec* in, vec* out) {
  constexpr int rows = int(sizeof(M.at) / sizeof(M.at[0]));
  apply_rows<M>(M, in, out, std::make_integer_sequence<int, rows>{});
}

// The points' polynomials. `left_out`: a point that is skipped; `source[i]`: where value i of six is taken from.
template <int Products, int Inputs>
struct Transforms {
  Matrix<Products, Inputs> in;
  Matrix<Products, 3> weight;
  Matrix<kTile, Products> out;
};

template <int Products, int Inputs>
constexpr Transforms<Products, Inputs> transforms(const double (&points)[5], int left_out, const int (&source)[6]) {
  Transforms<Products, Inputs> t{};
  for (int j = 0, row = 0; j < 6; ++j) {
    if (j == left_out) continue;
    double polynomial[6] = {1}, scale = 1;  // of (z - p) for all other points
    for (int k = 0, degree = 0; k < 5; ++k) {
      if (k == j) continue;
      ++degree;
      for (int i = degree; i >= 0; --i)
        polynomial[i] = (i > 0 ? polynomial[i - 1] : 0) - (i < degree ? points[k] * polynomial[i] : 0);
      if (j < 5) scale *= points[j] - points[k];
    }
    double sums[6] = {};
    for (int i = 0; i < 6; ++i) sums[source[i]] += polynomial[i];
    for (int i = 0; i < Inputs; ++i) t.in.at[row][i] = float(sums[i]);
    double power = 1;
    for (int i = 0; i < kTile; ++i) {
      if (i < 3) t.weight.at[row][i] = j < 5 ? float(power / scale) : float(i == 2);
      t.out.at[i][row] = j < 5 ? float(power) : float(i == kTile - 1);
      if (j < 5) power *= points[j];
    }
    ++row;
  }
  return t;
}

// Points with a small error, found by trying pairs: rounding is half of that with 1, 2.
struct Plain {
  static constexpr int products = 6, inputs = 6, step = 4;
  static constexpr auto all = transforms<6, 6>({0, 0.625, -0.625, 1.5, -1.5}, -1, {0, 1, 2, 3, 4, 5});
  static constexpr auto in = all.in;
  static constexpr auto weight = all.weight;
  static constexpr auto out = all.out;
};

struct Doubled {
  static constexpr int products = 5, inputs = 4, step = 2;
  static constexpr auto all = transforms<5, 4>({0, 1, -1, 1.75, -1.75}, 2, {0, 1, 1, 2, 2, 3});
  static constexpr auto in = all.in;
  static constexpr auto weight = all.weight;
  static constexpr auto out = all.out;
};

// v[j] = from[S * lane + j] for lanes 0 .. kLanes - 1, j < S; S is 2 or 4.
template <int S>
inline void strided(const float* from, vec* v) {
  if constexpr (S == 2) {
    v[0] = load(from), v[1] = load(from + kLanes);
    part(v[0], v[1], Lanes{});
  } else {
    vec low[2], high[2];
    strided<2>(from, low), strided<2>(from + 2 * kLanes, high);
    part(low[0], high[0], Lanes{}), part(low[1], high[1], Lanes{});
    v[0] = low[0], v[1] = low[1], v[2] = high[0], v[3] = high[1];
  }
}

// The inverse for S = 4: v becomes 4 * kLanes values in a row.
inline void interleave(vec* v) {
  vec a = v[0], b = v[2], c = v[1], d = v[3];
  join(a, b, Lanes{}), join(c, d, Lanes{});
  join(a, c, Lanes{}), join(b, d, Lanes{});
  v[0] = a, v[1] = c, v[2] = b, v[3] = d;
}

// A convolution, cut into tiles that are numbered through the batch; a strip of them at a time.
template <class F>
struct Winograd {
  static constexpr int P = F::products;
  const moebius::Conv3x3& f;
  Index high, wide;      // of the result
  Index across, down;    // tiles of a picture
  Index first, count;    // of the strip
  float* pictures;      // [P * P][panels][inputs + 1][kWide]; the one more keeps strides from powers of two
  Index panel_stride, product_stride;

  // The strip's tiles in a row of tiles (numbered through the batch), channels [begin, end).
  void transform_input(Index row, Index begin, Index end, float* lines, Index line) const {
    const Index from = first > row * across ? first - row * across : 0;
    const Index to = first + count < (row + 1) * across ? first + count - row * across : across;
    const Index x0 = from * F::step - 1, length = (to - from) * F::step + F::inputs - F::step;
    const Index left = x0 < 0 ? 0 : x0, right = x0 + length < f.width ? x0 + length : f.width;
    const Index y0 = row % down * F::step - 1;
    std::memset(lines, 0, P * line * sizeof(float));
    for (Index c = begin; c < end; ++c) {
      const float* plane = f.x + (row / down * f.inputs + c) * f.height * f.width;
      for (Index x = left; x < right; x += kLanes) {
        vec in[F::inputs], out[P];
        for (int i = 0; i < F::inputs; ++i) {
          in[i] = splat(0);
          const Index y = y0 + i;
          if (y < 0 || y >= f.height) continue;
          const float* at = plane + y * f.width + x;
          if (right - x >= kLanes) {
            in[i] = load(at);
          } else {
            std::memcpy(&in[i], at, (right - x) * sizeof(float));
          }
        }
        apply<F::in>(in, out);
        for (int i = 0; i < P; ++i) store(lines + i * line + x - x0, out[i]);
      }
      for (Index t = from; t < to; t += kLanes) {
        const Index tile = row * across + t - first;
        const int lanes = int(to - t < kLanes ? to - t : kLanes);
        for (int i = 0; i < P; ++i) {
          const float* at = lines + i * line + (t - from) * F::step;
          vec in[2 * F::step], out[P];
          strided<F::step>(at, in), strided<F::step>(at + F::step, in + F::step);
          apply<F::in>(in, out);
          for (int j = 0; j < P; ++j)
            to_panel(pictures + (i * P + j) * product_stride, f.inputs + 1, c, tile, out[j], lanes);
        }
      }
    }
  }

  // Rows [first_row, first_row + rows) of the weights -> [P * P][rows][stride].
  void transform_weights(Index first_row, Index rows, Index stride, float* to) const {
    for (Index r = 0; r < rows; ++r) {
      const float* weight = f.weight + (first_row + r) * f.inputs * 9;
      for (Index c = 0; c < f.inputs; c += kLanes) {
        const int lanes = int(f.inputs - c < kLanes ? f.inputs - c : kLanes);
        float taps[9][kLanes] = {};
        for (int l = 0; l < lanes; ++l)
          for (int i = 0; i < 9; ++i) taps[i][l] = weight[(c + l) * 9 + i];
        vec half[3][P];
        for (int x = 0; x < 3; ++x) {
          const vec in[3] = {load(taps[x]), load(taps[3 + x]), load(taps[6 + x])};
          apply<F::weight>(in, half[x]);
        }
        for (int i = 0; i < P; ++i) {
          const vec in[3] = {half[0][i], half[1][i], half[2][i]};
          vec out[P];
          apply<F::weight>(in, out);
          for (int j = 0; j < P; ++j) store(to + ((i * P + j) * rows + r) * stride + c, out[j]);
        }
      }
    }
  }

  // The transformed results of kLanes tiles, `stride` floats apart, -> their results in channel `output`.
  void finish(const float* product, Index stride, Index output, Index tile) const {
    vec half[P][kTile], result[kTile][kTile];
    for (int j = 0; j < P; ++j) {
      vec in[P];
      for (int i = 0; i < P; ++i) in[i] = load(product + (i * P + j) * stride);
      apply<F::out>(in, half[j]);
    }
    const vec bias = splat(f.bias[output]);
    for (int y = 0; y < kTile; ++y) {
      vec in[P];
      for (int j = 0; j < P; ++j) in[j] = half[j][y];
      apply<F::out>(in, result[y]);
      for (int x = 0; x < kTile; ++x) result[y][x] += bias;
      interleave(result[y]);
    }
    for (Index done = 0; done < kLanes && tile + done < count;) {
      const Index row = (first + tile + done) / across, column = (first + tile + done) % across;
      Index run = across - column < kLanes - done ? across - column : kLanes - done;  // adjacent tiles
      if (run > count - tile - done) run = count - tile - done;
      const Index x = column * kTile, pixels = wide - x < run * kTile ? wide - x : run * kTile;
      for (Index y = 0, top = row % down * kTile; y < kTile && top + y < high; ++y) {
        float* to = f.y + ((row / down * f.outputs + output) * high + top + y) * wide + x;
        if (pixels == kTile * kLanes)
          for (int i = 0; i < kTile; ++i) store(to + i * kLanes, result[y][i]);
        else
          std::memcpy(to, reinterpret_cast<const float*>(result[y]) + done * kTile, pixels * sizeof(float));
      }
      done += run;
    }
  }

  // Results of `rows` output channels for panels [begin, end).
  void outputs(Index first_row, Index rows, Index begin, Index end) const {
    const Index stride = (f.inputs + kLanes - 1) / kLanes * kLanes + kLanes;
    moebius::Scratch weights(P * P * rows * stride), products(P * P * (rows * kGroup + 1) * kWide);
    transform_weights(first_row, rows, stride, weights);
    const Index apart = (rows * kGroup + 1) * kWide;
    for (Index group = begin; group < end; group += kGroup) {
      const Index last = group + kGroup < end ? group + kGroup : end;
      for (Index k = 0; k < P * P; ++k)
        row_blocks(0, rows, [&](auto block, Index row) {
          constexpr int R = decltype(block)::value;
          for (Index p = group; p < last; ++p) {
            const float* left = weights + (k * rows + row) * stride;
            const float* right = pictures + k * product_stride + p * panel_stride;
            Tile<R> total = {};
            for (Index c = 0; c < f.inputs; c += kDepth) {
              Tile<R> tile = {};
              multiply<R>(tile, left + c, stride, right + c * kWide, f.inputs - c < kDepth ? f.inputs - c : kDepth);
              each_cell<R>([&](auto i, auto j) { total[i][j] += tile[i][j]; });
            }
            spill<R>(total, products + k * apart + ((p - group) * rows + row) * kWide);
          }
        });
      for (Index p = group; p < last; ++p)
        for (Index r = 0; r < rows; ++r)
          for (int j = 0; j < kVectors; ++j)
            finish(products + ((p - group) * rows + r) * kWide + j * kLanes, apart, first_row + r,
                   p * kWide + j * kLanes);
    }
  }
};

template <class F>
inline void winograd(const moebius::Conv3x3& f, const moebius::Threads& threads) {
  constexpr Index kProducts = F::products * F::products;
  const Index scale = kTile / F::step, high = f.height * scale, wide = f.width * scale;
  const Index across = (wide + kTile - 1) / kTile, down = (high + kTile - 1) / kTile, tiles = f.batch * down * across;
  // Strips of equal size, of whole panels.
  Index most = kStripBytes / (kProducts * f.inputs * Index(sizeof(float)) * kWide);
  if (most < 1) most = 1;
  const Index strips = (panels(tiles) + most - 1) / most, length = (panels(tiles) + strips - 1) / strips;
  // Tasks: an even number of equal blocks of outputs; of parts of the strip too, where those are few.
  constexpr Index kChannels = 8, kTasks = 16, kBlock = 2 * kRows;
  Index blocks = (f.outputs + kBlock - 1) / kBlock;
  if (blocks < kTasks / 2) blocks = (f.outputs + kRows - 1) / kRows;
  if (blocks > 1) blocks += blocks % 2;
  const Index rows = (f.outputs + blocks - 1) / blocks;
  blocks = (f.outputs + rows - 1) / rows;
  const Index parts = blocks >= kTasks / 2 ? 1 : (kTasks + blocks - 1) / blocks;
  const Index panel_stride = (f.inputs + 1) * kWide, product_stride = length * panel_stride + kWide;
  moebius::Scratch pictures(kProducts * product_stride);
  for (Index begin = 0; begin < panels(tiles); begin += length) {
    const Index first = begin * kWide, left = tiles - first, count = left < length * kWide ? left : length * kWide;
    const Winograd<F> strip{f, high, wide, across, down, first, count, pictures, panel_stride, product_stride};
    const Index top = first / across, bottom = (first + count - 1) / across + 1;
    const Index groups = (f.inputs + kChannels - 1) / kChannels;
    for (Index k = 0; k < kProducts; ++k) clear_tail(pictures + k * product_stride, f.inputs + 1, count);
    threads.each((bottom - top) * groups, [&](Index task) {
      const Index channel = task % groups * kChannels, end = channel + kChannels;
      const Index line = (across + 2 * kLanes) * F::step + kLanes;
      moebius::Scratch lines(F::products * line);
      strip.transform_input(top + task / groups, channel, end < f.inputs ? end : f.inputs, lines, line);
    });
    const Index used = panels(count), part = (used + parts - 1) / parts;
    threads.each(blocks * parts, [&](Index task) {
      const Index row = task / parts * rows, from = task % parts * part;
      const Index to = from + part < used ? from + part : used;
      if (from < to) strip.outputs(row, f.outputs - row < rows ? f.outputs - row : rows, from, to);
    });
  }
}

inline void conv3x3(const moebius::Conv3x3& f, const moebius::Threads& threads) { winograd<Plain>(f, threads); }

inline void upsample_conv3x3(const moebius::Conv3x3& f, const moebius::Threads& threads) {
  winograd<Doubled>(f, threads);
}

}  // namespace MOEBIUS_VARIANT
