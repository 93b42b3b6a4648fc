"""Small plots as SVG text for `moebius_runtime.webpage`, in the page's colours, so that light and dark both fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from moebius_runtime.webpage import SERIES


def colour(index: int) -> str:
    """The page's colour of a series, as a CSS value."""
    return f"var(--c{index % SERIES})"


def bar(parts: Mapping[str, float], whole: float, label: str) -> str:
    """A horizontal bar cut by its parts; `whole` is the value at the full width, so that bars can share a scale.

    Names are no part of the drawing, so that they stay readable when it shrinks: `label` is the alternative text.
    """
    shapes, x = [], 0.0
    for index, (name, value) in enumerate(parts.items()):
        width = 1000 * value / whole if whole else 0.0
        shapes.append(
            f'<rect style="fill:{colour(index)}" x="{x:.2f}" y="2" width="{width:.2f}" height="14">'
            f"<title>{escape(name)} {value:.4g}</title></rect>"
        )
        x += width
    return _svg(18, "".join(shapes), label)


def lines(series: Sequence[tuple[str, Sequence[float]]], top: float, label: str) -> str:
    """One line per series over its index, from zero to `top`; a series of one value is a point."""
    longest = max((len(values) for _, values in series), default=1)
    shapes = [f'<line class="grid" x1="0" x2="1000" y1="{y}" y2="{y}"/>' for y in (10, 105, 200)]
    for index, (name, values) in enumerate(series):
        points = [(1000 * i / max(longest - 1, 1), 200 - 190 * value / (top or 1)) for i, value in enumerate(values)]
        if len(points) == 1:  # a point is a very short line
            points.append((points[0][0] + 4, points[0][1]))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        shapes.append(
            f'<polyline class="line s{index % SERIES}" points="{path}"><title>{escape(name)}</title></polyline>'
        )
    return _svg(202, "".join(shapes), label)


def interval(low: float, middle: float, high: float, scale: float, label: str) -> str:
    """A point with its spread on a line from 0 to `scale`; a dashed mark shows 1, where two variants are equal."""
    left, centre, right, one = (1000 * value / scale for value in (low, middle, high, 1.0))
    shapes = (
        '<line class="grid" x1="0" x2="1000" y1="12" y2="12"/>'
        f'<line class="limit" x1="{one:.1f}" x2="{one:.1f}" y1="2" y2="22"/>'
        f'<line class="line s5" x1="{left:.1f}" x2="{right:.1f}" y1="12" y2="12"/>'
        f'<rect style="fill:{colour(0)}" x="{centre - 4:.1f}" y="4" width="8" height="16"/>'
    )
    return _svg(24, shapes, label)


def _svg(height: int, content: str, label: str) -> str:
    return (
        f'<svg viewBox="0 0 1000 {height}" preserveAspectRatio="none" style="height:{height}px" role="img" '
        f'aria-label="{escape(label)}">{content}</svg>'
    )
