"""Stage `doctor`: what `moebius-export doctor` finds."""

from __future__ import annotations

from pathlib import Path

from moebius_bench.hardware.recorder import Recorder


def run(record: Recorder) -> None:
    """Records every row of the doctor. A probe that broke is a failed check; a missing library is none."""
    from moebius_export.doctor import Sources, examine
    from moebius_export.doctor.rows import Verdict

    bundle = record.request.bundle
    report = examine(None if bundle is None else Path(bundle), Sources(), lambda what: None)
    for part in report.parts:
        for row in part.rows:
            record.fact(f"{part.name}: {row.name}", f"{row.verdict.value}: {row.found}")
    broken = [row for row in report.rows() if row.verdict is Verdict.failed]
    for row in broken:
        record.check(row.name, "the doctor's probe works", passed=False, detail=row.found)
    if not broken:
        record.check("the doctor", "every probe works", passed=True, detail=f"{len(report.rows())} rows")
    record.fact("can run here", ", ".join(report.usable) or "no runtime")
    if report.sound is not None:
        record.check("the bundle", "is sound", report.sound)
