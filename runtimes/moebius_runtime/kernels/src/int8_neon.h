// Operands of INT8 matmul for Arm, by what the processor has:
// 1. baseline: values of int16, whose products are added in int32 (smlal);
// 2. dot products of four int8 values (sdot). Activations are shifted by 128, which adds 128 times the sum of the weights;
// 3. products of two rows of eight uint8 values by two columns of eight int8 values (usmmla).
// Several values of a row are loaded at a time in forms 1 and 2: an instruction takes its factor from any lane.
#pragma once

#include "int8.h"

namespace MOEBIUS_VARIANT {

static_assert(kLanes == 4 && kWide == 8, "the conversions are written for two registers of four lanes");

#if MOEBIUS_NEON == 1

constexpr Index kUnit = 1;  // rows that a block starts at a multiple of

// Bytes of a picture's panel, and of what the conversions need.
inline Index panel_bytes(Index depth) { return 2 * depth * kWide; }
inline Index columns_bytes(Index depth) { return panel_bytes(depth); }
template <bool weights>
inline Index rows_bytes(Index count, Index depth) {
  return 2 * count * depth;
}

// Eight bytes as int16.
template <bool weights>
inline int16x8_t widened(uint8x8_t x) {
  return weights ? vmovl_s8(vreinterpret_s8_u8(x)) : vreinterpretq_s16_u16(vmovl_u8(x));
}

// Four channels of kWide columns, [kWide][4] bytes, to a panel [depth][kWide].
template <bool weights>
inline void put_columns(std::uint8_t* panel, Index group, const void* columns) {
  const uint8x8x4_t channels = vld4_u8(static_cast<const std::uint8_t*>(columns));
  std::int16_t* to = reinterpret_cast<std::int16_t*>(panel) + group * 4 * kWide;
  for (int i = 0; i < 4; ++i) vst1q_s16(to + i * kWide, widened<weights>(channels.val[i]));
}

inline void put_group(std::uint8_t* panel, Index, Index group, const void* columns) {
  put_columns<false>(panel, group, columns);
}

inline Panel panel_of(const std::uint8_t* panel, Index) {
  const char* at = reinterpret_cast<const char*>(panel);
  return {at, at + kLanes * 2, kWide * 2};
}

// The panel of columns [column, column + kWide) of packed weights.
inline Panel columns_of(const std::int8_t* weight, Index depth, Index, Index column, std::uint8_t* panel) {
  const std::int8_t* from = packed_column(weight, depth, column);
  for (Index group = 0; group < depth / 4; ++group) put_columns<true>(panel, group, from + group * 4 * kPacked);
  return panel_of(panel, depth);
}

// Rows of int8 weights or uint8 activations.
template <bool weights>
inline Rows rows_of(const void* from, Index count, Index depth, std::uint8_t* to) {
  const std::uint8_t* row = static_cast<const std::uint8_t*>(from);
  std::int16_t* wide = reinterpret_cast<std::int16_t*>(to);
  const Index size = count * depth;
  Index k = 0;
  for (; k + 8 <= size; k += 8) vst1q_s16(wide + k, widened<weights>(vld1_u8(row + k)));
  for (; k < size; ++k) wide[k] = weights ? std::int16_t(std::int8_t(row[k])) : std::int16_t(row[k]);
  return {reinterpret_cast<const char*>(to), 2 * depth};
}

// sums[i] += row i's value of lane `Lane` * the panel's eight columns.
template <int Lane, int R>
inline void add_lane(int32x4_t (&sums)[R][kVectors], const int16x4_t (&rows)[R], const std::int16_t* panel) {
  const int16x8_t columns = vld1q_s16(panel);
  for (int i = 0; i < R; ++i) {
    sums[i][0] = vmlal_lane_s16(sums[i][0], vget_low_s16(columns), rows[i], Lane);
    sums[i][1] = vmlal_high_lane_s16(sums[i][1], columns, rows[i], Lane);
  }
}

// sums = rows [R, depth] * panel. Depth: a multiple of 4.
template <bool weight_rows, int R>
MOEBIUS_NOINLINE void multiply8(Sums<R>& to, const Rows& rows, const Panel& panel, Index depth) {
  int32x4_t sums[R][kVectors];
  for (int i = 0; i < R; ++i) sums[i][0] = sums[i][1] = vdupq_n_s32(0);
  const std::int16_t* columns = reinterpret_cast<const std::int16_t*>(panel.left);
  const char* at = rows.at;
  for (Index k = 0; k < depth; k += 4, at += 8, columns += 4 * kWide) {
    int16x4_t values[R];
    for (int i = 0; i < R; ++i) values[i] = vld1_s16(reinterpret_cast<const std::int16_t*>(at + i * rows.stride));
    add_lane<0, R>(sums, values, columns);
    add_lane<1, R>(sums, values, columns + kWide);
    add_lane<2, R>(sums, values, columns + 2 * kWide);
    add_lane<3, R>(sums, values, columns + 3 * kWide);
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) to[i][j] = ivec(sums[i][j]);
}

#elif MOEBIUS_NEON == 2

constexpr Index kUnit = 1;

inline Index panel_bytes(Index depth) { return depth * kWide; }
inline Index columns_bytes(Index) { return kWide * sizeof(int); }
template <bool weights>
inline Index rows_bytes(Index count, Index depth) {
  return weights ? count * Index(sizeof(int)) : count * depth;
}

// Four channels of kWide columns, uint8 [kWide][4], to a picture's panel [depth / 4][kWide][4], less 128.
inline void put_group(std::uint8_t* panel, Index, Index group, const void* columns) {
  const std::uint8_t* from = static_cast<const std::uint8_t*>(columns);
  std::uint8_t* to = panel + group * 4 * kWide;
  for (int j = 0; j < kVectors; ++j) vst1q_u8(to + 16 * j, veorq_u8(vld1q_u8(from + 16 * j), vdupq_n_u8(128)));
}

inline Panel panel_of(const std::uint8_t* panel, Index) {
  const char* at = reinterpret_cast<const char*>(panel);
  return {at, at + 16, 4 * kWide};
}

// The panel of columns [column, column + kWide) of packed weights, with 128 times the sum of each column.
inline Panel columns_of(const std::int8_t* weight, Index depth, Index, Index column, std::uint8_t* scratch) {
  const std::int8_t* from = packed_column(weight, depth, column);
  int32x4_t sums[kVectors] = {vdupq_n_s32(0), vdupq_n_s32(0)};
  const int8x16_t ones = vdupq_n_s8(1);
  for (Index group = 0; group < depth / 4; ++group)
    for (int j = 0; j < kVectors; ++j)
      sums[j] = vdotq_s32(sums[j], vld1q_s8(from + group * 4 * kPacked + 16 * j), ones);
  int* start = reinterpret_cast<int*>(scratch);
  for (int j = 0; j < kVectors; ++j) vst1q_s32(start + kLanes * j, vshlq_n_s32(sums[j], 7));
  const char* at = reinterpret_cast<const char*>(from);
  return {at, at + 16, 4 * kPacked, start};
}

// Rows of uint8 activations less 128, or of int8 weights as they are, with 128 times the sum of each.
template <bool weights>
inline Rows rows_of(const void* from, Index count, Index depth, std::uint8_t* to) {
  const std::uint8_t* row = static_cast<const std::uint8_t*>(from);
  if constexpr (weights) {
    int* start = reinterpret_cast<int*>(to);
    for (Index r = 0; r < count; ++r, row += depth) {
      const std::int8_t* values = reinterpret_cast<const std::int8_t*>(row);
      int32x4_t sums = vdupq_n_s32(0);
      Index k = 0;
      for (; k + 16 <= depth; k += 16) sums = vdotq_s32(sums, vld1q_s8(values + k), vdupq_n_s8(1));
      int sum = vaddvq_s32(sums);
      for (; k < depth; ++k) sum += values[k];
      start[r] = 128 * sum;
    }
    return {static_cast<const char*>(from), depth, start};
  }
  const Index size = count * depth;
  Index k = 0;
  for (; k + 16 <= size; k += 16) vst1q_u8(to + k, veorq_u8(vld1q_u8(row + k), vdupq_n_u8(128)));
  for (; k < size; ++k) to[k] = row[k] ^ 128;
  return {reinterpret_cast<const char*>(to), depth};
}

// sums[i] += four values of row i in lane `Lane` * the panel's columns.
template <int Lane, int R>
inline void add_lane(int32x4_t (&sums)[R][kVectors], const int8x16_t (&rows)[R], const Panel& panel, Index group) {
  const int8x16_t left = vld1q_s8(reinterpret_cast<const std::int8_t*>(panel.left + group * panel.step)),
                  right = vld1q_s8(reinterpret_cast<const std::int8_t*>(panel.right + group * panel.step));
  for (int i = 0; i < R; ++i) {
    sums[i][0] = vdotq_laneq_s32(sums[i][0], left, rows[i], Lane);
    sums[i][1] = vdotq_laneq_s32(sums[i][1], right, rows[i], Lane);
  }
}

// sums = rows [R, depth] * panel. Depth: a multiple of 4.
template <bool weight_rows, int R>
MOEBIUS_NOINLINE void multiply8(Sums<R>& to, const Rows& rows, const Panel& panel, Index depth) {
  int32x4_t sums[R][kVectors];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j)
      sums[i][j] = weight_rows ? vdupq_n_s32(rows.start[i]) : vld1q_s32(panel.start + j * kLanes);
  const char* at = rows.at;
  int8x16_t values[R];
  Index group = 0;
  for (; group + 4 <= depth / 4; group += 4, at += 16) {
    for (int i = 0; i < R; ++i) values[i] = vld1q_s8(reinterpret_cast<const std::int8_t*>(at + i * rows.stride));
    add_lane<0, R>(sums, values, panel, group);
    add_lane<1, R>(sums, values, panel, group + 1);
    add_lane<2, R>(sums, values, panel, group + 2);
    add_lane<3, R>(sums, values, panel, group + 3);
  }
  for (; group < depth / 4; ++group, at += 4) {
    for (int i = 0; i < R; ++i) values[i] = int8x16_t(splat_bytes(at + i * rows.stride));
    add_lane<0, R>(sums, values, panel, group);
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) to[i][j] = ivec(sums[i][j]);
}

