"""The report in words and as a table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebius_export.verify.results import Report

_STYLES = {"pass": "green", "fail": "bold red", "not run": "bold yellow", "note": "dim"}


def figure(value: float | None) -> str:
    """A figure in as few characters as say something."""
    if value is None:
        return ""
    return f"{value:.2e}" if value != 0 and abs(value) < 0.001 else f"{value:.6g}"


def summary(report: Report) -> str:
    """One line: what came out."""
    counts = f"{report.count('pass')} passed, {report.count('fail')} failed, {report.count('not run')} not run"
    if report.held:
        return f"the bundle is the PyTorch network, as far as was asked: {counts}"
    if report.count("fail"):
        return f"the bundle is not the PyTorch network: {counts}"
    return f"not proven, since a check that was not run is no pass: {counts}"


def placement_lines(report: Report) -> list[str]:
    """Where the products ran, a line per graph."""
    lines = []
    for placement in report.placements:
        rows = ", ".join(f"{gmac:.2f} GMAC ({share:.2%}) {kind} on {who}" for who, kind, gmac, share in placement.rows)
        ahead = f"; {placement.ahead:.2f} GMAC worked out while loading" if placement.ahead else ""
        lines.append(f"{placement.subject}: {rows or 'nothing was found in the profile'}{ahead}")
    return lines


def drift_lines(report: Report) -> list[str]:
    """Latent drift step by step, a line per candidate."""
    lines = []
    for trajectory in report.trajectories:
        names = ["start", *(f"t={timestep}" for timestep in trajectory.timesteps)]
        steps = ", ".join(f"{name} {value:.2e}" for name, value in zip(names, trajectory.drift, strict=False))
        lines.append(f"{trajectory.subject}: {steps or 'no step was reached'}")
    return lines


def explanations(report: Report) -> list[str]:
    """Every check that is no pass in words, and what the passed comparison of the weights covered."""
    lines = []
    for check in report.checks:
        if check.status != "pass" or check.name == "equal the checkpoint":
            lines.append(f"{check.status}: {check.subject}, {check.name}: {check.detail or 'beyond its budget'}")
    return lines


def render(report: Report) -> RenderableType:
    """The whole report for a terminal: a table of 80 columns, then lines of words."""
    parts: list[RenderableType] = []
    width = max(map(len, report.facts), default=0) + 2
    for name, value in report.facts.items():
        parts.append(Text.assemble((f"{name:<{width}}", "dim"), value))
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", show_edge=False)
    for column in ("status", "what"):
        table.add_column(column, no_wrap=column == "status")
    table.add_column("check", no_wrap=True)
    for column in ("measured", "budget"):
        table.add_column(column, justify="right", no_wrap=True)
    for check in report.checks:
        status = Text(check.status, _STYLES[check.status])
        figures = figure(check.measured), figure(check.budget)
        table.add_row(status, Text(check.subject), Text(check.name), *figures)
    parts += ["", table]
    for title, lines in (
        ("where and why", explanations(report)),
        ("products, read back from the runtime", placement_lines(report)),
        ("latent drift, relative L2", drift_lines(report)),
    ):
        if lines:
            parts += ["", Text(title, "dim"), *map(Text, lines)]
    parts += ["", Text(summary(report), "bold green" if report.held else "bold red")]
    return Group(*parts)
