"""Surfaces of the procedural scenes: each fills a canvas with one material, float32 [3, H, W], about [0, 1]."""

from __future__ import annotations

import numpy as np

from moebius.data.noise import (
    Canvas,
    Plane,
    Rng,
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
)


def gradient(rng: Rng, canvas: Canvas) -> Plane:
    """Two to four colours along a line or around a point."""
    if rng.random() < 0.6:
        a, b = direction(rng)
        along = a * canvas.x + b * canvas.y
        t = (along - along.min()) / (along.max() - along.min())
    else:
        dx, dy = canvas.x - uniform(rng, 0, 1), canvas.y - uniform(rng, 0, 1)
        t = np.sqrt(dx * dx + dy * dy) / uniform(rng, 0.7, 1.5)
    base = colour(rng)
    stops = [base] + [colour(rng) if rng.random() < 0.5 else like(rng, base, 0.4) for _ in range(rng.integers(1, 4))]
    return ramp(t + np.zeros((canvas.height, canvas.width), np.float32), stops)


def mottled(rng: Rng, canvas: Canvas) -> Plane:
    """Plaster, stone, cloth: fractal noise through a palette, sometimes stretched one way."""
    stretch = uniform(rng, 1, 8) if rng.random() < 0.4 else np.float32(1)
    fx = float(uniform(rng, 2, 14))
    fy = fx * float(stretch)
    fx, fy = (fy, fx) if rng.random() < 0.5 else (fx, fy)
    noise = fractal(rng, canvas, fx, fy, octaves=5, gain=float(uniform(rng, 0.4, 0.8)))
    base = colour(rng)
    return ramp(noise * np.float32(1.6) - np.float32(0.3), [like(rng, base, 0.3), base, like(rng, base, 0.2)])


def marble(rng: Rng, canvas: Canvas) -> Plane:
    """Veins: a wave pushed about by noise."""
    a, b = direction(rng)
    turbulence = fractal(rng, canvas, float(uniform(rng, 1.5, 4)), octaves=5, gain=0.55)
    t = (a * canvas.x + b * canvas.y) * uniform(rng, 1, 5) + turbulence * uniform(rng, 1, 4)
    base = colour(rng)
    return ramp(wave(t), [base, like(rng, base, 0.25), like(rng, base, 0.45)])


def wood(rng: Rng, canvas: Canvas) -> Plane:
    """Grain: rings of a log cut along it, with long fibres."""
    fx, fy = float(uniform(rng, 0.6, 1.5)), float(uniform(rng, 3, 7))
    x, y = (fx, fy) if rng.random() < 0.5 else (fy, fx)
    rings = lattice(rng, canvas, x, y) * uniform(rng, 3, 9)
    fibre = fractal(rng, canvas, x * 6, y * 14, octaves=2)
    red = uniform(rng, 0.35, 0.8)
    base = np.array([red, red * uniform(rng, 0.6, 0.85), red * uniform(rng, 0.3, 0.65)], np.float32)
    saw = rings - np.floor(rings)
    grain = smooth(np.minimum(saw, (np.float32(1) - saw) * np.float32(4)))
    return ramp(grain * np.float32(0.6) + fibre * np.float32(0.4), [like(rng, base, 0.1) * np.float32(0.7), base])


def stripes(rng: Rng, canvas: Canvas) -> Plane:
    """Soft or sharp stripes of two or three colours, straight or slightly bent, at any angle; often crossed."""
    layers = 2 if rng.random() < 0.3 else 1
    base = colour(rng)
    result = base[:, None, None] + np.zeros((3, canvas.height, canvas.width), np.float32)
    for _ in range(layers):
        a, b = direction(rng)
        if rng.random() < 0.35:
            a, b = (np.float32(1), np.float32(0)) if rng.random() < 0.5 else (np.float32(0), np.float32(1))
        frequency = uniform(rng, 3, 24)
        t = (a * canvas.x + b * canvas.y) * frequency
        if rng.random() < 0.4:
            t = t + lattice(rng, canvas, 2, 2) * uniform(rng, 0.3, 1.5)
        share = wave(t)
        if rng.random() < 0.6:  # sharp: stretched around the middle until the edge is about a pixel wide
            steep = np.float32(canvas.unit) / (frequency * np.float32(3))
            share = np.clip((share - uniform(rng, 0.3, 0.7)) * steep + np.float32(0.5), np.float32(0), np.float32(1))
        tone = colour(rng) if rng.random() < 0.5 else like(rng, base, 0.35)
        result = mix(result, tone[:, None, None], share * uniform(rng, 0.5, 1))
    return result


