"""The Markdown page of a report. Everything in it is read from the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moebius_bench.hardware.report import ChipRate, HardwareReport, StageResult, Timing
from moebius_bench.report import messages

_TERA = 1e12


def page(report: HardwareReport) -> str:
    """The whole page, with a newline at its end."""
    return "\n".join([*_head(report), *(line for stage in report.stages for line in _stage(stage))]) + "\n"


def _head(report: HardwareReport) -> Iterator[str]:
    failed = [stage.name for stage in report.stages if not stage.held]
    verdict = f"Failed: {', '.join(failed)}." if failed else "Every check that ran passed."
    yield f"# {cell(report.name)}"
    yield ""
    if report.dry_run:
        yield "**A dry run** of tiny networks on a CPU. It shows that the stages run; its times mean nothing."
        yield ""
    yield (
        f"{verdict} Made by `scripts/prove-on-gpu.sh` on {report.created}, version {cell(report.version)}"
        f"{f', commit {cell(report.commit)}' if report.commit else ''}, in {report.seconds:.0f} s of "
        f"{report.budget_seconds:.0f} s. Networks: preset {report.preset}, {report.weights}, so no picture means "
        "anything; times do not depend on the weights."
    )
    yield ""
    rows = [("device", report.device), *report.machine.items()]
    for gpu in report.gpus:
        rows.append(
            (f"GPU {gpu.get('index', '')}".strip(), ", ".join(f"{k} {v}" for k, v in gpu.items() if k != "index"))
        )
    installed = ", ".join(f"{k} {v}" for k, v in report.libraries.items() if v != "not installed")
    missing = ", ".join(name for name, version in report.libraries.items() if version == "not installed")
    rows += [("installed", installed), ("not installed", missing or "nothing")]
    yield from table(("machine", ""), rows)
    yield ""
    yield from table(
        ("stage", "ended", "checks", "seconds", ""),
        [
            (
                stage.title,
                stage.verdict.partition(":")[0].partition(",")[0],
                _count(stage),
                f"{stage.seconds:.0f} of {stage.budget_seconds:.0f}",
                stage.reason,
            )
            for stage in report.stages
        ],
    )


def _count(stage: StageResult) -> str:
    checks = stage.output.checks
    return f"{sum(check.passed for check in checks)} of {len(checks)} passed" if checks else "-"


def _stage(stage: StageResult) -> Iterator[str]:
    output = stage.output
    if not (output.checks or output.timings or output.rates or output.facts or output.notes):
        return
    yield ""
    yield f"## {cell(stage.title)}"
    for note in output.notes:
        yield ""
        yield f"- {cell(note)}"
    if output.rates:
        yield ""
        yield from table(
            ("rate of the chip", "precision", "size", "median", "min to max"),
            [(rate.kind, rate.precision, str(rate.size), *_rate(rate)) for rate in output.rates],
        )
    if output.timings:
        yield ""
        yield from table(
            ("what", "variant", "precision", "median", "min to max", "runs", "the chip's limit", "share of it"),
            [_timing(row) for row in output.timings],
        )
    if output.speedups:
        yield ""
        yield from table(
            ("what", "precision", "ratio of", "to", "median", "min to max", "rounds"),
            [
                (
                    row.subject,
                    row.precision,
                    row.above,
                    row.below,
                    f"**{row.ratio.median:.2f}**",
                    f"{row.ratio.min:.2f} to {row.ratio.max:.2f}",
                    str(row.ratio.count),
                )
                for row in output.speedups
            ],
        )
    if output.checks:
        yield ""
        yield from table(
            ("check", "", "measured", "limit", ""),
            [
                (
                    check.subject,
                    check.name,
                    "-" if check.measured is None else f"{check.measured:.2g}",
                    "-" if check.limit is None else f"{check.limit:.2g}",
                    ("passed" if check.passed else "**failed**") + (f": {check.detail}" if check.detail else ""),
                )
                for check in output.checks
            ],
        )
    if output.facts:
        yield ""
        yield from table(("found", ""), list(output.facts.items()))


def _rate(rate: ChipRate) -> tuple[str, str]:
    unit, value = "TMAC/s" if rate.kind == "matmul" else "TB/s", rate.per_second
    return f"{value.median / _TERA:.3g} {unit}", f"{value.min / _TERA:.3g} to {value.max / _TERA:.3g}"


def _timing(row: Timing) -> tuple[str, ...]:
    limit = "-"
    if row.bound is not None:
        by = "bytes" if row.bound.seconds_by_bytes >= row.bound.seconds_by_macs else "MACs"
        limit = f"{messages.seconds(row.bound.seconds)} ({by}: {messages.size(row.bound.bytes)}, "
        limit += f"{messages.gmac(row.bound.macs)} GMAC)"
    return (
        row.subject,
        row.variant,
        row.precision,
        messages.seconds(row.seconds.median),
        f"{messages.seconds(row.seconds.min)} to {messages.seconds(row.seconds.max)}",
        str(row.seconds.count),
        limit,
        "-" if row.share is None else f"{row.share:.0%}",
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table. Cells hold no character that would break it."""
    yield f"| {' | '.join(map(cell, heads))} |"
    yield f"|{' --- |' * len(heads)}"
    for row in rows:
        yield f"| {' | '.join(map(cell, row))} |"


def cell(text: str) -> str:
    """Text on one line, with the characters escaped that mean something in a table or as HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
