"""The report for a terminal."""

from __future__ import annotations

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from moebius_bench.measure.results import GraphProfile, Report, Summary, VariantResult
from moebius_bench.report import messages

_WIDTH = 160  # of the tables where the output is no terminal
# Columns that a terminal narrower than so many leaves to the lines under the table.
_LEFT_OUT = {120: ("import", "pre", "paste"), 90: ("load",)}


def wide(console: Console) -> Console:
    """What tables are printed to: as wide as the terminal, or 160 columns in a file."""
    return console if console.is_terminal else Console(file=console.file, width=_WIDTH, highlight=False)


def print_report(report: Report, console: Console) -> None:
    """Prints everything."""
    tables = wide(console)
    for part in _parts(report, tables.width):
        if isinstance(part, Table):
            tables.print(part, soft_wrap=False)
        else:
            console.print(part)


def _parts(report: Report, width: int) -> list[RenderableType]:
    parts: list[RenderableType] = [_table(report.variants, width)]
    for row in report.variants:
        parts.append(Text())
        parts.append(Text(row.name, style="bold"))
        parts += [Text(f"  {line}") for line in _lines(row)]
        parts += [_profile(profile) for profile in row.profile]
    if report.ratios:
        parts += [Text(), Text("ratios, round by round", style="bold")]
        parts += [Text(f"  {messages.ratio_line(ratio)}") for ratio in report.ratios]
    parts += [Text(), Text("machine", style="bold")]
    parts += [Text(f"  {messages.rate_line(rate)}") for rate in report.rates]
    parts += [Text(f"  {name}: {value}") for name, value in messages.machine_lines(report)]
    parts += [Text(), Text("bundles", style="bold")]
    parts += [Text(f"  {name}: {value}") for name, value in messages.bundle_lines(report)]
    parts += [Text(), Text(messages.warmup_line(report))]
    parts += [Text(f"note: {note}", style="yellow") for note in report.notes]
    return parts


def _table(rows: list[VariantResult], width: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("variant", overflow="fold", min_width=12)
    names = ("import", "load", "cold step", "pre", "encode", "step", "decode", "paste", "total", "memory")
    left_out = [name for least, minor in _LEFT_OUT.items() if width < least for name in minor]
    shown = [name for name in names if name not in left_out]
    for name in shown:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("status", no_wrap=True)
    for row in rows:
        if row.total_seconds is None or row.step is None:
            table.add_row(row.name, *["-"] * len(shown), Text("failed", style="red"))
            continue
        stages = row.stage_seconds
        load = sum(s.median for s in row.load_seconds.values())
        memory = messages.size(row.peak_memory or 0)
        if row.peak_device_memory:
            memory += f" + {messages.size(row.peak_device_memory)} device"
        cells = (
            _median(row.import_seconds),
            messages.seconds(load),
            _median(row.cold_seconds.get("step")),
            _median(stages["preprocess"]),
            _median(stages["encode"]),
            f"{row.steps} x {messages.seconds(row.step.p50)}",
            _median(stages["decode"]),
            _median(stages["paste"]),
            messages.seconds(row.total_seconds.median),
            memory,
        )
        status = Text(row.status, style="green" if row.status == "ok" else "red")
        table.add_row(row.name, *(c for name, c in zip(names, cells, strict=True) if name in shown), status)
    return table


def _median(value: Summary | None) -> str:
    return "-" if value is None else messages.seconds(value.median)


def _lines(row: VariantResult) -> list[str]:
    if row.step is None:
        return [f"failed: {row.reason}"]
    lines = [f"{row.status}: {row.reason}"] if row.reason else []
    lines += [messages.step_line(row), *messages.roofline_lines(row)]
    lines.append(
        f"import {_median(row.import_seconds)}, "
        + ", ".join(f"load {name} {messages.seconds(s.median)}" for name, s in row.load_seconds.items())
    )
    lines.append(", ".join(f"cold {name} {messages.seconds(s.median)}" for name, s in row.cold_seconds.items()))
    if row.power is not None:
        p = row.power
        lines.append(
            f"{p.joules_per_picture.median:.1f} J a picture ({p.joules_per_picture.min:.1f} to "
            f"{p.joules_per_picture.max:.1f}), {p.watts.median:.1f} W, read from {p.source}"
        )
    if row.difference_to_first is not None:
        lines.append(f"largest difference to the first variant's picture: {row.difference_to_first} of 255 levels")
    ran = ", ".join(f"{name} {value}" for name, value in row.described.items())
    lines.append(f"ran: {ran}; picture {row.output_sha256[0][:16]}")
    return lines


def _profile(profile: GraphProfile) -> Table:
    by_provider = ", ".join(f"{share.name} {share.share:.1%}" for share in profile.by_provider)
    table = Table(
        box=None,
        title=f"profile of {profile.graph}, {profile.runs} runs; {by_provider}",
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for name in ("part", "share", "operator", "share", "costliest node", "share", "a run"):
        left = name in ("part", "operator", "costliest node")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for index in range(min(messages.PROFILE_ROWS, len(profile.by_node))):
        cells = []
        for shares in (profile.by_part, profile.by_type):
            cells += [shares[index].name, f"{shares[index].share:.1%}"] if index < len(shares) else ["", ""]
        node = profile.by_node[index]
        table.add_row(*cells, node.name, f"{node.share:.1%}", messages.seconds(node.seconds))
    return table
