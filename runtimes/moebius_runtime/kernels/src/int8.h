// INT8 matmul: uint8 activations times int8 weights, accumulated in int32.
//
// An activation x of channel c is q = round(x * inverse[c] + zero[c]), at most 255 and at least 0. An output
// is sum * scale + offset; the export folds bias and zero points into the offset. Four channels of a column make
// one 32-bit lane, so that the loop is that of float matmul (gemm.h) with four times the depth. Its two operands are
// - rows, from which four bytes at a time go to every lane, `stride` bytes apart,
// - a panel of kWide columns: four bytes per lane; `step` bytes from four channels to the next.
// Weights are rows where pictures are the panels, and panels where the rows are tokens.
#pragma once

#include <cstdint>

#include "gemm.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace MOEBIUS_VARIANT {

constexpr long kPacked = 16;  // outputs in a panel of packed weights: [outputs / 16][depth / 4][16][4], in every variant

template <int R>
using Sums = ivec[R][kVectors];

typedef unsigned char bytes __attribute__((vector_size(kLanes)));

inline ivec splat_bytes(const void* from) {
  int four;
  std::memcpy(&four, from, sizeof four);
  return ivec{} + four;
}

inline ivec load_bytes(const void* from) {
  ivec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Per lane: sum + u[0] s[0] + u[1] s[1] + u[2] s[2] + u[3] s[3], u uint8 and s int8.
inline ivec add_products(ivec sum, ivec u, ivec s) {
#if MOEBIUS_LANES == 16 && defined(__AVX512VNNI__)
  return ivec(_mm512_dpbusd_epi32(__m512i(sum), __m512i(u), __m512i(s)));
#elif MOEBIUS_LANES == 16
  // The instruction for pairs of 8-bit values saturates at 16 bits; the one for pairs of 16-bit values does not.
  const __m512i even = _mm512_madd_epi16(_mm512_and_si512(__m512i(u), _mm512_set1_epi16(255)),
                                         _mm512_srai_epi16(_mm512_slli_epi16(__m512i(s), 8), 8));
  const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(__m512i(u), 8), _mm512_srai_epi16(__m512i(s), 8));
  return sum + ivec(even) + ivec(odd);
#elif MOEBIUS_LANES == 8
  const __m256i even = _mm256_madd_epi16(_mm256_and_si256(__m256i(u), _mm256_set1_epi16(255)),
                                         _mm256_srai_epi16(_mm256_slli_epi16(__m256i(s), 8), 8));
  const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(__m256i(u), 8), _mm256_srai_epi16(__m256i(s), 8));
  return sum + ivec(even) + ivec(odd);
#else
  for (int i = 0; i < 4; ++i) sum += ((u >> 8 * i) & 255) * ((s << (24 - 8 * i)) >> 24);
  return sum;
#endif
}

// sums += rows [R, depth] * the panel whose first vector is at `left`, the second at `right`. Depth: a multiple of 4.
template <bool SignedRows, int R>
inline void multiply8(Sums<R>& to, const void* rows, long stride, const void* left_, const void* right_, long step,
                      long depth) {
  Sums<R> sums;
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) sums[i][j] = to[i][j];
  const char *at = static_cast<const char*>(rows), *left = static_cast<const char*>(left_),
             *right = static_cast<const char*>(right_);
  const long three = 3 * stride, five = 5 * stride, seven = 7 * stride, nine = 9 * stride, eleven = 11 * stride,
             thirteen = 13 * stride;
  for (long k = 0; k < depth; k += 4, at += 4, left += step, right += step) {
    const ivec first = load_bytes(left), second = load_bytes(right);
    const auto row = [&](auto index, long offset) {
      constexpr int i = decltype(index)::value;
      if constexpr (i < R) {
        const ivec four = splat_bytes(at + offset);
        sums[i][0] = SignedRows ? add_products(sums[i][0], first, four) : add_products(sums[i][0], four, first);
        sums[i][1] = SignedRows ? add_products(sums[i][1], second, four) : add_products(sums[i][1], four, second);
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
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) to[i][j] = sums[i][j];
}

inline vec as_floats(ivec value) { return __builtin_convertvector(value, vec); }

// round(x * inverse + zero) to the nearest, ties to even, within 0 .. 255.
inline ivec quantise(vec x, vec inverse, vec zero) {
  const vec low = splat(0.0f), high = splat(255.0f), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to integers
  x = x * inverse + zero;
  x = x > low ? x : low;  // NaN becomes 0
  x = x < high ? x : high;
  const vec shifted = x + magic;
  return load_bytes(&shifted) - 0x4B400000;
}

inline void store_bytes(std::uint8_t* to, ivec value, int count) {
  const bytes narrow = __builtin_convertvector(value, bytes);
  std::memcpy(to, &narrow, count);
}

// Scratch memory for INT8 values.
class Bytes {
 public:
  explicit Bytes(long count) : floats_((count + 3) / 4) {}
  operator std::uint8_t*() const { return reinterpret_cast<std::uint8_t*>(static_cast<float*>(floats_)); }

 private:
  moebius::Scratch floats_;
};

// Prefetches what the end of a tile will touch during its matmul: rows of a picture are a page or more apart, which the
// hardware prefetcher does not predict. `to_write`: 1 where they will be written, else 0.
template <int R, int to_write>
inline void fetch(const float* first, long row_stride) {
#if defined(__GNUC__)
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) __builtin_prefetch(first + i * row_stride + j * kLanes, to_write);
#endif
}

// f(integral_constant R, first row) for the rows [first, last) in blocks of at most kRows of about equal size.
template <class F>
inline void even_blocks(long first, long last, F&& f) {
  const long rows = last - first, count = (rows + kRows - 1) / kRows;
  for (long i = 0; i < count; ++i) {
    const long from = first + rows * i / count, to = first + rows * (i + 1) / count;
    with_rows(to - from, [&](auto size) { f(size, from); });
  }
}

// Where the panel of columns [column, column + kWide) of packed weights is. Beyond the last it is the first half again, to stay in bounds.
struct Columns {
  const std::int8_t *left, *right;

  Columns(const std::int8_t* weight, long depth, long outputs, long column) {
    const auto place = [&](long c) { return weight + c / kPacked * depth * kPacked + c % kPacked * 4; };
    left = place(column);
    const long other = column + kLanes;
    right = other < (outputs + kPacked - 1) / kPacked * kPacked ? place(other) : left;
  }
};

}  // namespace MOEBIUS_VARIANT
