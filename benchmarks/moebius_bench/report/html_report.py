"""The report as one page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moebius_bench.measure.results import STAGES, OpShare, Report, VariantResult
from moebius_bench.report import messages

_TEMPLATE = Path(__file__).with_name("templates") / "bench.html"


def page(report: Report) -> str:
    """The whole page as text."""
    from moebius_export.pages import render  # a measurement on a device imports nothing of the export

    done = [row for row in report.variants if row.step is not None]
    stages = [(row.name, {stage: row.stage_seconds[stage].median for stage in STAGES}) for row in done]
    head, variants = _variants(report.variants)
    return render(
        _TEMPLATE,
        title="moebius-bench",
        report=report,
        done=done,
        messages=messages,
        variants_head=head,
        variants=variants,
        stage_names=STAGES,
        stages=stages,
        longest_picture=max((sum(values.values()) for _, values in stages), default=0.0),
        slowest_step=max((value for row in done for picture in row.step_series for value in picture), default=0.0),
        ratio_scale=max([1.2, *(ratio.max for ratio in report.ratios)]) * 1.05,
        named=lambda series: [(f"picture {index + 1}", values) for index, values in enumerate(series)],
        shares=lambda found: {share.name: share.share for share in found},
        shares_in_words=lambda found: [f"{share.name} {share.share:.0%}" for share in found],
        share_rows=lambda found: [[(share.name, ""), (_share(share), "")] for share in found],
        dict=dict,
    )


def _variants(rows: Sequence[VariantResult]) -> tuple[list[str], list[list[tuple[str, str]]]]:
    """Head and rows of (text, CSS classes) cells; the energy's column only where a sensor gave some."""
    names = ["step", "total", "load", "cold step", "memory"]
    if any(row.power is not None for row in rows):
        names.append("energy")
    body = []
    for row in rows:
        cells = [""] * len(names)
        if row.step is not None and row.total_seconds is not None:
            joules = "" if row.power is None else f"{row.power.joules_per_picture.median:.1f} J a picture"
            cells = [
                f"{row.steps} x {messages.seconds(row.step.p50)}",
                messages.seconds(row.total_seconds.median),
                messages.seconds(sum(s.median for s in row.load_seconds.values())),
                messages.seconds(row.cold_seconds["step"].median) if "step" in row.cold_seconds else "",
                messages.size(row.peak_memory or 0),
                joules,
            ][: len(names)]
        status = (row.status, "good" if row.status == "ok" else "bad")
        body.append([(row.name, ""), *((cell, "") for cell in cells), status])
    return ["variant", *names, "status"], body


def _share(share: OpShare) -> str:
    nodes = f", {share.count} nodes" if share.count > 1 else ""
    return f"{share.share:.1%}, {messages.seconds(share.seconds)}{nodes}"
