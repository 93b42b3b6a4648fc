"""The report as one page that needs nothing else: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from moebius_bench import svg, wording
from moebius_bench.results import STAGES, GraphProfile, OpShare, Report, VariantResult
from moebius_runtime import webpage

_SHOWN_PARTS = webpage.SERIES  # of a profile's bar: one colour each, the rest is left open


def page(report: Report) -> str:
    """The whole page as text."""
    done = [row for row in report.variants if row.step is not None]
    sections = [
        f"<h1>moebius-bench</h1><p class=soft>{escape(report.created)}, moebius-edge {escape(report.version)}</p>",
        f"<p>{escape(wording.warmup_line(report))}</p>",
        *(f"<p class=card>{escape(note)}</p>" for note in report.notes),
        "<h2>Variants</h2>",
        _table(report.variants),
    ]
    if done:
        sections += ["<h2>A picture, stage by stage</h2>", _stages(done), "<h2>Steps</h2>", _steps(done)]
    if report.ratios:
        sections += ["<h2>Ratios</h2>", _ratios(report)]
    sections += ["<h2>Speed against the machine's own</h2>", _roofline(report, done)]
    sections += [_profile(row.name, profile) for row in done for profile in row.profile]
    sections += ["<h2>Machine</h2>", webpage.facts(dict(wording.machine_lines(report)))]
    sections += ["<h2>Bundles</h2>", webpage.facts(dict(wording.bundle_lines(report)))]
    return webpage.document("moebius-bench", sections)


def _table(rows: Sequence[VariantResult]) -> str:
    names = ["step", "total", "load", "cold step", "memory"]
    if any(row.power is not None for row in rows):
        names.append("energy")
    body = []
    for row in rows:
        cells = [""] * len(names)
        if row.step is not None and row.total_seconds is not None:
            joules = "" if row.power is None else f"{row.power.joules_per_picture.median:.1f} J a picture"
            cells = [
                f"{row.steps} x {wording.seconds(row.step.p50)}",
                wording.seconds(row.total_seconds.median),
                wording.seconds(sum(s.median for s in row.load_seconds.values())),
                wording.seconds(row.cold_seconds["step"].median) if "step" in row.cold_seconds else "",
                wording.size(row.peak_memory or 0),
                joules,
            ][: len(names)]
        status = (row.status, "good" if row.status == "ok" else "bad")
        body.append([(row.name, ""), *((cell, "") for cell in cells), status])
    reasons = "".join(
        f"<p class=bad>{escape(f'{row.name}: {row.reason}')}</p>" for row in rows if row.reason is not None
    )
    return webpage.table(("variant", *names, "status"), body) + reasons


def _stages(rows: Sequence[VariantResult]) -> str:
    """A bar per variant, all on one scale."""
    cuts = [(row.name, {stage: row.stage_seconds[stage].median for stage in STAGES}) for row in rows]
    longest = max(sum(parts.values()) for _, parts in cuts)
    parts = [_legend(STAGES)]
    for name, values in cuts:
        words = ", ".join(f"{stage} {wording.seconds(value)}" for stage, value in values.items())
        parts.append(_headed(name, words, svg.bar(values, longest, f"{name}: {words}")))
    return _card(parts)


def _steps(rows: Sequence[VariantResult]) -> str:
    """Every step of every picture, one plot per variant, all from zero to the slowest step of all."""
    top = max(value for row in rows for picture in row.step_series for value in picture)
    parts = [f"<p class=soft>each from 0 to {wording.seconds(top)}, one line per picture</p>"]
    for row in rows:
        named = [(f"picture {index + 1}", values) for index, values in enumerate(row.step_series)]
        plot = svg.lines(named, top, f"{row.name}: seconds of each step")
        parts.append(_headed(row.name, wording.step_line(row), plot))
    return _card(parts)


def _ratios(report: Report) -> str:
    scale = max(1.2, *(ratio.max for ratio in report.ratios)) * 1.05
    parts = [f"<p class=soft>from 0 to {scale:.2f}x; the dashed mark is 1x</p>"]
    for ratio in report.ratios:
        words = wording.ratio_line(ratio)
        parts.append(f"<p>{escape(words)}</p>{svg.interval(ratio.min, ratio.median, ratio.max, scale, words)}")
    return _card(parts)


def _roofline(report: Report, rows: Sequence[VariantResult]) -> str:
    parts = [f"<p>{escape(wording.rate_line(rate))}</p>" for rate in report.rates]
    for row in rows:
        items = "".join(f"<li>{escape(line)}</li>" for line in wording.roofline_lines(row))
        parts.append(f"<p><b>{escape(row.name)}</b></p><ul>{items or '<li>cost not counted</li>'}</ul>")
    return _card(parts)


def _profile(variant: str, profile: GraphProfile) -> str:
    providers = ", ".join(f"{share.name} {share.share:.1%}" for share in profile.by_provider)
    parts = {share.name: share.share for share in profile.by_part[:_SHOWN_PARTS]}
    sections = [
        f"<h2>Where the time goes: {escape(profile.graph)}</h2>"
        f"<p class=soft>{escape(f'{variant}, {profile.runs} profiled runs; {providers}')}</p>",
        _legend(f"{name} {share:.0%}" for name, share in parts.items()),
        svg.bar(parts, 1.0, ", ".join(parts)),
    ]
    for title, shares in (
        ("part", profile.by_part),
        ("operator", profile.by_type),
        ("costliest node", profile.by_node),
    ):
        rows = [[(share.name, ""), (_share(share), "")] for share in shares[: wording.PROFILE_ROWS]]
        sections.append(webpage.table((title, "of a run"), rows))
    return "".join(sections)


def _share(share: OpShare) -> str:
    nodes = f", {share.count} nodes" if share.count > 1 else ""
    return f"{share.share:.1%}, {wording.seconds(share.seconds)}{nodes}"


def _headed(name: str, words: str, drawing: str) -> str:
    return f"<p><b>{escape(name)}</b> <span class=soft>{escape(words)}</span></p>{drawing}"


def _card(parts: Iterable[str]) -> str:
    return f"<div class=card>{''.join(parts)}</div>"


def _legend(names: Iterable[str]) -> str:
    square = "display:inline-block;width:.8rem;height:.8rem;border-radius:.15rem;margin-right:.35rem"
    keys = "".join(
        f'<span style="display:inline-block;margin-right:1rem"><i style="{square};background:{svg.colour(index)}"></i>'
        f"{escape(name)}</span>"
        for index, name in enumerate(names)
    )
    return f"<p>{keys}</p>"
