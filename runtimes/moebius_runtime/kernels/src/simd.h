// Vectors by the compiler's own extension, so that one source serves every instruction set. Each variant is compiled
// from the same files with other flags and another namespace (MOEBIUS_VARIANT).
#pragma once

#include <cstring>
#include <type_traits>
#include <utility>

#include "work.h"

// MOEBIUS_NEON, where it is defined: 1 for the baseline of AArch64, 2 with its dot products, 3 with its INT8 matrix products.
#if defined(MOEBIUS_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

// For inner loops that need every register: in a function of their own, nothing else is spilled into them.
#define MOEBIUS_NOINLINE __attribute__((noinline))
#define MOEBIUS_INLINE inline __attribute__((always_inline))

namespace MOEBIUS_VARIANT {

constexpr int kLanes = MOEBIUS_LANES;           // floats in a register
constexpr int kVectors = 2;                     // registers that a panel is wide
constexpr int kWide = kLanes * kVectors;        // columns of a panel
#if MOEBIUS_LANES == 16
constexpr int kRows = 14;                       // rows of a tile: what 32 registers hold beside a panel's row
#elif defined(MOEBIUS_NEON)
constexpr int kRows = 8;                        // the same, with a register of each row's values
#else
constexpr int kRows = 6;                        // of 16 registers
#endif

typedef float vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int ivec __attribute__((vector_size(kLanes * sizeof(int))));

template <int... I, class F>
MOEBIUS_INLINE void unrolled(std::integer_sequence<int, I...>, F&& f) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(i, j) for the R * kVectors vectors of a tile, with constants: only then do compilers keep the tile in registers.
template <int R, class F>
MOEBIUS_INLINE void each_cell(F&& f) {
  unrolled(std::make_integer_sequence<int, R * kVectors>{}, [&](auto cell) {
    constexpr int at = decltype(cell)::value;
    f(std::integral_constant<int, at / kVectors>{}, std::integral_constant<int, at % kVectors>{});
  });
}

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The first `count` lanes, the others zero.
inline vec load(const float* from, int count) {
  if (count >= kLanes) return load(from);
#if MOEBIUS_LANES == 16
  return vec(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#endif
  vec value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

// The first `count` lanes.
inline void store(float* to, vec value, int count) {
  if (count >= kLanes) return store(to, value);
#if MOEBIUS_LANES == 16
  return _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(value));
#endif
  std::memcpy(to, &value, count * sizeof(float));
}

// a > b ? a : b and a < b ? a : b: b where one is NaN. Compilers make two instructions of the latter.
inline vec larger(vec a, vec b) {
#if MOEBIUS_LANES == 16
  return vec(_mm512_max_ps(__m512(a), __m512(b)));
#elif MOEBIUS_LANES == 8
  return vec(_mm256_max_ps(__m256(a), __m256(b)));
#else
  return a > b ? a : b;
#endif
}

inline vec smaller(vec a, vec b) {
#if MOEBIUS_LANES == 16
  return vec(_mm512_min_ps(__m512(a), __m512(b)));
#elif MOEBIUS_LANES == 8
  return vec(_mm256_min_ps(__m256(a), __m256(b)));
#else
  return a < b ? a : b;
#endif
}

inline vec splat(float s) {
#if MOEBIUS_LANES == 16
  return vec{s, s, s, s, s, s, s, s, s, s, s, s, s, s, s, s};
#elif MOEBIUS_LANES == 8
  return vec{s, s, s, s, s, s, s, s};
#else
  return vec{s, s, s, s};
#endif
}

template <int... I>
inline vec shuffle(vec a, vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, ivec{I...});
#endif
}

using Lanes = std::make_integer_sequence<int, kLanes>;

template <int... I>
inline void part(vec& a, vec& b, std::integer_sequence<int, I...>) {  // even places, odd places
  const vec even = shuffle(a, b, std::integer_sequence<int, 2 * I...>{});
  b = shuffle(a, b, std::integer_sequence<int, 2 * I + 1 ...>{});
  a = even;
}

template <int... I>
inline void join(vec& a, vec& b, std::integer_sequence<int, I...>) {  // the inverse
  const vec low = shuffle(a, b, std::integer_sequence<int, I / 2 + I % 2 * kLanes...>{});
  b = shuffle(a, b, std::integer_sequence<int, kLanes / 2 + I / 2 + I % 2 * kLanes...>{});
  a = low;
}

inline float sum(vec value) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += value[i];
  return total;
}

// The sum of f over [0, count): `many(i)` gives the terms i .. i + kLanes, `one(i)` a single one.
template <class Many, class One>
inline float total(Index count, Many many, One one) {
  vec sums = splat(0);
  Index i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += many(i);
  float result = sum(sums);
  for (; i < count; ++i) result += one(i);
  return result;
}

// 2^x for x <= 127: x = n + r with |r| <= 1/2, a polynomial in r of least relative error (8e-8, found by Lawson's
// iteration), and n added to the exponent. With its rounding the error is below two units in the last place.
inline vec power_of_two(vec x, vec n) {
  const vec r = x - n;
  vec p = splat(1.3276471960e-3f);
  p = p * r + splat(9.6755415026e-3f);
  p = p * r + splat(5.5507132751e-2f);
  p = p * r + splat(2.4022119721e-1f);
  p = p * r + splat(6.9314696706e-1f);
  p = p * r + splat(1.0f);
#if MOEBIUS_LANES == 16
  return vec(_mm512_maskz_scalef_ps(0xffff, __m512(p), __m512(n)));
#else
  const ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
#endif
}

// 1 / x for x >= 1: the instruction's estimate and a Newton step, where there is one, to two units in the last place.
inline vec reciprocal(vec x) {
#if MOEBIUS_LANES == 16
  const vec estimate = vec(_mm512_maskz_rcp14_ps(0xffff, __m512(x)));
  return estimate * (splat(2.0f) - x * estimate);
#elif MOEBIUS_LANES == 8
  const vec estimate = vec(_mm256_rcp_ps(__m256(x)));  // 12 bits
  return estimate * (splat(2.0f) - x * estimate);
#elif defined(MOEBIUS_NEON)
  float32x4_t estimate = vrecpeq_f32(float32x4_t(x));  // 8 bits, which each step doubles
  estimate = vmulq_f32(estimate, vrecpsq_f32(float32x4_t(x), estimate));
  return vec(vmulq_f32(estimate, vrecpsq_f32(float32x4_t(x), estimate)));
#else
  return splat(1.0f) / x;
#endif
}

// x / (1 + e^-x). The relative error grows with |x| by 4e-8, from the rounding of x log2(e).
inline vec silu(vec x) {
  const vec low = splat(-87.0f), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to integers
  const vec to_log2 = splat(-1.44269504088896341f);
  vec bounded = larger(low, x);  // 1 + e^-x stays finite
#if MOEBIUS_LANES != 16
  bounded = smaller(-low, bounded);  // and the exponent within its bits
#endif
  const vec exponent = bounded * to_log2;
  return x * reciprocal(splat(1.0f) + power_of_two(exponent, (exponent + magic) - magic));
}

inline vec relu(vec x) {
  return larger(x, splat(0.0f));
}

}  // namespace MOEBIUS_VARIANT
