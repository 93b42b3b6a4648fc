"""One table of all reports in docs/hardware, written into docs/status.md between two markers."""

from __future__ import annotations

from pathlib import Path

from moebius_bench.hardware.markdown import table
from moebius_bench.hardware.report import HardwareReport, Speedup, Timing, read_report
from moebius_bench.hardware.stages.torch import BASELINE
from moebius_bench.report import messages
from moebius_runtime.errors import InputError
from moebius_runtime.files import atomic_write

BEGIN = "<!-- hardware: written by scripts/prove-on-gpu.sh --table -->"
END = "<!-- /hardware -->"
_HEADS = (
    "machine",
    "checks",
    "a guided step: eager PyTorch",
    "the fastest here",
    "ratio",
    "share of the chip's limit",
    "a whole picture",
    "its ratio",
    "did not run",
)


def reports_in(folder: Path) -> list[HardwareReport]:
    """The reports of a folder, by name. Dry runs count like all others; their rows are marked.

    Raises:
        InputError: a file is no report, or is named otherwise than its report.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        report = read_report(path)
        if report.name != path.stem:
            raise InputError(f"{path} holds the report {report.name!r}; name the file {report.name}.json")
        found.append(report)
    return found


def rendered(reports: list[HardwareReport]) -> str:
    """The table's lines, or a sentence where there is no report."""
    if not reports:
        return "No report yet: nothing of the GPU path has run on a GPU."
    return "\n".join(table(_HEADS, [_row(report) for report in reports]))


def write_table(folder: Path, page: Path) -> bool:
    """Puts the table of `folder`'s reports between the markers of `page`; returns whether the page changed.

    Raises:
        InputError: the page cannot be read or does not hold each marker once, in order; or a report is none.
        OutputError: the page cannot be written.
    """
    before = _read(page)
    after = replaced(before, rendered(reports_in(folder)), page)
    if after == before:
        return False
    with atomic_write(page) as stream:
        stream.write(after.encode())
    return True


def replaced(text: str, lines: str, page: Path) -> str:
    """The page with what is between its markers replaced.

    Raises:
        InputError: the page does not hold each marker once, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise InputError(f"{page}: expected the line {BEGIN!r} once and after it {END!r} once; put them back")
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{lines}\n\n{END}{tail}"


def _read(page: Path) -> str:
    try:
        return page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {page}: {getattr(error, 'strerror', None) or error}") from error


def _row(report: HardwareReport) -> tuple[str, ...]:
    gpu = report.gpus[0].get("name") if report.gpus else None
    machine = gpu or report.machine.get("board") or report.machine.get("cpu") or report.device
    title = f"[{report.name}](hardware/{report.name}.md): {machine}"
    checks = [check for stage in report.stages for check in stage.output.checks]
    failed = sum(not check.passed for check in checks)
    broken = [stage.name for stage in report.stages if stage.status in ("failed", "timed out")]
    counted = f"{len(checks)} passed" if not failed else f"**{failed} of {len(checks)} failed**"
    if broken:
        counted += f"; **broke off: {', '.join(broken)}**"
    absent = [
        f"{stage.name} ({stage.status})" for stage in report.stages if stage.status in ("not installed", "not run")
    ]
    step, picture = (_most_gained(report, what) for what in ("a guided step", "a whole picture"))
    return (
        title + (" (dry run)" if report.dry_run else ""),
        counted,
        *_cells(step),
        *_cells(picture)[1:3],
        ", ".join(absent) or "-",
    )


def _most_gained(report: HardwareReport, what: str) -> tuple[Timing, Timing, Speedup] | None:
    """Baseline, variant and their ratio, of the variant and precision with the largest ratio; None without timings."""
    found = []
    for stage in report.stages:
        rows = {(row.subject, row.precision, row.variant): row for row in stage.output.timings}
        for pair in stage.output.speedups:
            keys = [(pair.subject, pair.precision, variant) for variant in (pair.above, pair.below)]
            if pair.subject.startswith(what) and pair.above == BASELINE and all(key in rows for key in keys):
                found.append((rows[keys[0]], rows[keys[1]], pair))
    return max(found, key=lambda each: each[2].ratio.median, default=None)


def _cells(found: tuple[Timing, Timing, Speedup] | None) -> tuple[str, str, str, str]:
    """Baseline, fastest, ratio, share of the limit."""
    if found is None:
        return ("-", "-", "-", "-")
    slow, fast, pair = found
    return (
        f"{messages.seconds(slow.seconds.median)} ({slow.precision}, {slow.subject.rpartition(', ')[2]})",
        f"{messages.seconds(fast.seconds.median)} ({fast.variant})",
        f"{pair.ratio.median:.2f}",
        "-" if fast.share is None else f"{fast.share:.0%}",
    )
