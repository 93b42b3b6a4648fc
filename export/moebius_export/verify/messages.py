"""Formats the report: messages, and a table for a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moebius_export.verify.results import Report

_STYLES = {"pass": "green", "fail": "bold red", "not run": "bold yellow", "note": "dim"}


def figure(value: float | None) -> str:
    """Formats a figure with few digits."""
    if value is None:
        return ""
    return f"{value:.2e}" if value != 0 and abs(value) < 0.001 else f"{value:.6g}"


def summary(report: Report) -> str:
    """The result in one line."""
    counts = f"{report.count('pass')} passed, {report.count('fail')} failed, {report.count('not run')} not run"
    if report.held:
        return f"the bundle matches the PyTorch network in every check: {counts}"
    if report.count("fail"):
        return f"the bundle does not match the PyTorch network: {counts}"
    return f"not verified, because some checks were not run: {counts}"


def placement_lines(report: Report) -> list[str]:
    """The types and providers of the MACs, one line per graph."""
    lines = []
    for placement in report.placements:
        rows = ", ".join(f"{gmac:.2f} GMAC ({share:.2%}) {kind} on {who}" for who, kind, gmac, share in placement.rows)
        ahead = f"; {placement.ahead:.2f} GMAC folded while loading" if placement.ahead else ""
        lines.append(f"{placement.subject}: {rows or 'nothing was found in the profile'}{ahead}")
    return lines


def drift_lines(report: Report) -> list[str]:
    """Latent drift step by step, one line per candidate."""
    lines = []
    for trajectory in report.trajectories:
        names = ["start", *(f"t={timestep}" for timestep in trajectory.timesteps)]
        steps = ", ".join(f"{name} {value:.2e}" for name, value in zip(names, trajectory.drift, strict=False))
        lines.append(f"{trajectory.subject}: {steps or 'no step was reached'}")
    return lines


def explanations(report: Report) -> list[str]:
    """One line for every check that did not pass, and for the coverage of the comparison of weights."""
    lines = []
    for check in report.checks:
        if check.status != "pass" or check.name == "equal the checkpoint":
            lines.append(f"{check.status}: {check.subject}, {check.name}: {check.detail or 'exceeds its budget'}")
    return lines


def render(report: Report) -> RenderableType:
    """The report for a terminal: a table of 80 columns, then lines of text."""
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
        ("MACs, from the runtime's profile", placement_lines(report)),
        ("latent drift, relative L2", drift_lines(report)),
    ):
        if lines:
            parts += ["", Text(title, "dim"), *map(Text, lines)]
    parts += ["", Text(summary(report), "bold green" if report.held else "bold red")]
    return Group(*parts)