#else

constexpr Index kUnit = 2;  // two rows are in a register

inline Index eights(Index depth) { return (depth + 7) / 8; }  // of depth, the last filled up with zeros

inline Index panel_bytes(Index depth) { return eights(depth) * 8 * kWide; }
inline Index columns_bytes(Index depth) { return panel_bytes(depth); }
template <bool weights>
inline Index rows_bytes(Index count, Index depth) {
  return (count + 1) / 2 * eights(depth) * 16;
}

// Four channels of kWide columns, [kWide][4] bytes, to a panel [depth / 8][kWide][8].
inline void put_group(std::uint8_t* panel, Index depth, Index group, const void* columns) {
  const std::uint32_t* from = static_cast<const std::uint32_t*>(columns);
  std::uint32_t* to = reinterpret_cast<std::uint32_t*>(panel) + group / 2 * 2 * kWide + group % 2;
  for (Index t = 0; t < kWide; ++t) to[2 * t] = from[t];
  if (group % 2 == 0 && group == depth / 4 - 1)
    for (Index t = 0; t < kWide; ++t) to[2 * t + 1] = 0;
}

inline Panel panel_of(const std::uint8_t* panel, Index) {
  const char* at = reinterpret_cast<const char*>(panel);
  return {at, at + 8 * kLanes, 8 * kWide};
}

