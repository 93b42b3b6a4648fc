// INT8 matmul: uint8 activations times int8 weights, accumulated in int32.
//
// An activation x of channel c is q = round(x * inverse[c] + zero[c]), at most 255 and at least 0. An output
// is sum * scale + offset; the export folds bias and zero points into the offset. The loop is that of float matmul
// (gemm.h): its operands are rows, whose values go to every lane, and a panel of kWide columns. Weights are rows where
// pictures are the panels, and panels where the rows are tokens. In memory
// - rows are bytes [rows, depth],
// - packed weights are [outputs / 16][depth / 4][16][4] in every variant, their last columns zero,
// - a picture's columns are groups of four channels [depth / 4][columns][4].
// How a variant multiplies decides what it reads, its operand format. `rows_of` and `columns_of` convert to it, a block
// at a time, and `put_group` writes it; each format is in a file of its own with the same functions:
// - int8_dot.h: instructions for sums of four products of uint8 and int8 (VNNI),
// - int8_pairs.h: for sums of two products of int16 (SSE2, AVX2, AVX-512 without VNNI), and any other processor,
// - int8_neon.h: Arm's products of int16, dot products of int8, and matrix products of uint8 and int8.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace MOEBIUS_VARIANT {

constexpr Index kPacked = 16;  // outputs in a panel of packed weights

template <int R>
using Sums = ivec[R][kVectors];

typedef unsigned char bytes __attribute__((vector_size(kLanes)));

// Rows in the operand format; `stride` bytes apart.
struct Rows {
  const char* at;
  Index stride;
  const int* start = nullptr;  // of a format with shifted activations: what each sum begins with

  Rows operator+(Index rows) const;  // without the first ones, a multiple of kUnit
};

// A panel in the operand format: its two vectors, and the bytes from one part of the depth to the next.
struct Panel {
  const char *left, *right;
  Index step;
  const int* start = nullptr;
};

inline ivec load_bytes(const void* from) {
  ivec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store_ints(void* to, ivec value) { std::memcpy(to, &value, sizeof value); }

// The first `count` lanes.
inline void store_ints(void* to, ivec value, int count) {
  if (count >= kLanes) return store_ints(to, value);
  std::memcpy(to, &value, count * sizeof(int));
}

inline ivec splat_bytes(const void* from) {
  int four;
  std::memcpy(&four, from, sizeof four);
  return ivec{} + four;
}

// Where packed weights of a column are.
inline const std::int8_t* packed_column(const std::int8_t* weight, Index depth, Index column) {
  return weight + column / kPacked * depth * kPacked + column % kPacked * 4;
}

// The first column of a panel's second vector. Beyond the last packed one it is the first vector's again, to stay in bounds.
inline Index second_column(Index outputs, Index column) {
  return column + kLanes < (outputs + kPacked - 1) / kPacked * kPacked ? column + kLanes : column;
}

}  // namespace MOEBIUS_VARIANT

#if defined(MOEBIUS_NEON)
#include "int8_neon.h"
#elif MOEBIUS_LANES == 16 && defined(__AVX512VNNI__)
#include "int8_dot.h"
#elif MOEBIUS_LANES == 8 && (defined(__AVXVNNI__) || (defined(__AVX512VNNI__) && defined(__AVX512VL__)))
#include "int8_dot.h"
#else
#include "int8_pairs.h"
#endif

namespace MOEBIUS_VARIANT {

inline Rows Rows::operator+(Index rows) const {
  return {at + rows / kUnit * stride, stride, start == nullptr ? nullptr : start + rows};
}

inline vec as_floats(ivec value) { return __builtin_convertvector(value, vec); }

// round(x * inverse + zero) to the nearest, ties to even, within 0 .. 255.
inline ivec quantise(vec x, vec inverse, vec zero) {
  const vec low = splat(0.0f), high = splat(255.0f), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to integers
  const vec bounded = smaller(larger(x * inverse + zero, low), high);  // NaN becomes 0
  const vec shifted = bounded + magic;
  return load_bytes(&shifted) - 0x4B400000;
}

inline bytes narrowed(ivec value) {
#if MOEBIUS_LANES == 8 && defined(__AVX2__)
  // The lowest byte of every lane of a half, then the four bytes of both. Compilers go through memory or many shuffles.
  const __m256i order = _mm256_set1_epi32(0x0c080400);
  const __m256i fours = _mm256_shuffle_epi8(__m256i(value), order);
  const __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
  bytes narrow;
  std::memcpy(&narrow, &both, sizeof narrow);
  return narrow;
#else
  return __builtin_convertvector(value, bytes);
#endif
}

inline void store_bytes(std::uint8_t* to, ivec value) {
  const bytes narrow = narrowed(value);
  std::memcpy(to, &narrow, sizeof narrow);
}

// The first `count` lanes.
inline void store_bytes(std::uint8_t* to, ivec value, int count) {
  if (count >= kLanes) return store_bytes(to, value);
  const bytes narrow = narrowed(value);
  std::memcpy(to, &narrow, count);
}

// Scratch memory for INT8 values.
class Bytes {
 public:
  explicit Bytes(Index count) : floats_((count + 3) / 4) {}
  operator std::uint8_t*() const { return reinterpret_cast<std::uint8_t*>(static_cast<float*>(floats_)); }

 private:
  moebius::Scratch floats_;
};

// Prefetches what the end of a tile will touch during its matmul: rows of a picture are a page or more apart, which the
// hardware prefetcher does not predict. `to_write`: 1 where they will be written, else 0.
template <int R, int to_write>
inline void fetch(const float* first, Index row_stride) {
#if defined(__GNUC__)
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) __builtin_prefetch(first + i * row_stride + j * kLanes, to_write);
#endif
}

// f(integral_constant R, first row) for the rows [0, rows) in blocks of at most kRows of about equal size.
template <class F>
inline void even_blocks(Index rows, F&& f) {
  const Index units = (rows + kUnit - 1) / kUnit, count = (rows + kRows - 1) / kRows;
  for (Index i = 0; i < count; ++i) {
    const Index from = units * i / count * kUnit, to = units * (i + 1) / count * kUnit;
    with_rows((to < rows ? to : rows) - from, [&](auto size) { f(size, from); });
  }
}

}  // namespace MOEBIUS_VARIANT
