"""Procedural scenes: pictures drawn from (seed, index), as many as wanted, free of rights and the same everywhere.

A scene is a surface, a sky, a landscape, a room in perspective or a still life of shapes, then light and grain. Lengths
follow the shorter side, so the same scene at another size shows the same picture with finer or coarser detail.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from moebius.data.noise import (
    Canvas,
    Plane,
    Rng,
    child,
    colour,
    direction,
    edge,
    fractal,
    lattice,
    like,
    mix,
    ramp,
    scattered,
    smooth,
    uniform,
    wave,
    window,
)
from moebius.data.patterns import PATTERNS, bricks, facade, foliage, gradient, grass, mottled, pebbles, wood
from moebius.errors import DataError

_MIN_SIDE, _MAX_SIDE = 16, 8192


def scene(
    index: int, height: int, width: int | None = None, seed: int = 0, held_out: bool = False
) -> npt.NDArray[np.uint8]:
    """Scene number `index` of a seed, uint8 RGB [height, width, 3].

    Args:
        index: 0 or more.
        height: pixels, 16 to 8192.
        width: pixels; as `height` where not given.
        seed: 0 or more; each seed has its own endless series.
        held_out: the series for evaluation. It shares no generator state with that for training.

    Raises:
        DataError: an argument is out of its range.
    """
    width = height if width is None else width
    if not (_MIN_SIDE <= height <= _MAX_SIDE and _MIN_SIDE <= width <= _MAX_SIDE):
        raise DataError(f"a scene of {height} x {width} pixels: expected sides of {_MIN_SIDE} to {_MAX_SIDE}")
    if index < 0 or seed < 0:
        raise DataError(f"scene {index} of seed {seed}: expected numbers of 0 or more")
    rng, kind = _begin(index, seed, held_out)
    canvas = Canvas.of(height, width)
    picture = _finish(rng, canvas, kind(rng, canvas))
    return np.ascontiguousarray(picture.transpose(1, 2, 0))


def scene_kind(index: int, seed: int = 0, held_out: bool = False) -> str:
    """What `scene` draws for the same arguments, without drawing it: the name of one of `KINDS`."""
    return _begin(index, seed, held_out)[1].__name__


def _begin(index: int, seed: int, held_out: bool) -> tuple[Rng, Callable[[Rng, Canvas], Plane]]:
    """A scene's generator, and the kind that is its first draw."""
    rng = np.random.Generator(np.random.PCG64([2 * seed + held_out, index]))
    return rng, KINDS[int(np.searchsorted(_SHARES, rng.random(), side="right"))]


def surface(rng: Rng, canvas: Canvas) -> Plane:
    """One material over the whole picture, or two with a border between them."""
    picture = _pattern(rng, canvas)
    if rng.random() < 0.35:
        a, b = direction(rng)
        bend = (lattice(rng, canvas, 2, 2) - np.float32(0.5)) * uniform(rng, 0, 0.3)
        middle = a * np.float32(canvas.extent[1] / 2) + b * np.float32(canvas.extent[0] / 2)
        share = edge(a * canvas.x + b * canvas.y - middle + bend + uniform(rng, -0.25, 0.25), canvas)
        picture = mix(picture, _pattern(rng, canvas), share)
    return picture