// The panel of columns [column, column + kWide) of packed weights.
inline Panel columns_of(const std::int8_t* weight, Index depth, Index, Index column, std::uint8_t* panel) {
  const std::int32_t* from = reinterpret_cast<const std::int32_t*>(packed_column(weight, depth, column));
  std::int32_t* to = reinterpret_cast<std::int32_t*>(panel);
  for (Index group = 0; group < depth / 4; group += 2, from += 2 * kPacked, to += 2 * kWide)
    for (int j = 0; j < kVectors; ++j) {
      const int32x4_t low = vld1q_s32(from + kLanes * j);
      const int32x4_t high = group + 1 < depth / 4 ? vld1q_s32(from + kPacked + kLanes * j) : vdupq_n_s32(0);
      vst1q_s32(to + 2 * kLanes * j, vzip1q_s32(low, high));
      vst1q_s32(to + 2 * kLanes * j + kLanes, vzip2q_s32(low, high));
    }
  return panel_of(panel, depth);
}

// Rows of int8 weights or uint8 activations: [rows / 2][depth / 8][2][8].
template <bool weights>
inline Rows rows_of(const void* from, Index count, Index depth, std::uint8_t* to) {
  const std::uint8_t* row = static_cast<const std::uint8_t*>(from);
  const Index stride = eights(depth) * 16;
  for (Index r = 0; r < count; r += 2, row += 2 * depth, to += stride) {
    const bool both = r + 1 < count;
    Index k = 0;
    for (; k + 8 <= depth; k += 8) {
      const uint8x8_t low = vld1_u8(row + k), high = both ? vld1_u8(row + depth + k) : vdup_n_u8(0);
      vst1q_u8(to + 2 * k, vcombine_u8(low, high));
    }
    if (k == depth) continue;
    std::memset(to + 2 * k, 0, 16);
    std::memcpy(to + 2 * k, row + k, depth - k);
    if (both) std::memcpy(to + 2 * k + 8, row + depth + k, depth - k);
  }
  return {reinterpret_cast<const char*>(to - (count + 1) / 2 * stride), stride};
}

