// Matrix products: rows of weights as they lie in the file, times columns packed in panels.
//
// A panel holds kWide columns of a matrix [depth, columns], row after row: element (c, t) of a matrix of `depth` rows is
// at ((t / kWide) * depth + c) * kWide + t % kWide. Columns beyond the last are zero. Weights are not packed, so they are
// held once: in the pages of the mapped file.
#pragma once

#include <type_traits>

#include "simd.h"

namespace MOEBIUS_VARIANT {

inline long panels(long columns) { return (columns + kWide - 1) / kWide; }

template <int R>
using Tile = vec[R][kVectors];

// tile += rows [R, depth] (each `stride` floats after the one before) * panel [depth, kWide].
template <int R>
inline void multiply(Tile<R>& tile, const float* rows, long stride, const float* panel, long depth) {
  const char* at = reinterpret_cast<const char*>(rows);
  // Odd multiples of the stride in registers; the even ones are what an address can scale.
  const long one = stride * long(sizeof(float)), three = 3 * one, five = 5 * one, seven = 7 * one, nine = 9 * one,
             eleven = 11 * one, thirteen = 13 * one;
  for (long k = 0; k < depth; ++k, at += sizeof(float), panel += kWide) {
    const vec left = load(panel), right = load(panel + kLanes);
    const auto row = [&](auto index, long offset) {
      constexpr int i = decltype(index)::value;
      if constexpr (i < R) {
        float weight;
        std::memcpy(&weight, at + offset, sizeof weight);
        const vec factor = splat(weight);
        tile[i][0] += factor * left;
        tile[i][1] += factor * right;
      }
    };
    row(std::integral_constant<int, 0>{}, 0);
    row(std::integral_constant<int, 1>{}, one);
    row(std::integral_constant<int, 2>{}, 2 * one);
    row(std::integral_constant<int, 3>{}, three);
    row(std::integral_constant<int, 4>{}, 4 * one);
    row(std::integral_constant<int, 5>{}, five);
    row(std::integral_constant<int, 6>{}, 2 * three);
    row(std::integral_constant<int, 7>{}, seven);
    row(std::integral_constant<int, 8>{}, 8 * one);
    row(std::integral_constant<int, 9>{}, nine);
    row(std::integral_constant<int, 10>{}, 2 * five);
    row(std::integral_constant<int, 11>{}, eleven);
    row(std::integral_constant<int, 12>{}, 4 * three);
    row(std::integral_constant<int, 13>{}, thirteen);
  }
}

// Calls f(integral_constant R) for R = rows, 1 <= rows <= kRows.
template <int R = kRows, class F>
inline void with_rows(long rows, F&& f) {
  if (rows >= R) {
    f(std::integral_constant<int, R>{});
  } else if constexpr (R > 1) {
    with_rows<R - 1>(rows, f);
  }
}

// Calls f(integral_constant R, first row) for blocks of at most kRows of the rows [first, last).
template <class F>
inline void row_blocks(long first, long last, F&& f) {
  for (long row = first; row < last; row += kRows)
    with_rows(last - row, [&](auto count) { f(count, row); });
}

// A finished tile as floats [R, kWide].
template <int R>
inline void spill(const Tile<R>& tile, float* to) {
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) store(to + i * kWide + j * kLanes, tile[i][j]);
}

}  // namespace MOEBIUS_VARIANT