def sky(rng: Rng, canvas: Canvas) -> Plane:
    """A sky: by day, at dusk or overcast, with or without clouds and sun."""
    hour = rng.random()
    if hour < 0.6:
        blue = uniform(rng, 0.45, 0.9)
        top = np.array([blue * uniform(rng, 0.2, 0.55), blue * uniform(rng, 0.5, 0.75), blue], np.float32)
        low = like(rng, np.array([0.75, 0.85, 0.95], np.float32), 0.1)
    elif hour < 0.85:
        top, low = (
            colour(rng, 0.1, 0.5, 0.5),
            np.array([0.95, uniform(rng, 0.4, 0.75), uniform(rng, 0.2, 0.6)], np.float32),
        )
    else:
        top, low = colour(rng, 0.4, 0.7, 0.1), colour(rng, 0.6, 0.9, 0.1)
    t = canvas.y / np.float32(canvas.extent[0])
    picture = ramp(t + np.zeros_like(canvas.x), [top, like(rng, (top + low) / np.float32(2), 0.05), low])
    if rng.random() < 0.4:
        dx, dy = canvas.x - uniform(rng, 0, canvas.extent[1]), canvas.y - uniform(rng, 0, canvas.extent[0])
        distance = np.sqrt(dx * dx + dy * dy)
        glow = smooth(np.float32(1) - distance / uniform(rng, 0.2, 0.7))
        disc = edge(distance - uniform(rng, 0.02, 0.07), canvas)
        light = np.array([1, 0.95, 0.8], np.float32)[:, None, None]
        picture = mix(picture, light, np.maximum(glow * glow * np.float32(0.6), disc))
    if rng.random() < 0.75:
        fx = float(uniform(rng, 1.2, 4))
        noise = fractal(rng, canvas, fx, fx * float(uniform(rng, 1.2, 3.5)), octaves=6, gain=0.55)
        amount = smooth((noise - uniform(rng, 0.4, 0.6)) * uniform(rng, 2, 6))
        shade = np.float32(1) - (noise - np.float32(0.5)) * uniform(rng, 0.2, 1.2)
        white = (low * np.float32(0.4) + np.float32(0.6))[:, None, None] * np.clip(shade, 0, 1)
        picture = mix(picture, white, amount * uniform(rng, 0.4, 1))
    return picture