def bricks(rng: Rng, canvas: Canvas) -> Plane:
    """Bricks, tiles or planks: courses shifted against each other, joints, and a tone of its own for each brick."""
    rows = uniform(rng, 4, 16)
    aspect, shift = (1.0, 0.0) if rng.random() < 0.3 else (float(uniform(rng, 1.6, 6)), 0.5)
    v = canvas.y * rows + lattice(rng, canvas, 3, 3) * uniform(rng, 0, 0.12)
    row = np.floor(v)
    u = canvas.x * rows / np.float32(aspect) + row * np.float32(shift) + uniform(rng, 0, 1)
    column = np.floor(u)
    from_edge_x = np.minimum(u - column, np.float32(1) - (u - column)) * np.float32(aspect)
    from_edge_y = np.minimum(v - row, np.float32(1) - (v - row))
    inside = np.minimum(from_edge_x, from_edge_y) / rows - uniform(rng, 0.02, 0.09) / rows
    red = uniform(rng, 0.35, 0.75)
    clay = np.array([red, red * uniform(rng, 0.4, 0.7), red * uniform(rng, 0.3, 0.6)], np.float32)
    base = clay if rng.random() < 0.5 else colour(rng, 0.2, 0.9)
    joint = np.full(3, uniform(rng, 0.15, 0.85), np.float32) * np.float32(0.8) + base * np.float32(0.2)
    tone = scattered(rng, column, row)[0] - np.float32(0.5)
    grain = fractal(rng, canvas, float(uniform(rng, 20, 60)), octaves=3) - np.float32(0.5)
    face = base[:, None, None] + (tone * uniform(rng, 0.05, 0.4) + grain * uniform(rng, 0.1, 0.4))
    light = np.clip((np.float32(0.5) - (v - row)) * uniform(rng, 0, 0.2), np.float32(-0.1), np.float32(0.1))
    mortar = joint[:, None, None] + grain * np.float32(0.25)
    return mix(mortar, face + light, edge(-inside, canvas))


def foliage(rng: Rng, canvas: Canvas) -> Plane:
    """Leaves: layers of blobs from thresholded noise, lighter and greener towards the front, each with a dark rim."""
    green = uniform(rng, 0.2, 0.5)
    base = np.array([green * uniform(rng, 0.3, 0.95), green, green * uniform(rng, 0.15, 0.6)], np.float32)
    if rng.random() < 0.15:  # autumn
        base = base + np.array([uniform(rng, 0.1, 0.3), 0, 0], np.float32)
    result = base[:, None, None] * np.float32(0.35) + np.zeros((3, canvas.height, canvas.width), np.float32)
    scale = float(uniform(rng, 8, 30))
    for depth in range(4):
        stretch = float(uniform(rng, 0.6, 1.7))
        noise = fractal(rng, canvas, scale * stretch, scale / stretch, octaves=3, gain=0.6)
        height = (noise - uniform(rng, 0.46, 0.56)) * np.float32(canvas.unit / scale * 0.5)
        share = np.clip(height, np.float32(0), np.float32(1))
        tone = like(rng, base * np.float32(0.45 + 0.3 * depth), 0.12)
        lit = tone[:, None, None] * (np.float32(0.65) + (noise - np.float32(0.45)) * np.float32(2))
        result = mix(result, lit, share)
        scale *= 1.25
    return result


