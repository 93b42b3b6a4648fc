"""The trade-off as a table for the terminal and as one HTML page with the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup
from rich.table import Table

from moebius_bench.report.messages import seconds
from moebius_bench.tradeoff.measure import CEILING, Distance, Row, Tradeoff, error_of

_TEMPLATE = Path(__file__).with_name("templates") / "tradeoff.html"
HEAD = (
    "#",
    "variant",
    "time",
    "encode",
    "steps",
    "decode",
    "PSNR to reference",
    "PSNR to best",
    "PSNR to truth",
    "SSIM to truth",
    "perceptual",
    "brightness",
    "front",
)


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table's cells, without its head."""
    body = []
    for number, row in enumerate(rows, 1):
        perceptual = "" if row.truth.perceptual is None else f"{row.truth.perceptual:.3f}"
        body.append(
            [
                str(number),
                row.name,
                seconds(row.seconds),
                *(seconds(row.stages[stage]) for stage in ("encode", "step", "decode")),
                "" if row.reference is None else _ratio(row.reference),
                _ratio(row.best),
                f"{row.truth.psnr:.2f} dB",
                f"{row.truth.ssim:.3f}",
                perceptual,
                f"{row.brightness:+.1f}",
                "yes" if row.front else "",
            ]
        )
    return body


def _ratio(distance: Distance) -> str:
    return "equal" if distance.psnr == CEILING else f"{distance.psnr:.1f} dB"


def table(result: Tradeoff) -> Table:
    """The table for the terminal."""
    found = Table(*HEAD, title=f"inside the mask, {counted(result)}; time without loading")
    for line in cells(result.rows):
        found.add_row(*line)
    return found


def counted(result: Tradeoff) -> str:
    """The number of pictures."""
    return f"{result.pictures} picture{'s' * (result.pictures != 1)}"


def page(result: Tradeoff) -> str:
    """The page as text: it needs no script, font or request."""
    from moebius_export.pages import render

    return render(
        _TEMPLATE,
        title="moebius-bench tradeoff",
        result=result,
        counted=counted(result),
        head=HEAD,
        rows=[
            [(cell, "words" if column == 1 else "") for column, cell in enumerate(line)] for line in cells(result.rows)
        ],
        plot=scatter(result.rows),
        slowest=seconds(max(row.seconds for row in result.rows)),
        measure="PSNR" if result.rows[0].truth.perceptual is None else "perceptual distance",
    )


def scatter(rows: Sequence[Row]) -> Markup:
    """Time to the right, error upward, a dot and a number a variant, a line through the Pareto front.

    The numbers lie over the drawing as text, so that they do not shrink with it.
    """
    errors = [error_of(row) for row in rows]
    low, high = min(errors), max(errors)
    slowest = max(row.seconds for row in rows)

    def place(row: Row) -> tuple[float, float]:
        up = 0.5 if high == low else (error_of(row) - low) / (high - low)
        return 940 * row.seconds / (slowest or 1) + 20, 280 - 260 * up

    shapes = [Markup('<line class="grid" x1="0" x2="1000" y1="{0}" y2="{0}"/>').format(y) for y in (20, 150, 280)]
    front = sorted((place(row) for row in rows if row.front), key=lambda point: point[0])
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in front)
    shapes.append(Markup('<polyline class="line s0" points="{}"/>').format(path))
    labels = []
    for number, row in enumerate(rows, 1):
        x, y = place(row)
        dot = '<line class="dot {}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"><title>{}</title></line>'
        shapes.append(Markup(dot).format("s0" if row.front else "s5", x, x + 0.01, y, y, row.name))
        label = '<span class="{}" style="left:{:.2f}%;top:{:.2f}%">{}</span>'
        labels.append(Markup(label).format("on" if row.front else "off", x / 10, y / 3, number))
    words = "; ".join(f"{number} {row.name}: {seconds(row.seconds)}" for number, row in enumerate(rows, 1))
    svg = Markup('<svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>')
    return Markup('<div class="scatter">{}{}</div>').format(
        svg.format(words, Markup("").join(shapes)), Markup("").join(labels)
    )
