// Vectors by the compiler's own extension, so that one source serves every instruction set. Each variant is compiled
// from the same files with other flags and another namespace (MOEBIUS_VARIANT).
#pragma once

#include <cstring>

#include "work.h"

// MOEBIUS_NEON, where it is defined: 1 for the baseline of AArch64, 2 with its dot products, 3 with its INT8 matrix products.
#if defined(MOEBIUS_NEON)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <immintrin.h>
#endif

// For inner loops that need every register: in a function of their own, nothing else is spilled into them.
#define MOEBIUS_NOINLINE __attribute__((noinline))

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

inline vec load(const float* from) {
  vec value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// The first `count` lanes, the others zero.
inline vec load(const float* from, int count) {
  if (count >= kLanes) return load(from);
  vec value = {};
  std::memcpy(&value, from, count * sizeof(float));
  return value;
}

inline void store(float* to, vec value) { std::memcpy(to, &value, sizeof value); }

// The first `count` lanes.
inline void store(float* to, vec value, int count) {
  if (count >= kLanes) return store(to, value);
  std::memcpy(to, &value, count * sizeof(float));
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

// e^x with an error of at most two units in the last place: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial in r (coefficients of the
// Cephes library's expf), and n added to the exponent.
inline vec exponential(vec x) {
  const vec low = splat(-87.0f), high = splat(88.0f), magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to integers
  x = x < low ? low : x;
  x = x > high ? high : x;
  const vec n = (x * splat(1.44269504088896341f) + magic) - magic;
  const vec r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  vec p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.0f);
#if MOEBIUS_LANES == 16
  return vec(_mm512_maskz_scalef_ps(0xffff, __m512(p), __m512(n)));
#else
  const ivec exponent = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec scale;
  std::memcpy(&scale, &exponent, sizeof scale);
  return p * scale;
#endif
}

// 1 / x: the instruction's estimate and a Newton step, where there is one, to two units in the last place.
inline vec reciprocal(vec x) {
#if MOEBIUS_LANES == 16
  const vec estimate = vec(_mm512_maskz_rcp14_ps(0xffff, __m512(x)));
  return estimate * (splat(2.0f) - x * estimate);
#elif defined(MOEBIUS_NEON)
  float32x4_t estimate = vrecpeq_f32(float32x4_t(x));  // 8 bits, which each step doubles
  estimate = vmulq_f32(estimate, vrecpsq_f32(float32x4_t(x), estimate));
  return vec(vmulq_f32(estimate, vrecpsq_f32(float32x4_t(x), estimate)));
#else
  return splat(1.0f) / x;
#endif
}

inline vec silu(vec x) { return x * reciprocal(splat(1.0f) + exponential(-x)); }

inline vec relu(vec x) {
  const vec zero = splat(0.0f);
  return x > zero ? x : zero;
}

}  // namespace MOEBIUS_VARIANT