def grass(rng: Rng, canvas: Canvas) -> Plane:
    """Blades: noise stretched upright, over patches of two tones."""
    blades = fractal(rng, canvas, float(uniform(rng, 40, 110)), float(uniform(rng, 8, 20)), octaves=3, gain=0.7)
    patches = fractal(rng, canvas, float(uniform(rng, 2, 5)), octaves=3)
    green = uniform(rng, 0.3, 0.65)
    base = np.array([green * uniform(rng, 0.5, 1.15), green, green * uniform(rng, 0.2, 0.5)], np.float32)
    t = blades * np.float32(1.1) + patches * np.float32(0.6) - np.float32(0.35)
    return ramp(t, [base * np.float32(0.3), base, like(rng, base, 0.15) + np.float32(0.15)])


def pebbles(rng: Rng, canvas: Canvas) -> Plane:
    """Pebbles, scales or dry earth: nearest of jittered points, lit by the distance to it, dark where two meet."""
    frequency = uniform(rng, 5, 22)
    u, v = canvas.x * frequency, canvas.y * frequency
    column, row = np.floor(u), np.floor(v)
    table = rng.random((3, 64 * 64), dtype=np.float32)  # x and y in the cell, tone
    table[:2] *= np.float32(0.8)
    cells = (row.astype(np.int32) & 63) * 64, column.astype(np.int32) & 63
    best = np.full((canvas.height, canvas.width), 9, np.float32)
    second, owner = best.copy(), np.zeros(best.shape, np.int32)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            # [rows of pixels, columns of pixels] -> cell; neighbours wrap around the table
            index = ((cells[0] + 64 * down) & 4095) + ((cells[1] + right) & 63)
            distance, dy = (np.take(table[axis], index) for axis in (0, 1))
            distance += column + np.float32(right + 0.1) - u
            distance *= distance
            dy += row + np.float32(down + 0.1) - v
            dy *= dy
            distance += dy
            np.copyto(owner, index, where=distance < best)
            np.minimum(second, np.maximum(best, distance), out=second)
            np.minimum(best, distance, out=best)
    tone = np.take(table[2], owner)
    gap = np.sqrt(second) - np.sqrt(best)
    base = colour(rng, 0.25, 0.85, 0.4)
    face = base[:, None, None] + (tone - np.float32(0.5)) * uniform(rng, 0.1, 0.5) - best * uniform(rng, 0, 0.5)
    grain = fractal(rng, canvas, 40, octaves=2) - np.float32(0.5)
    return mix(
        base[:, None, None] * np.float32(0.25), face + grain * np.float32(0.2), smooth(gap / uniform(rng, 0.1, 0.4))
    )


def facade(rng: Rng, canvas: Canvas) -> Plane:
    """A house front: windows in a grid, each with a frame, a sill's shadow and a pane of its own brightness."""
    wall = mottled(rng, canvas) if rng.random() < 0.5 else bricks(rng, canvas)
    columns, rows = uniform(rng, 2, 8), uniform(rng, 2, 8)
    u, v = canvas.x * columns + uniform(rng, 0, 1), canvas.y * rows + uniform(rng, 0, 1)
    column, row = np.floor(u), np.floor(v)
    half_w, half_h = uniform(rng, 0.18, 0.38), uniform(rng, 0.22, 0.4)
    dx = (np.abs(u - column - np.float32(0.5)) - half_w) / columns
    dy = (np.abs(v - row - np.float32(0.5)) - half_h) / rows
    distance = np.maximum(dx, dy)
    frame = uniform(rng, 0.05, 0.15) / max(columns, rows)
    dark = colour(rng, 0.05, 0.5, 0.3)
    pane = dark[:, None, None] + scattered(rng, column, row)[0] * uniform(rng, 0.1, 0.5)
    pane = pane + (np.float32(0.5) - (v - row)) * np.float32(0.3)
    below = np.maximum(dx, np.abs(dy - frame * np.float32(2)) - frame)
    wall = wall * (np.float32(1) - edge(below, canvas) * np.float32(0.4))
    wall = mix(wall, colour(rng, 0.5, 1, 0.3)[:, None, None], edge(distance - frame, canvas))
    return mix(wall, pane, edge(distance, canvas))


PATTERNS = (gradient, mottled, marble, wood, stripes, bricks, foliage, grass, pebbles, facade)
