// Matmul: rows of weights, unpacked as in the file, times columns packed in panels.
//
// A panel holds kWide columns of a matrix [depth, columns], row after row: element (c, t) of a matrix of `depth` rows is
// at ((t / kWide) * depth + c) * kWide + t % kWide. Columns beyond the last are zero. Weights are not packed, so they are
// in memory once, in the pages of the mapped file.
#pragma once

#include <type_traits>

#include "simd.h"
#include "work.h"

namespace MOEBIUS_VARIANT {

inline Index panels(Index columns) { return (columns + kWide - 1) / kWide; }

template <int R>
using Tile = vec[R][kVectors];

#if defined(MOEBIUS_NEON)

// sums[i] += row i's value of lane `Lane` * (left, right).
template <int Lane, int R>
inline void add_lane(float32x4_t (&sums)[R][kVectors], const float32x4_t (&rows)[R], const float* panel) {
  const float32x4_t left = vld1q_f32(panel), right = vld1q_f32(panel + kLanes);
  for (int i = 0; i < R; ++i) {
    sums[i][0] = vfmaq_laneq_f32(sums[i][0], left, rows[i], Lane);
    sums[i][1] = vfmaq_laneq_f32(sums[i][1], right, rows[i], Lane);
  }
}

// tile += rows [R, depth] (each `stride` floats after the one before) * panel [depth, kWide]. Four values of each row are
// loaded at a time: an instruction takes its factor from any lane.
template <int R>
inline void multiply(Tile<R>& tile, const float* rows, Index stride, const float* panel, Index depth) {
  float32x4_t sums[R][kVectors], values[R];
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) sums[i][j] = float32x4_t(tile[i][j]);
  Index k = 0;
  for (; k + 4 <= depth; k += 4, rows += 4, panel += 4 * kWide) {
    for (int i = 0; i < R; ++i) values[i] = vld1q_f32(rows + i * stride);
    add_lane<0, R>(sums, values, panel);
    add_lane<1, R>(sums, values, panel + kWide);
    add_lane<2, R>(sums, values, panel + 2 * kWide);
    add_lane<3, R>(sums, values, panel + 3 * kWide);
  }
  for (; k < depth; ++k, ++rows, panel += kWide) {
    for (int i = 0; i < R; ++i) values[i] = vld1q_dup_f32(rows + i * stride);
    add_lane<0, R>(sums, values, panel);
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < kVectors; ++j) tile[i][j] = vec(sums[i][j]);
}

#else

// tile += rows [R, depth] (each `stride` floats after the one before) * panel [depth, kWide].
template <int R>
MOEBIUS_INLINE void multiply(Tile<R>& tile, const float* rows, Index stride, const float* panel, Index depth) {
  Tile<R> sums;  // a local variable stays in registers
  each_cell<R>([&](auto i, auto j) { sums[i][j] = tile[i][j]; });
  const char* at = reinterpret_cast<const char*>(rows);
  // Odd multiples of the stride in registers; the even ones are what an address can scale.
  const Index one = stride * Index(sizeof(float)), three = 3 * one, five = 5 * one, seven = 7 * one, nine = 9 * one,
             eleven = 11 * one, thirteen = 13 * one;
  for (Index k = 0; k < depth; ++k, at += sizeof(float), panel += kWide) {
    const vec left = load(panel), right = load(panel + kLanes);
    const auto row = [&](auto index, Index offset) {
      constexpr int i = decltype(index)::value;
      if constexpr (i < R) {
        float weight;
        std::memcpy(&weight, at + offset, sizeof weight);
        const vec factor = splat(weight);
        sums[i][0] += factor * left;
        sums[i][1] += factor * right;
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
  each_cell<R>([&](auto i, auto j) { tile[i][j] = sums[i][j]; });
}

#endif

// Calls f(integral_constant R) for R = rows, 1 <= rows <= kRows.
template <int R = kRows, class F>
inline void with_rows(Index rows, F&& f) {
  if (rows >= R) {
    f(std::integral_constant<int, R>{});
  } else if constexpr (R > 1) {
    with_rows<R - 1>(rows, f);
  }
}

// Calls f(integral_constant R, first row) for blocks of at most kRows of the rows [first, last).
template <class F>
inline void row_blocks(Index first, Index last, F&& f) {
  for (Index row = first; row < last; row += kRows)
    with_rows(last - row, [&](auto count) { f(count, row); });
}

// f(first row, last row, first panel, last panel) for the tasks of a matmul of `rows` rows and `count` panels. A task takes
// a few panels, as many as a core's second-level cache holds beside the weights of a tile, and where that makes few tasks,
// a part of the rows, so that threads end together.
template <class F>
inline void each_task(const moebius::Threads& threads, Index rows, Index count, Index depth, F&& f) {
  constexpr Index kTasks = 16;
  const Index fits = (512 << 10) / (depth * kWide * Index(sizeof(float)));
  const Index group = fits < 1 ? 1 : fits > 4 ? 4 : fits, groups = (count + group - 1) / group;
  const Index blocks = (rows + kRows - 1) / kRows, parts = groups >= kTasks ? 1 : (kTasks + groups - 1) / groups;
  const Index part = (blocks + parts - 1) / parts * kRows;
  threads.each(groups * parts, [&](Index task) {
    const Index first = task / parts * group, last = first + group < count ? first + group : count;
    const Index top = task % parts * part, bottom = top + part < rows ? top + part : rows;
    f(top, bottom, first, last);
  });
}

// f(integral_constant R, first row, panel) for every tile of these tasks.
template <class F>
inline void each_tile(const moebius::Threads& threads, Index rows, Index count, Index depth, F&& f) {
  each_task(threads, rows, count, depth, [&](Index top, Index bottom, Index first, Index last) {
    row_blocks(top, bottom, [&](auto size, Index row) {
      for (Index p = first; p < last; ++p) f(size, row, p);
    });
  });
}

// f(row, vector, first column, lanes) for the vectors of panel p that hold any of `columns` columns.
template <int R, class F>
MOEBIUS_INLINE void each_vector(Index columns, Index p, F&& f) {
  const Index first = p * kWide, left = columns - first;
  if (left >= kWide)
    return each_cell<R>([&](auto i, auto j) { f(i, j, first + j * kLanes, std::integral_constant<int, kLanes>{}); });
  each_cell<R>([&](auto i, auto j) {
    const Index lanes = left - j * kLanes;
    if (lanes > 0) f(i, j, first + j * kLanes, int(lanes < kLanes ? lanes : kLanes));
  });
}

// A finished tile as floats [R, kWide].
template <int R>
inline void spill(const Tile<R>& tile, float* to) {
  each_cell<R>([&](auto i, auto j) { store(to + i * kWide + j * kLanes, tile[i][j]); });
}

}  // namespace MOEBIUS_VARIANT
