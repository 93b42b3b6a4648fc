"""The times as a table for the terminal."""

from __future__ import annotations

from rich.table import Table

from moebius_bench.browser.measure import BrowserTimes
from moebius_bench.report.messages import seconds


def table(result: BrowserTimes) -> Table:
    """One line a site."""
    drawn = Table(
        title=f"{result.graph} on {result.provider}, {result.browser}, {result.rounds} rounds", title_justify="left"
    )
    for name in ("site", "precision", "nodes", "files", "largest", "load", "run", "ratio", "error", "peak memory"):
        drawn.add_column(name)
    for one, ratio in zip(result.sites, result.ratios, strict=True):
        drawn.add_row(
            one.site,
            one.precision,
            f"{one.nodes:,}",
            f"{one.bytes / 1e6:,.0f} MB",
            f"{one.largest_file / 1e6:.1f} MB",
            seconds(one.load_seconds),
            f"{seconds(one.run_seconds.median)} ({seconds(one.run_seconds.min)} to {seconds(one.run_seconds.max)})",
            f"{ratio:.2f}",
            "" if one.error is None else f"{one.error:.1e}",
            "" if one.peak_bytes is None else f"{one.peak_bytes / 1e9:.2f} GB",
        )
    return drawn
