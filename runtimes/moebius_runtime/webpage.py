"""Parts of the reports' pages: one HTML file that needs nothing else, no script, no font, no request.

Readable from 360 pixels of width up, light and dark. Words stay outside drawings, which shrink with the page.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import numpy as np
import numpy.typing as npt
from PIL import Image

SERIES = 6  # colours: the CSS classes s0 to s5

_STYLE = """
:root{--back:#fff;--fore:#1c2430;--soft:#5b6675;--rule:#d7dde5;--card:#f5f7fa;
--c0:#2f6fdb;--c1:#b85c0c;--c2:#1f7f5a;--c3:#b3477d;--c4:#6a59cf;--c5:#6b7078;--bad:#b3261e;--good:#1c7a4a}
@media(prefers-color-scheme:dark){:root{--back:#12161c;--fore:#e6eaf0;--soft:#9aa5b4;--rule:#2d3642;--card:#1a2029;
--c0:#6da2ff;--c1:#ffab5c;--c2:#5fd0a2;--c3:#f08cbc;--c4:#a99bff;--c5:#8f98a5;--bad:#ff8a80;--good:#63d49b}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:70rem;background:var(--back);color:var(--fore);
font:16px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.4rem;margin:.2rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .5rem}h3{font-size:1rem;margin:1rem 0 .3rem}
p{margin:.3rem 0}.soft,dt{color:var(--soft)}.bad{color:var(--bad)}.good{color:var(--good)}
.card{background:var(--card);border:1px solid var(--rule);border-radius:.5rem;padding:.6rem .8rem;margin:.6rem 0}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.9rem}
th,td{text-align:left;vertical-align:top;padding:.25rem .5rem;border-bottom:1px solid var(--rule);
overflow-wrap:normal}td.words{overflow-wrap:anywhere;min-width:15rem}td:not(.words){white-space:nowrap}
svg{display:block;width:100%;margin:.2rem 0}
.s0{stroke:var(--c0)}.s1{stroke:var(--c1)}.s2{stroke:var(--c2)}.s3{stroke:var(--c3)}.s4{stroke:var(--c4)}
.s5{stroke:var(--c5)}.line{fill:none;stroke-width:2;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.grid{stroke:var(--rule);vector-effect:non-scaling-stroke}
.limit{stroke:var(--bad);stroke-dasharray:5 4;vector-effect:non-scaling-stroke}
dl{display:grid;grid-template-columns:minmax(6rem,max-content) 1fr;gap:.2rem 1rem;margin:0}dd{margin:0}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem}
figure{margin:0}figure img{width:100%;display:block;border-radius:.3rem}figcaption{font-size:.85rem}
@media(max-width:44rem){dl{grid-template-columns:1fr;gap:0}dd{margin-bottom:.4rem}body{padding:.6rem}
table.stack,.stack tbody,.stack tr,.stack td{display:block;width:100%}.stack th{display:none}
.stack tr{border-bottom:1px solid var(--rule);padding:.35rem 0}.stack td{border:0;padding:.05rem 0;min-width:0}
.stack td:empty{display:none}.stack td[data-name]::before{content:attr(data-name)": ";color:var(--soft)}}
"""


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page around sections of HTML."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


def facts(pairs: Mapping[str, str]) -> str:
    """Names and what they are."""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs.items())
    return f"<div class=card><dl>{items}</dl></div>"


def table(head: Sequence[str], rows: Iterable[Sequence[tuple[str, str]]]) -> str:
    """A table of (text, CSS classes) cells; on a narrow screen each row becomes a block with the heads as labels.

    Cells of the class `words` are broken where they must be, others never.
    """
    header = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = []
    for row in rows:
        cells = "".join(
            f'<td class="{css}"{_label(name, text)}>{escape(text)}</td>'
            for name, (text, css) in zip(head, row, strict=True)
        )
        body.append(f"<tr>{cells}</tr>")
    return f"<div class=scroll><table class=stack><tbody><tr>{header}</tr>{''.join(body)}</tbody></table></div>"


def _label(name: str, text: str) -> str:
    return f' data-name="{escape(name)}"' if name and text else ""


def log_plot(series: Sequence[tuple[str, Sequence[float]]], limit: float, label: str) -> str:
    """Curves of positive values over their index on a logarithmic scale of whole decades, with a dashed limit.

    Zero and what is not finite leave a gap. The scale's ends, the limit and the series' names stand below in words.
    """
    values = [value for _, numbers in series for value in (*numbers, limit) if value > 0 and math.isfinite(value)]
    low = math.floor(math.log10(min(values, default=0.1)))
    high = max(low + 1, math.ceil(math.log10(max(values, default=1.0))))
    longest = max((len(numbers) for _, numbers in series), default=1)

    def height(value: float) -> float:
        return 200 - 190 * (math.log10(value) - low) / (high - low)

    shapes = [
        f'<line class="grid" x1="0" x2="1000" y1="{height(10.0**power):.1f}" y2="{height(10.0**power):.1f}"/>'
        for power in range(low, high + 1)
    ]
    if limit > 0:
        shapes.append(f'<line class="limit" x1="0" x2="1000" y1="{height(limit):.1f}" y2="{height(limit):.1f}"/>')
    for index, (name, numbers) in enumerate(series):
        css = f"line s{index % SERIES}"
        for run in _runs(numbers):
            points = [(1000 * i / max(longest - 1, 1), height(numbers[i])) for i in run]
            if len(points) == 1:  # a point is a very short line
                points.append((points[0][0] + 4, points[0][1]))
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            shapes.append(f'<polyline class="{css}" points="{path}"><title>{escape(name)}</title></polyline>')
    words = f"scale from 1e{low} to 1e{high}, a line per decade; dashed: the limit, {limit:.3g}"
    names = "; ".join(f"{name}: {', '.join(f'{value:.2e}' for value in numbers)}" for name, numbers in series)
    drawing = (
        f'<svg viewBox="0 0 1000 205" preserveAspectRatio="none" style="height:205px" role="img" '
        f'aria-label="{escape(label)}">{"".join(shapes)}</svg>'
    )
    return f"<div class=card><p>{escape(label)}</p>{drawing}<p class=soft>{words}</p><p>{escape(names)}</p></div>"


def _runs(numbers: Sequence[float]) -> list[list[int]]:
    """Indices of the values that can be drawn, cut where one cannot."""
    runs: list[list[int]] = [[]]
    for index, value in enumerate(numbers):
        if value > 0 and math.isfinite(value):
            runs[-1].append(index)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def pictures(captioned: Iterable[tuple[str, npt.NDArray[np.uint8]]], longest: int = 320) -> str:
    """Pictures, uint8 [H, W, 3], side by side with captions, each shrunk to `longest` pixels and put into the page."""
    figures = "".join(
        f'<figure><img src="{png_uri(pixels, longest)}" alt="{escape(caption)}"><figcaption>{escape(caption)}'
        "</figcaption></figure>"
        for caption, pixels in captioned
    )
    return f"<div class=pictures>{figures}</div>"


def png_uri(pixels: npt.NDArray[np.uint8], longest: int) -> str:
    """A `data:` address of the picture as PNG, shrunk where its longer side is over `longest`."""
    image = Image.fromarray(pixels)
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