// sums = rows [R, depth] * panel. Depth: a multiple of 4.
template <bool weight_rows, int R>
MOEBIUS_NOINLINE void multiply8(Sums<R>& to, const Rows& rows, const Panel& panel, Index depth) {
  constexpr int kPairs = (R + 1) / 2;
  int32x4_t sums[kPairs][4];  // of two rows and two columns: with weights as rows [column][row], else [row][column]
  for (int i = 0; i < kPairs; ++i)
    for (int j = 0; j < 4; ++j) sums[i][j] = vdupq_n_s32(0);
  const char *at = rows.at, *columns = panel.left;
  for (Index k = 0; k < depth; k += 8, at += 16, columns += 8 * kWide) {
    uint8x16_t values[kPairs];
    for (int i = 0; i < kPairs; ++i) values[i] = vld1q_u8(reinterpret_cast<const std::uint8_t*>(at + i * rows.stride));
    for (int j = 0; j < 4; ++j) {
      const uint8x16_t two = vld1q_u8(reinterpret_cast<const std::uint8_t*>(columns + 16 * j));
      for (int i = 0; i < kPairs; ++i)
        sums[i][j] = weight_rows ? vusmmlaq_s32(sums[i][j], two, vreinterpretq_s8_u8(values[i]))
                                 : vusmmlaq_s32(sums[i][j], values[i], vreinterpretq_s8_u8(two));
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) {
      const int32x4_t left = sums[i / 2][2 * j], right = sums[i / 2][2 * j + 1];
      const int64x2_t l = vreinterpretq_s64_s32(left), r = vreinterpretq_s64_s32(right);
      if (weight_rows)
        to[i][j] = ivec(i % 2 ? vuzp2q_s32(left, right) : vuzp1q_s32(left, right));
      else
        to[i][j] = ivec(i % 2 ? vzip2q_s64(l, r) : vzip1q_s64(l, r));
    }
}

#endif

}  // namespace MOEBIUS_VARIANT
