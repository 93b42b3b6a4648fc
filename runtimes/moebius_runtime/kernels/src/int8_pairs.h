// Operands of INT8 matmul widened to int16: two values of depth in a 32-bit lane, for instructions that add the two
// products of int16 values in 32 bits (pmaddwd), which cannot overflow. Those for bytes (vpmaddubsw) saturate at 16 bits.
//
// Widening costs more than multiplying, so rows and panels are widened once for many tiles. Of four bytes in a lane the
// first and the third become one lane, the second and the fourth another one: shifts and masks, no shuffles.
#pragma once

#include "int8.h"

namespace MOEBIUS_VARIANT {

constexpr Index kUnit = 1;  // rows that a block starts at a multiple of

typedef short shorts __attribute__((vector_size(kLanes * sizeof(int))));

// Bytes 0 and 2, and 1 and 3, of every lane as int16.
template <bool with_sign>
inline ivec evens(ivec x) {
  return with_sign ? ivec((shorts(x) << 8) >> 8) : x & 0x00ff00ff;
}
template <bool with_sign>
inline ivec odds(ivec x) {
  return with_sign ? ivec(shorts(x) >> 8) : (x >> 8) & 0x00ff00ff;
}

// Per lane: sum + a[0] b[0] + a[1] b[1] of int16 values. With AVX as an assembler's two instructions: 12 sums of a tile,
// two vectors of the panel, one of a row and one product fill 16 registers, which compilers spill from when they reorder.
inline ivec add_pairs(ivec sum, ivec a, ivec b) {
#if defined(__AVX2__)
  ivec products;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+v"(sum), "=&v"(products) : "v"(b), "v"(a));
  return sum;
#elif defined(__SSE2__)
  return sum + ivec(_mm_madd_epi16(__m128i(a), __m128i(b)));
#else
  return sum + ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}

// Bytes of a picture's panel, and of what the conversions need.
inline Index panel_bytes(Index depth) { return 2 * depth * kWide; }
inline Index columns_bytes(Index depth) { return panel_bytes(depth); }
template <bool weights>
inline Index rows_bytes(Index count, Index depth) {
  return 2 * count * depth;
}

// A panel is [depth / 4][even, odd][kWide] lanes.
template <bool with_sign>
inline void put_vector(std::uint8_t* panel, Index group, int vector, ivec four) {
  std::uint8_t* to = panel + (group * 2 * kVectors + vector) * Index(sizeof(ivec));
  store_ints(to, evens<with_sign>(four));
  store_ints(to + kVectors * sizeof(ivec), odds<with_sign>(four));
}

// Four channels of kWide columns, uint8 [kWide][4], to a picture's panel.
inline void put_group(std::uint8_t* panel, Index, Index group, const void* columns) {
  for (int j = 0; j < kVectors; ++j)
    put_vector<false>(panel, group, j, load_bytes(static_cast<const char*>(columns) + j * sizeof(ivec)));
}

inline Panel panel_of(const std::uint8_t* panel, Index) {
  const char* at = reinterpret_cast<const char*>(panel);
  return {at, at + sizeof(ivec), kVectors * sizeof(ivec)};
}

// The panel of columns [column, column + kWide) of packed weights.
inline Panel columns_of(const std::int8_t* weight, Index depth, Index outputs, Index column, std::uint8_t* panel) {
  const std::int8_t *left = packed_column(weight, depth, column),
                    *right = packed_column(weight, depth, second_column(outputs, column));
  for (Index group = 0; group < depth / 4; ++group) {
    put_vector<true>(panel, group, 0, load_bytes(left + group * 4 * kPacked));
    put_vector<true>(panel, group, 1, load_bytes(right + group * 4 * kPacked));
  }
  return panel_of(panel, depth);
}

// Rows of int8 weights or uint8 activations: of each row first its even lanes [depth / 4], then its odd ones.
template <bool weights>
inline Rows rows_of(const void* from, Index count, Index depth, std::uint8_t* to) {
  for (Index r = 0; r < count; ++r) {
    const char* row = static_cast<const char*>(from) + r * depth;
    std::uint8_t* even = to + 2 * r * depth;
    Index k = 0;
    for (; k + Index(sizeof(ivec)) <= depth; k += sizeof(ivec)) {
      const ivec four = load_bytes(row + k);
      store_ints(even + k, evens<weights>(four));
      store_ints(even + depth + k, odds<weights>(four));
    }
    if (k == depth) continue;
    ivec four = {};
    std::memcpy(&four, row + k, depth - k);
    const ivec first = evens<weights>(four), second = odds<weights>(four);
    std::memcpy(even + k, &first, depth - k);
    std::memcpy(even + depth + k, &second, depth - k);
  }
  return {reinterpret_cast<const char*>(to), 2 * depth};
}

// sums = rows [R, depth] * panel. Depth: a multiple of 4.
template <bool weight_rows, int R>
MOEBIUS_NOINLINE void multiply8(Sums<R>& to, const Rows& rows, const Panel& panel, Index depth) {
  Sums<R> sums;
  each_cell<R>([&](auto i, auto j) { sums[i][j] = ivec{}; });
  const char *even = rows.at, *odd = rows.at + depth, *column = panel.left;
  const Index stride = rows.stride;
  const Index three = 3 * stride, five = 5 * stride, seven = 7 * stride, nine = 9 * stride, eleven = 11 * stride,
             thirteen = 13 * stride;
  const auto add = [&](const char* at, const char* pair) {
    const ivec first = load_bytes(pair), second = load_bytes(pair + sizeof(ivec));
    const auto row = [&](auto index, Index offset) {
      constexpr int i = decltype(index)::value;
      if constexpr (i < R) {
        const ivec two = splat_bytes(at + offset);
        sums[i][0] = add_pairs(sums[i][0], first, two);
        sums[i][1] = add_pairs(sums[i][1], second, two);
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
  };
  for (Index k = 0; k < depth; k += 4, even += 4, odd += 4, column += 4 * sizeof(ivec)) {
    add(even, column);
    add(odd, column + 2 * sizeof(ivec));
  }
  each_cell<R>([&](auto i, auto j) { to[i][j] = sums[i][j]; });
}

}  // namespace MOEBIUS_VARIANT