def landscape(rng: Rng, canvas: Canvas) -> Plane:
    """Sky over two to four ridges that fade with distance, then ground or water."""
    picture = sky(rng, canvas)
    haze = picture[:, -1, canvas.width // 2]  # the sky's colour at the horizon
    tall = np.float32(canvas.extent[0])
    ridges, horizon = int(rng.integers(1, 5)), uniform(rng, 0.35, 0.7)
    base = colour(rng, 0.1, 0.45, 0.4)
    rough = fractal(rng, canvas, float(uniform(rng, 8, 20)), float(uniform(rng, 8, 20)), octaves=5, gain=0.6)
    rough -= np.float32(0.5)
    for index in range(ridges):
        near = (index + 1) / ridges
        outline = fractal(rng, _row(canvas), float(uniform(rng, 1, 3)) * (1 + index), octaves=6, gain=0.5)
        top = tall * (horizon - np.float32(0.15) * np.float32(1 - near)) - (outline - np.float32(0.3)) * uniform(
            rng, 0.1, 0.35
        )
        tone = like(rng, base, 0.12)
        tone = tone + (haze - tone) * np.float32(0.75 * (1 - near))
        body = tone[:, None, None] * (np.float32(1) + rough * np.float32(0.2 + near))
        picture = mix(picture, body, edge(top - canvas.y, canvas))
    for _ in range(int(rng.integers(1, 6)) if rng.random() < 0.4 else 0):
        _tree(rng, canvas, picture)
    level = tall * uniform(rng, 0.62, 0.9)
    ground = edge(level - canvas.y, canvas)
    if rng.random() < 0.35:
        mirror = np.clip((2 * level - canvas.y[:, 0]) * canvas.unit, 0, canvas.height - 1).astype(np.intp)
        ripple = fractal(rng, canvas, 4, 50, octaves=3) - np.float32(0.5)
        water = picture[:, mirror, :] * np.float32(0.7) + ripple * np.float32(0.3) + np.float32(0.05)
        return mix(picture, water, ground)
    cover = (grass, foliage, mottled, pebbles)[int(rng.integers(4))](rng, canvas)
    cover *= np.float32(0.6) + np.float32(0.4) * canvas.y / tall
    picture = mix(picture, cover, ground)
    if rng.random() < 0.25:
        _fence(rng, canvas, picture, level)
    return picture


def _tree(rng: Rng, canvas: Canvas, picture: Plane) -> None:
    """Draws a trunk, down to the ground, under a ragged crown onto the picture."""
    tall, wide = canvas.extent
    x, y, r = uniform(rng, 0, wide), uniform(rng, 0.3, 0.55) * np.float32(tall), uniform(rng, 0.06, 0.2)
    slim, thick, rng = uniform(rng, 0.8, 2), r * uniform(rng, 0.05, 0.14), child(rng)
    bark = colour(rng, 0.1, 0.35, 0.2)[:, None, None]
    place, part = window(canvas, x, y + 1, thick * 2, 1)
    inside = np.maximum(np.abs(part.x - x) - thick, y - part.y)
    picture[place] = mix(
        picture[place],
        bark * (np.float32(1) - (part.x - x) / thick * np.float32(0.3)),
        edge(inside, part),
    )
    place, part = window(canvas, x, y, r * 1.5, r * slim * 1.5)
    if min(part.height, part.width) < 4:
        return
    leaves = foliage(rng, _moved(part))
    dx, dy = (part.x - x) / r, (part.y - y) / (r * slim)
    ragged = fractal(rng, _moved(part), 12 / float(r) * 0.15, octaves=4, gain=0.7) - np.float32(0.5)
    inside = (np.sqrt(dx * dx + dy * dy) - np.float32(1) + ragged * np.float32(1.2)) * r
    lit = np.float32(0.85) - (dx + dy) * np.float32(0.3)
    picture[place] = mix(picture[place], leaves * lit, edge(inside, part))


def _fence(rng: Rng, canvas: Canvas, picture: Plane, level: np.float32) -> None:
    """Draws posts and rails, or poles and a wire, onto the picture, at the edge of the ground."""
    spacing, half = uniform(rng, 0.04, 0.3), uniform(rng, 0.003, 0.012)
    top = level - uniform(rng, 0.08, 0.3)
    place, part = window(
        canvas, canvas.extent[1] / 2, (top + level) / 2 + 0.03, canvas.extent[1], (level - top) / 2 + 0.06
    )
    u = part.x / spacing + uniform(rng, 0, 1)
    posts = np.maximum(np.abs(u - np.floor(u) - np.float32(0.5)) * spacing - half, top - part.y)
    posts = np.maximum(posts, part.y - level - np.float32(0.05))
    rails = np.full((part.height, 1), 9, np.float32)
    for share in (0.2, 0.7) if rng.random() < 0.6 else (0.05,):
        rails = np.minimum(rails, np.abs(part.y - top - (level - top) * np.float32(share)) - half * np.float32(0.7))
    tone = colour(rng, 0.1, 0.9, 0.2)[:, None, None]
    picture[place] = mix(picture[place], tone, edge(np.minimum(posts, rails), part))


def interior(rng: Rng, canvas: Canvas) -> Plane:
    """A floor in perspective, checked or of tiles, before a wall, with or without a skirting."""
    tall, wide = canvas.extent
    horizon = uniform(rng, 0.2, 0.5) * np.float32(tall)
    foot = horizon + uniform(rng, 0.05, 0.25)
    wall = (mottled, bricks, wood, gradient, facade, _papered)[int(rng.integers(6))](rng, canvas)
    depth = np.float32(1) / np.maximum(canvas.y - horizon, np.float32(0.02))  # [H, 1]: 1 / (rows below the horizon)
    density = uniform(rng, 0.8, 3)
    u = (canvas.x - uniform(rng, 0, wide)) * depth * density
    v = depth * density * uniform(rng, 0.5, 2) + uniform(rng, 0, 1)
    if rng.random() < 0.4:  # laid diagonally
        u, v = (u + v) * np.float32(0.7), (u - v) * np.float32(0.7)
    u, v = u + np.zeros_like(v), v + np.zeros_like(u)
    column, row = np.floor(u), np.floor(v)
    pixels = np.float32(canvas.unit) / (depth * density)  # a tile's width in pixels
    sharp = np.clip(pixels / np.float32(4), np.float32(0.1), np.float32(1))  # far tiles blur into each other
    first, second = colour(rng), colour(rng)
    tone = scattered(rng, column, row)[0]
    if rng.random() < 0.6:
        checks = column + row
        share = checks - np.float32(2) * np.floor(checks / np.float32(2))  # 0 or 1
    else:
        share = tone
        second = like(rng, first, 0.35)
    share = np.float32(0.5) + (share - np.float32(0.5)) * sharp
    floor = mix(first[:, None, None] + np.zeros((1, canvas.height, 1), np.float32), second[:, None, None], share)
    floor = floor + (tone - np.float32(0.5)) * np.float32(0.12) * sharp
    joint = np.minimum(np.minimum(u - column, column + 1 - u), np.minimum(v - row, row + 1 - v)) * pixels
    gap = np.clip(np.float32(1.5) - joint, np.float32(0), np.float32(1)) * sharp
    floor = floor * (np.float32(1) - gap * uniform(rng, 0, 0.6))
    floor = floor * (np.float32(0.65) + np.float32(0.35) * (canvas.y - foot) / np.float32(tall))
    below = edge(foot - canvas.y, canvas)
    shade = np.float32(1) - smooth(np.float32(1) - np.abs(canvas.y - foot) / np.float32(0.15)) * np.float32(0.25)
    board = edge(np.abs(canvas.y - foot + np.float32(0.025)) - np.float32(0.02), canvas) * np.float32(
        rng.random() < 0.6
    )
    picture = mix(wall, colour(rng, 0.4, 0.9, 0.2)[:, None, None], board + np.zeros_like(canvas.x))
    picture = mix(picture, floor, below + np.zeros_like(canvas.x)) * shade
    return picture


def _papered(rng: Rng, canvas: Canvas) -> Plane:
    """Wallpaper: upright stripes under a light from the side."""
    base = colour(rng, 0.3, 0.9, 0.4)
    light = np.float32(1.1) - uniform(rng, 0, 0.5) * canvas.x / np.float32(canvas.extent[1])
    stripe = wave(canvas.x * uniform(rng, 4, 16)) * light + np.zeros_like(canvas.y)
    return ramp(stripe, [base, like(rng, base, 0.15)]) * light


def still_life(rng: Rng, canvas: Canvas) -> Plane:
    """Three to nine shapes, each flat, shaded or of a material, some with a shadow, on a surface."""
    picture = (interior if rng.random() < 0.25 else surface)(rng, canvas)
    material = _pattern(rng, canvas)
    for _ in range(int(rng.integers(3, 10))):
        shadow, fill, flat = rng.random(), rng.random(), colour(rng)[:, None, None]
        place, distance, lit, part = _shape(rng, canvas)
        below = picture[place]
        if shadow < 0.5:
            offset = max(1, round(canvas.unit * 0.02))
            dark = np.zeros_like(distance)
            dark[offset:, offset:] = smooth(np.float32(0.7) - distance * np.float32(25))[:-offset, :-offset]
            below = below * (np.float32(1) - dark * np.float32(0.4))
        if fill < 0.3:
            body = flat
        elif fill < 0.75:
            body = flat * (np.float32(0.55) + np.float32(0.6) * lit)
        else:
            body = material[place] * (np.float32(0.6) + np.float32(0.5) * lit)
        picture[place] = mix(below, body, edge(distance, part))
    return picture


def _shape(rng: Rng, canvas: Canvas) -> tuple[tuple[slice, slice, slice], Plane, Plane, Canvas]:
    """An ellipse, rounded box, ring or convex polygon.

    Returns its place, slices of channels, rows and columns; there, signed distance (about) and light in [0, 1], [h, w]
    each; and the canvas of that part.
    """
    tall, wide = canvas.extent
    x, y = uniform(rng, 0, wide), uniform(rng, 0, tall)
    a, b = direction(rng)
    r, s = uniform(rng, 0.05, 0.28), uniform(rng, 0.05, 0.28)
    place, part = window(canvas, x, y, 0.5, 0.5)
    dx, dy = part.x - x, part.y - y
    distance, lit = _outline(rng, dx, dy, (a, b), (r, s))
    return place, distance, lit, part


def _outline(
    rng: Rng, dx: Plane, dy: Plane, turn: tuple[np.float32, np.float32], half: tuple[np.float32, np.float32]
) -> tuple[Plane, Plane]:
    (a, b), (r, s) = turn, half
    u, v = a * dx + b * dy, a * dy - b * dx
    lit = np.clip(np.float32(0.5) - (dx + dy) / (np.float32(2) * (r + s)), np.float32(0), np.float32(1))
    kind = rng.random()
    if kind < 0.35:
        norm = np.sqrt((u / r) * (u / r) + (v / s) * (v / s))
        return (norm - np.float32(1)) * min(r, s), lit
    if kind < 0.5:
        norm = np.sqrt(u * u + v * v)
        return np.abs(norm - r) - r * uniform(rng, 0.1, 0.4), lit
    if kind < 0.8:
        corner = min(r, s) * uniform(rng, 0, 0.6)
        qx, qy = np.abs(u) - r + corner, np.abs(v) - s + corner
        outside = np.sqrt(np.maximum(qx, 0) * np.maximum(qx, 0) + np.maximum(qy, 0) * np.maximum(qy, 0))
        return outside + np.minimum(np.maximum(qx, qy), 0) - corner, lit
    distance = np.full(u.shape, -9, np.float32)
    for _ in range(int(rng.integers(3, 7))):
        a, b = direction(rng)
        distance = np.maximum(distance, a * dx + b * dy - uniform(rng, 0.05, 0.2))
    return np.maximum(distance, np.sqrt(dx * dx + dy * dy) - np.float32(0.3)), lit


def street(rng: Rng, canvas: Canvas) -> Plane:
    """House fronts of different heights under a sky, over a pavement."""
    picture = sky(rng, canvas)
    tall, wide = canvas.extent
    left = uniform(rng, -0.2, 0.1)
    front = facade(rng, canvas)
    choice = rng.random()
    other = facade(rng, canvas) if choice < 0.3 else bricks(rng, canvas) if choice < 0.6 else front
    while left < wide:
        width, top = uniform(rng, 0.25, 0.6), uniform(rng, 0.1, 0.6) * np.float32(tall)
        tint = like(rng, np.ones(3, np.float32) * np.float32(0.85), 0.15)[:, None, None]
        place, part = window(canvas, left + width / 2, tall / 2, width / 2 + 0.01, tall)
        inside = np.maximum(np.abs(part.x - left - width / 2) - width / 2, top - part.y)
        body = (front if rng.random() < 0.5 else other)[place] * tint
        picture[place] = mix(picture[place], body, edge(inside, part))
        left += width + (uniform(rng, 0, 0.3) if rng.random() < 0.4 else np.float32(0))
    pavement = mottled(rng, canvas) if rng.random() < 0.6 else pebbles(rng, canvas)
    level = edge(np.float32(tall) * uniform(rng, 0.75, 0.92) - canvas.y, canvas)
    return mix(picture, pavement * np.float32(0.8), level)


def _row(canvas: Canvas) -> Canvas:
    """The canvas cut to its first row, for outlines that depend on x alone."""
    return Canvas(1, canvas.width, canvas.x, canvas.y[:1], canvas.unit)


def _moved(canvas: Canvas) -> Canvas:
    """A part of a canvas as one of its own, with the same units: lattices start at its corner."""
    return Canvas(canvas.height, canvas.width, canvas.x - canvas.x[:, :1], canvas.y - canvas.y[:1], canvas.unit)


def _pattern(rng: Rng, canvas: Canvas) -> Plane:
    return PATTERNS[int(rng.integers(len(PATTERNS)))](rng, canvas)


def _finish(rng: Rng, canvas: Canvas, picture: Plane) -> npt.NDArray[np.uint8]:
    """Uneven light, contrast, exposure and grain; then 8 bits, uint8 [3, H, W], rounded half up."""
    if rng.random() < 0.5:
        light = np.float32(1) + (lattice(rng, canvas, 1, 1) - np.float32(0.5)) * uniform(rng, 0.1, 0.7)
        picture = picture * light
    contrast, exposure = uniform(rng, 0.75, 1.2), uniform(rng, -0.06, 0.08)
    picture = np.float32(0.45) + exposure + (picture - np.float32(0.45)) * contrast
    if rng.random() < 0.6:
        grain = rng.random((canvas.height, canvas.width), dtype=np.float32) - np.float32(0.5)
        picture = picture + grain * uniform(rng, 0.01, 0.07)
    return (np.clip(picture, np.float32(0), np.float32(1)) * np.float32(255) + np.float32(0.5)).astype(np.uint8)


KINDS = (surface, sky, landscape, interior, still_life, street)
_SHARES = np.cumsum([0.3, 0.1, 0.2, 0.15, 0.17])  # the last kind has the rest
