"""Small SVG plots in the page's colours, so that light and dark both fit.

Names are no part of a drawing, so that they stay readable when it shrinks: `label` is its alternative text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

SERIES = 6  # colours: the CSS classes s0 to s5

Point = tuple[float, float]


def colour(index: int) -> str:
    """The page's colour of a series, as a CSS value."""
    return f"var(--c{index % SERIES})"


def bar(parts: Mapping[str, float], whole: float, label: str) -> Markup:
    """A horizontal bar cut by its parts; `whole` is the value at the full width, so that bars can share a scale."""
    shapes, x = [], 0.0
    for index, (name, value) in enumerate(parts.items()):
        width = 1000 * value / whole if whole else 0.0
        rect = '<rect style="fill:{}" x="{:.2f}" y="2" width="{:.2f}" height="14"><title>{} {:.4g}</title></rect>'
        shapes.append(Markup(rect).format(colour(index), x, width, name, value))
        x += width
    return _svg(18, shapes, label)


def lines(series: Sequence[tuple[str, Sequence[float]]], top: float, label: str) -> Markup:
    """One line per series over its index, from zero to `top`; a series of one value is a point."""
    longest = max((len(values) for _, values in series), default=1)
    shapes = [_grid(y) for y in (10, 105, 200)]
    for index, (name, values) in enumerate(series):
        points = [(1000 * i / max(longest - 1, 1), 200 - 190 * value / (top or 1)) for i, value in enumerate(values)]
        shapes.append(_polyline(index, points, name))
    return _svg(202, shapes, label)


def interval(low: float, middle: float, high: float, scale: float, label: str) -> Markup:
    """A point with its spread on a line from 0 to `scale`; a dashed mark shows 1, where two variants are equal."""
    left, centre, right, one = (1000 * value / scale for value in (low, middle, high, 1.0))
    shapes = [
        _grid(12),
        Markup('<line class="limit" x1="{0:.1f}" x2="{0:.1f}" y1="2" y2="22"/>').format(one),
        Markup('<line class="line s5" x1="{:.1f}" x2="{:.1f}" y1="12" y2="12"/>').format(left, right),
        Markup('<rect style="fill:{}" x="{:.1f}" y="4" width="8" height="16"/>').format(colour(0), centre - 4),
    ]
    return _svg(24, shapes, label)


def log_lines(series: Sequence[tuple[str, Sequence[float]]], limit: float, label: str) -> tuple[Markup, str]:
    """Curves of positive values over their index on a logarithmic scale of whole decades, with a dashed limit.

    Zero and what is not finite leave a gap.

    Returns:
        The drawing, and its scale in words.
    """
    values = [value for _, numbers in series for value in (*numbers, limit) if value > 0 and math.isfinite(value)]
    low = math.floor(math.log10(min(values, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))
    longest = max((len(numbers) for _, numbers in series), default=1)

    def height(value: float) -> float:
        return 200 - 190 * (math.log10(value) - low) / (high - low)

    shapes = [_grid(height(10.0**power)) for power in range(low, high + 1)]
    if limit > 0:
        dashed = '<line class="limit" x1="0" x2="1000" y1="{0:.1f}" y2="{0:.1f}"/>'
        shapes.append(Markup(dashed).format(height(limit)))
    for index, (name, numbers) in enumerate(series):
        for run in _runs(numbers):
            points = [(1000 * i / max(longest - 1, 1), height(numbers[i])) for i in run]
            shapes.append(_polyline(index, points, name))
    words = f"scale from 1e{low} to 1e{high}, a line per decade; dashed: the limit, {limit:.3g}"
    return _svg(205, shapes, label), words


def _runs(numbers: Sequence[float]) -> list[list[int]]:
    """Indices of the values that can be drawn, cut where one cannot."""
    runs: list[list[int]] = [[]]
    for index, value in enumerate(numbers):
        if value > 0 and math.isfinite(value):
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _grid(y: float) -> Markup:
    return Markup('<line class="grid" x1="0" x2="1000" y1="{0:.1f}" y2="{0:.1f}"/>').format(y)


def _polyline(index: int, points: Sequence[Point], name: str) -> Markup:
    """A curve; one point alone becomes a very short line."""
    drawn = [*points, (points[0][0] + 4, points[0][1])] if len(points) == 1 else points
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in drawn)
    shape = '<polyline class="line s{}" points="{}"><title>{}</title></polyline>'
    return Markup(shape).format(index % SERIES, path, name)


def _svg(height: int, shapes: Iterable[Markup], label: str) -> Markup:
    frame = (
        '<svg viewBox="0 0 1000 {0}" preserveAspectRatio="none" style="height:{0}px" role="img" '
        'aria-label="{1}">{2}</svg>'
    )
    return Markup(frame).format(height, label, Markup("").join(shapes))
