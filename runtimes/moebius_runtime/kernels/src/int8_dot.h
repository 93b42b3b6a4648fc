// Operands of INT8 matmul as they are in memory: four bytes of depth in a 32-bit lane, for instructions that add their
// four products to the lane (vpdpbusd of AVX512-VNNI and AVX-VNNI).
#pragma once

#include "int8.h"

namespace MOEBIUS_VARIANT {

constexpr Index kUnit = 1;  // rows that a block starts at a multiple of

// Per lane: sum + u[0] s[0] + u[1] s[1] + u[2] s[2] + u[3] s[3], u uint8 and s int8.
inline ivec add_products(ivec sum, ivec u, ivec s) {
#if MOEBIUS_LANES == 16
  return ivec(_mm512_dpbusd_epi32(__m512i(sum), __m512i(u), __m512i(s)));
#elif defined(__AVXVNNI__)
  return ivec(_mm256_dpbusd_avx_epi32(__m256i(sum), __m256i(u), __m256i(s)));
#else  // AVX512-VNNI at this width, for tests where there is no AVX-VNNI
  return ivec(_mm256_dpbusd_epi32(__m256i(sum), __m256i(u), __m256i(s)));
#endif
}

// Bytes of a picture's panel, and of what the conversions need.
inline Index panel_bytes(Index depth) { return depth * kWide; }
inline Index columns_bytes(Index) { return 0; }
template <bool weights>
inline Index rows_bytes(Index, Index) {
  return 0;
}

// Four channels of kWide columns, uint8 [kWide][4], to a picture's panel.
inline void put_group(std::uint8_t* panel, Index, Index group, const void* columns) {
  std::memcpy(panel + group * 4 * kWide, columns, 4 * kWide);
}

inline Panel panel_of(const std::uint8_t* panel, Index) {
  const char* at = reinterpret_cast<const char*>(panel);
  return {at, at + 4 * kLanes, 4 * kWide};
}

// The panel of columns [column, column + kWide) of packed weights.
inline Panel columns_of(const std::int8_t* weight, Index depth, Index outputs, Index column, std::uint8_t*) {
  const auto place = [&](Index c) { return reinterpret_cast<const char*>(packed_column(weight, depth, c)); };
  return {place(column), place(second_column(outputs, column)), 4 * kPacked};
}

// Rows of int8 weights or uint8 activations.
template <bool weights>
inline Rows rows_of(const void* from, Index, Index depth, std::uint8_t*) {
  return {static_cast<const char*>(from), depth};
}

// sums = rows [R, depth] * panel. Depth: a positive multiple of 4.
template <bool weight_rows, int R>
MOEBIUS_INLINE void multiply8(Sums<R>& to, const Rows& rows, const Panel& panel, Index depth) {
  Sums<R> sums;
  each_cell<R>([&](auto i, auto j) { sums[i][j] = ivec{}; });
  const char *at = rows.at, *left = panel.left, *right = panel.right;
  const Index stride = rows.stride, step = panel.step;
  const Index three = 3 * stride, five = 5 * stride, seven = 7 * stride, nine = 9 * stride, eleven = 11 * stride,
             thirteen = 13 * stride;
  Index k = 0;
  do {  // at least once, so that no sum is ever in memory
    const ivec first = load_bytes(left), second = load_bytes(right);
    const auto row = [&](auto index, Index offset) {
      constexpr int i = decltype(index)::value;
      if constexpr (i < R) {
        const ivec four = splat_bytes(at + offset);
        sums[i][0] = weight_rows ? add_products(sums[i][0], first, four) : add_products(sums[i][0], four, first);
        sums[i][1] = weight_rows ? add_products(sums[i][1], second, four) : add_products(sums[i][1], four, second);
      }
    };
    row(std::integral_constant<int, 0>{}, 0);
    row(std::integral_constant<int, 1>{}, stride);
    row(std::integral_constant<int, 2>{}, 2 * stride);
    row(std::integral_constant<int, 3>{}, three);
    row(std::integral_constant<int, 4>{}, 4 * stride);
    row(std::integral_constant<int, 5>{}, five);
    row(std::integral_constant<int, 6>{}, 2 * three);
    row(std::integral_constant<int, 7>{}, seven);
    row(std::integral_constant<int, 8>{}, 8 * stride);
    row(std::integral_constant<int, 9>{}, nine);
    row(std::integral_constant<int, 10>{}, 2 * five);
    row(std::integral_constant<int, 11>{}, eleven);
    row(std::integral_constant<int, 12>{}, 4 * three);
    row(std::integral_constant<int, 13>{}, thirteen);
    k += 4, at += 4, left += step, right += step;
  } while (k < depth);
  each_cell<R>([&](auto i, auto j) { to[i][j] = sums[i][j]; });
}

}  // namespace MOEBIUS_VARIANT
