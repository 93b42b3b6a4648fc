"""The Triton kernel of Local-λ. This module imports triton, so `moebius.network.triton_lambda` imports it lazily.

Letters in shapes: B batch, n positions (H*W), h heads, k query depth, v value depth (v = k), r the window's side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import triton
import triton.language as tl


@triton.jit
def _product(a, b, total, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    """total + a b, in float32. WIDEN: a and b too, for Triton's interpreter, which reads bfloat16 as integers."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def local_lambda_kernel(
    query,  # [B, n, h*k]
    values,  # [B, n, v]
    summary,  # [B, k, v]
    window,  # [k, r, r]
    output,  # [B, n, h*v]
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    REACH: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TAPS: tl.constexpr,
    NEAR: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """BLOCK_X positions of one row, BLOCK_H heads and BLOCK_V values; grid (tiles, heads * values, B).

    Per row of the window: scores of every tap (query x window), moved to the columns that the taps fall on, then a
    product with that row of values: attention without softmax, whose weights depend on the offset only.
    """
    tiles: tl.constexpr = (WIDTH + BLOCK_X - 1) // BLOCK_X  # of a row
    value_blocks: tl.constexpr = (DEPTH + BLOCK_V - 1) // BLOCK_V
    half: tl.constexpr = REACH // 2
    dtype: tl.constexpr = values.dtype.element_ty
    row, first = tl.program_id(0) // tiles, (tl.program_id(0) % tiles) * BLOCK_X
    head_block, value_block = tl.program_id(1) // value_blocks, tl.program_id(1) % value_blocks
    picture = tl.program_id(2).to(tl.int64)
    query += picture * (HEIGHT * WIDTH * HEADS * DEPTH)
    output += picture * (HEIGHT * WIDTH * HEADS * DEPTH)
    values += picture * (HEIGHT * WIDTH * DEPTH)
    summary += picture * (DEPTH * DEPTH)

    member = tl.arange(0, BLOCK_X * BLOCK_H)  # position-major: one position's heads are neighbours in memory
    place, head = member // BLOCK_H, head_block * BLOCK_H + member % BLOCK_H
    inside = (first + place < WIDTH) & (head < HEADS)
    start = (row * WIDTH + first + place) * (HEADS * DEPTH) + head * DEPTH  # of each query
    value = value_block * BLOCK_V + tl.arange(0, BLOCK_V)

    total = tl.zeros([BLOCK_X * BLOCK_H, BLOCK_V], tl.float32)
    for at in tl.static_range(0, DEPTH, BLOCK_K):
        key = at + tl.arange(0, BLOCK_K)
        q = tl.load(query + start[:, None] + key[None, :], inside[:, None] & (key < DEPTH)[None, :], 0.0)
        content = tl.load(
            summary + key[:, None] * DEPTH + value[None, :], (key < DEPTH)[:, None] & (value < DEPTH)[None, :], 0.0
        )
        total = _product(q, content, total, PRECISION, WIDEN)

    taps = tl.arange(0, TAPS)
    column = first - half + tl.arange(0, NEAR)  # the columns that this tile sees
    tap = tl.arange(0, NEAR)[None, :] - place[:, None]  # which tap of a position falls on each of them
    seen = (tap >= 0) & (tap < REACH)
    tap = tl.where(seen, tap, 0)
    for down in range(tl.maximum(half - row, 0), tl.minimum(HEIGHT + half - row, REACH)):
        scores = tl.zeros([BLOCK_X * BLOCK_H, TAPS], tl.float32)
        for at in tl.static_range(0, DEPTH, BLOCK_K):
            key = at + tl.arange(0, BLOCK_K)
            q = tl.load(query + start[:, None] + key[None, :], inside[:, None] & (key < DEPTH)[None, :], 0.0)
            weight = key[:, None] * (REACH * REACH) + down * REACH + taps[None, :]
            weights = tl.load(window + weight, (key < DEPTH)[:, None] & (taps < REACH)[None, :], 0.0)
            scores = _product(q, weights, scores, PRECISION, WIDEN)
        band = tl.where(seen, tl.gather(scores, tap, 1), 0.0).to(dtype)  # [BLOCK_X * BLOCK_H, NEAR]
        cell = ((row + down - half) * WIDTH + column)[:, None] * DEPTH + value[None, :]
        within = ((column >= 0) & (column < WIDTH))[:, None] & (value < DEPTH)[None, :]
        total = _product(band, tl.load(values + cell, within, 0.0), total, PRECISION, WIDEN)

    tl.store(output + start[:, None] + value[None, :], total.to(dtype), inside[:, None] & (value < DEPTH)[None, :])


@dataclass(frozen=True)
class Blocks:
    """How the work is cut: positions, heads, query depth at a time and value depth of a program; its warps."""

    x: int
    h: int
    k: int
    v: int
    warps: int
    stages: int = 2

    def constants(self, reach: int) -> dict[str, int]:
        """The kernel's constants that follow from the blocks and the window's side."""
        return {
            "BLOCK_X": self.x,
            "BLOCK_H": self.h,
            "BLOCK_K": self.k,
            "BLOCK_V": self.v,
            "TAPS": max(16, triton.next_power_of_2(reach)),  # 16: the least that a tensor core's product takes
            "NEAR": max(16, triton.next_power_of_2(self.x + reach - 1)),
        }

    def grid(self, size: tuple[int, int], heads: int, depth: int) -> tuple[int, int]:
        """Programs over a picture's tiles, and over its heads and values."""
        return grid(size, heads, depth, {"BLOCK_X": self.x, "BLOCK_H": self.h, "BLOCK_V": self.v})


def grid(size: tuple[int, int], heads: int, depth: int, chosen: Mapping[str, int]) -> tuple[int, int]:
    """The launch grid for constants that the tuner chose."""
    height, width = size
    values = triton.cdiv(depth, chosen["BLOCK_V"])
    return height * triton.cdiv(width, chosen["BLOCK_X"]), triton.cdiv(heads, chosen["BLOCK_H"]) * values


def block_choices(heads: int, depth: int, itemsize: int) -> list[Blocks]:
    """Block sizes for the tuner to try, most promising first, for a dtype of `itemsize` bytes.

    float32 gets smaller blocks: it is multiplied outside the tensor cores and takes twice the shared memory.
    """
    least = 16  # of every side of a tensor core's product
    all_heads, whole = triton.next_power_of_2(heads), max(least, triton.next_power_of_2(depth))
    half, quarter = max(1, all_heads // 2), max(1, all_heads // 4)
    cuts = [(16, half, 64), (16, all_heads, 64), (16, half, 32)]
    if itemsize > 2:
        cuts = [(16, quarter, 32), (16, half, 32)]
    cuts.append((2, max(8, all_heads), 64))  # few columns beside the window's: 16 for a window of 15
    k = 32 if depth % 32 == 0 and itemsize == 2 else 16
    choices = [Blocks(x, h, k, min(v, whole), 8 if x * h > 64 else 4) for x, h, v in cuts]
    return list(dict.fromkeys(choices))


@lru_cache(maxsize=64)
def tuned_kernel(heads: int, depth: int, reach: int, itemsize: int) -> Any:
    """The kernel with the choices for these sizes; the first launch on each picture size, dtype and GPU times them."""
    configs = [
        triton.Config(blocks.constants(reach), num_warps=blocks.warps, num_stages=blocks.stages)
        for blocks in block_choices(heads, depth, itemsize)
    ]
    return triton.autotune(configs, key=["HEIGHT", "WIDTH"])(local_lambda_kernel)
