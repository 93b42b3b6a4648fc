"""Smooth values for unknown pixels, computed from the known ones alone: no value under the mask is ever read.

The filling is push-pull (Gortler et al. 1996, "The Lumigraph", section 3.4.2): means of the known pixels at half the
size, again and again until nothing is unknown, then back up. On the way up each level is relaxed towards the membrane
that the known pixels span (the Laplace equation, by Jacobi steps), which removes the blocks of the coarser level.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from moebius_runtime.masks import BoolArray

_RELAXATIONS = 8  # Jacobi steps at each level but that of the pixels themselves
_RELAXED_SIDE = 1024  # larger levels are not relaxed: what comes from so large a window is shrunk for the network
_STRIP = 128  # rows of the first level that are brought back to pixels at a time
_EMPTY = 127.5  # where nothing at all is known: mid-grey

Floats = npt.NDArray[np.float32]


def fill_pixels(pixels: npt.NDArray[np.uint8], unknown: BoolArray) -> npt.NDArray[np.uint8]:
    """The picture with its unknown pixels replaced by smooth values; known ones are copied.

    The result does not depend on what the unknown pixels hold. Mid-grey where no pixel is known.

    Args:
        pixels: uint8 [h, w, C].
        unknown: bool [h, w].

    Returns:
        uint8 [h, w, C], a new array.
    """
    filled: npt.NDArray[np.uint8] = pixels.copy()
    if not unknown.any():
        return filled
    half = (-(-pixels.shape[0] // 2), -(-pixels.shape[1] // 2))
    means, count = np.empty((*half, pixels.shape[2]), np.float32), np.empty(half, np.float32)
    strips = [(first, slice(2 * first, 2 * (first + _STRIP))) for first in range(0, half[0], _STRIP)]
    for first, lines in strips:  # no wide copy of a big picture
        known = ~unknown[lines]
        part = slice(first, first + _STRIP)
        means[part], count[part] = _halved(pixels[lines] * known[:, :, None].astype(np.uint8), known)
    coarse = _filled_means(means, count)
    for first, lines in strips:
        where = unknown[lines]
        if where.any():
            above = min(first, 1)  # a coarse row more on both sides, which the interpolation needs
            near = coarse[first - above : first + _STRIP + 1]
            doubled = _doubled(near, (2 * len(near), pixels.shape[1]))[2 * above :][: len(where)]
            np.copyto(filled[lines], (doubled + np.float32(0.5)).astype(np.uint8), where=where[:, :, None])
    return filled


def fill_cells(cells: npt.NDArray[np.float32], unknown: BoolArray) -> npt.NDArray[np.float32]:
    """Latents with their unknown cells replaced by smooth values, as `fill_pixels`; zero where no cell is known.

    Args:
        cells: float32 [1, C, h, w].
        unknown: bool [h, w].

    Returns:
        float32 [1, C, h, w], a new array.
    """
    if not unknown.any():
        return np.array(cells)
    values = np.where(unknown[:, :, None], np.float32(0), cells[0].transpose(1, 2, 0))  # [1, C, h, w] -> [h, w, C]
    filled = _filled_means(values, (~unknown).astype(np.float32), empty=0.0)
    latents: Floats = np.ascontiguousarray(filled.transpose(2, 0, 1)[None])
    return latents  # [h, w, C] -> [1, C, h, w]


def _filled_means(means: Floats, weight: Floats, empty: float = _EMPTY) -> Floats:
    """`means` [h, w, C] where `weight` [h, w] is above 0, smooth values elsewhere."""
    known = weight > 0
    if known.all():
        return means
    if max(means.shape[:2]) == 1:
        return np.full_like(means, empty)
    coarse = _filled_means(*_halved(means, known), empty)
    filled = np.where(known[:, :, None], means, _doubled(coarse, means.shape[:2]))
    free = ~known[:, :, None]
    for _ in range(_RELAXATIONS if max(known.shape) <= _RELAXED_SIDE else 0):
        around = np.pad(filled, ((1, 1), (1, 1), (0, 0)), mode="edge")
        mean = (around[:-2, 1:-1] + around[2:, 1:-1] + around[1:-1, :-2] + around[1:-1, 2:]) * np.float32(0.25)
        np.copyto(filled, mean, where=free)
    return filled


def _halved(values: npt.NDArray[Any], known: BoolArray) -> tuple[Floats, Floats]:
    """Means of the known ones of each 2x2 block, float32 [ceil(h / 2), ceil(w / 2), C], and how many there are.

    `values` must hold 0 where nothing is known.
    """
    height, width = known.shape
    odd = ((0, height % 2), (0, width % 2))
    if height % 2 or width % 2:
        values, known = np.pad(values, (*odd, (0, 0))), np.pad(known, odd)
    wide = np.uint16 if values.dtype == np.uint8 else np.float32
    one, two = values[::2].astype(wide), values[1::2]
    rows = one + two  # [h / 2, w, C]
    total = (rows[:, ::2] + rows[:, 1::2]).astype(np.float32)  # [h / 2, w / 2, C]
    number = known.astype(np.uint8)
    count = (number[::2, ::2] + number[::2, 1::2] + number[1::2, ::2] + number[1::2, 1::2]).astype(np.float32)
    return total / np.maximum(count, 1)[:, :, None], count


def _doubled(coarse: Floats, shape: tuple[int, ...]) -> Floats:
    """Bilinear enlargement of [h, w, C] to `shape`, each coarse cell lying over a 2x2 block."""
    tall = _line_doubled(coarse, shape[0])
    doubled: Floats = _line_doubled(tall.swapaxes(0, 1), shape[1]).swapaxes(0, 1)
    return doubled


def _line_doubled(coarse: Floats, length: int) -> Floats:
    padded = np.pad(coarse, ((1, 1), (0, 0), (0, 0)), mode="edge")
    doubled: Floats = np.empty((2 * len(coarse), *coarse.shape[1:]), np.float32)
    doubled[::2] = np.float32(0.25) * padded[:-2] + np.float32(0.75) * coarse
    doubled[1::2] = np.float32(0.25) * padded[2:] + np.float32(0.75) * coarse
    cut: Floats = doubled[:length]
    return cut
