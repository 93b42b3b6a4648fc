"""Building blocks of the procedural scenes: coordinates, waves, lattice noise, colours.

Only additions, multiplications, divisions, square roots, floors and comparisons are used. IEEE 754 defines their
rounding, so a scene has the same bytes on every processor; with sines and powers it would not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Plane = npt.NDArray[np.float32]  # [H, W], or [H, 1] and [1, W], which broadcast
Scalar = np.floating[Any]
Rng = np.random.Generator

_STEPS = 2048  # of a colour ramp


@dataclass(frozen=True)
class Canvas:
    """A picture's pixel grid: `x` [1, W] and `y` [H, 1] at pixel centres, in units of the shorter side; y points down.

    Attributes:
        height: pixels.
        width: pixels.
        x: 0 at the left edge; the shorter side measures 1.
        y: 0 at the upper edge.
        unit: pixels of the shorter side.
    """

    height: int
    width: int
    x: Plane
    y: Plane
    unit: int

    @classmethod
    def of(cls, height: int, width: int) -> Canvas:
        """The grid of a picture of `height` x `width` pixels."""
        unit = min(height, width)
        x = ((np.arange(width, dtype=np.float32) + np.float32(0.5)) / np.float32(unit))[None, :]
        y = ((np.arange(height, dtype=np.float32) + np.float32(0.5)) / np.float32(unit))[:, None]
        return cls(height, width, x, y, unit)

    @property
    def extent(self) -> tuple[float, float]:
        """Height and width in units of the shorter side."""
        return self.height / self.unit, self.width / self.unit


def child(rng: Rng) -> Rng:
    """A generator of its own for a part that draws more numbers for larger pictures: `rng` moves by one in any case."""
    return np.random.Generator(np.random.PCG64(int(rng.integers(1 << 62))))


def uniform(rng: Rng, low: float, high: float) -> np.float32:
    """A number of [low, high)."""
    return np.float32(low + (high - low) * rng.random())


def direction(rng: Rng) -> tuple[np.float32, np.float32]:
    """A unit vector: the rational points of the circle, with both axes swapped and mirrored at random."""
    t = 0.4142135 * rng.random()  # up to tan(22.5 degrees)
    a, b = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    swap, mirror_a, mirror_b = rng.random(3) < 0.5
    a, b = (-a if mirror_a else a), (-b if mirror_b else b)
    return (np.float32(b), np.float32(a)) if swap else (np.float32(a), np.float32(b))


def smooth(t: Plane) -> Plane:
    """3t^2 - 2t^3, from 0 to 1 with level ends; `t` is clipped to [0, 1]."""
    t = np.clip(t, np.float32(0), np.float32(1))
    return t * t * (np.float32(3) - np.float32(2) * t)


def wave(t: Plane) -> Plane:
    """A wave of period 1 and range [0, 1] that looks like a cosine: 1 at whole numbers, 0 halfway."""
    return smooth(np.abs(np.float32(2) * (t - np.floor(t)) - np.float32(1)))


def edge(distance: Plane, canvas: Canvas) -> Plane:
    """Coverage of the pixels of an area of signed `distance` (in units, negative inside), soft over a pixel."""
    return np.clip(np.float32(0.5) - distance * np.float32(canvas.unit), np.float32(0), np.float32(1))


def lattice(rng: Rng, canvas: Canvas, fx: float, fy: float) -> Plane:
    """Value noise [H, W] in [0, 1): random values on a lattice of `fx` x `fy` cells a unit, smoothly joined."""
    tall, wide = canvas.extent
    rows, row = _cells(canvas.y[:, 0], fy)
    columns, column = _cells(canvas.x[0], fx)
    values = rng.random((int(tall * fy) + 2, int(wide * fx) + 2), dtype=np.float32)
    upper, lower = values[rows], values[rows + 1]
    strip = upper + (lower - upper) * row[:, None]  # [H, columns of the lattice]
    step = strip[:, 1:] - strip[:, :-1]
    result = np.take(step, columns, axis=1)
    result *= column
    result += np.take(strip, columns, axis=1)
    return result


def _cells(position: Plane, frequency: float) -> tuple[npt.NDArray[np.intp], Plane]:
    scaled = position * np.float32(frequency)
    cell = np.floor(scaled)
    return cell.astype(np.intp), smooth(scaled - cell)


def fractal(rng: Rng, canvas: Canvas, fx: float, fy: float | None = None, octaves: int = 5, gain: float = 0.5) -> Plane:
    """Octaves of `lattice` noise [H, W] around 0.5, nearly all within [0, 1]; none is finer than two pixels."""
    fy = fx if fy is None else fy
    rng = child(rng)
    total, weight, sum_of_weights = np.zeros((canvas.height, canvas.width), np.float32), 1.0, 0.0
    for _ in range(octaves):
        if max(fx, fy) > canvas.unit / 2 and sum_of_weights:
            break
        total += np.float32(weight) * lattice(rng, canvas, fx, fy)
        sum_of_weights += weight
        weight, fx, fy = weight * gain, fx * 2.03, fy * 2.03
    total *= np.float32(1.3 / sum_of_weights)
    total -= np.float32(0.15)
    return total


def scattered(rng: Rng, cells_x: Plane, cells_y: Plane, channels: int = 1) -> Plane:
    """One random number in [0, 1) a cell, float32 [channels, H, W]; `cells_*` are whole numbers that broadcast."""
    table = rng.random((channels, 64 * 64), dtype=np.float32)
    index = (cells_y.astype(np.int32) & 63) * 64 + (cells_x.astype(np.int32) & 63)
    return table[:, index]


def colour(rng: Rng, low: float = 0.05, high: float = 0.95, vivid: float = 0.6) -> Plane:
    """A colour, float32 [3] in [0, 1]: a brightness in [low, high], and mostly muted hues; `vivid` bounds them."""
    value, hue, chroma = uniform(rng, low, high), rng.random(3, dtype=np.float32), uniform(rng, 0, 1)
    hue = hue - (hue[0] + hue[1] + hue[2]) / np.float32(3)
    return np.clip(value + hue * (chroma * chroma * np.float32(1.4 * vivid)), np.float32(0), np.float32(1))


def like(rng: Rng, base: Plane, spread: float = 0.15) -> Plane:
    """A colour, float32 [3], near `base`: brighter or darker, its hue a little moved."""
    change = uniform(rng, -spread, spread) + (rng.random(3, dtype=np.float32) - np.float32(0.5)) * np.float32(
        spread / 2
    )
    return np.clip(base + change, np.float32(0), np.float32(1))


def ramp(t: Plane, stops: list[Plane]) -> Plane:
    """Colours [3, H, W] along `t` [H, W] in [0, 1] through the given stops, [3] each, evenly spaced: in 2048 steps."""
    position = np.arange(_STEPS, dtype=np.float32) * np.float32((len(stops) - 1) / (_STEPS - 1))
    table = np.repeat(stops[0][:, None], _STEPS, axis=1)
    for index in range(len(stops) - 1):
        share = np.clip(position - np.float32(index), np.float32(0), np.float32(1))
        table += (stops[index + 1] - stops[index])[:, None] * share
    step = (np.clip(t, np.float32(0), np.float32(1)) * np.float32(_STEPS - 1)).astype(np.intp)
    result = np.empty((3, *t.shape), np.float32)
    for channel in range(3):
        np.take(table[channel], step, out=result[channel], mode="clip")
    return result


def mix(below: Plane, above: Plane, share: Plane) -> Plane:
    """`above` laid over `below` with opacity `share`; [3, H, W] and [H, W], or shapes that broadcast to these."""
    height, width = np.broadcast_shapes(below.shape[1:], above.shape[1:], share.shape)
    result = np.empty((3, height, width), np.float32)
    for channel, plane in enumerate(result):  # one at a time stays in the cache
        np.subtract(above[channel], below[channel], out=plane)
        plane *= share
        plane += below[channel]
    return result


def window(
    canvas: Canvas, x: float | Scalar, y: float | Scalar, reach_x: float | Scalar, reach_y: float | Scalar
) -> tuple[tuple[slice, slice, slice], Canvas]:
    """The part of a canvas within a reach of a point, as slices (channels, rows, columns) and as a canvas.

    Its units are the same; it may be empty.
    """
    unit = canvas.unit
    top, bottom = (min(max(int((y + sign * reach_y) * unit), 0), canvas.height) for sign in (-1, 1))
    left, right = (min(max(int((x + sign * reach_x) * unit), 0), canvas.width) for sign in (-1, 1))
    rows, columns = slice(top, bottom), slice(left, right)
    return (slice(None), rows, columns), Canvas(bottom - top, right - left, canvas.x[:, columns], canvas.y[rows], unit)
