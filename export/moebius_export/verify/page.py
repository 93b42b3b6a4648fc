"""The report as one page: what held, the drift, and the pictures with their difference amplified."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from moebius_export.verify.results import Pictures, Report
from moebius_export.verify.wording import explanations, figure, placement_lines, summary
from moebius_runtime import webpage
from moebius_runtime.files import atomic_write

_CSS = {"pass": "good", "fail": "bad", "not run": "bad", "note": "soft"}
_AMPLIFIED = 64


def write_page(report: Report, path: str | Path) -> None:
    """The report as one HTML file, written whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(page(report).encode())


def page(report: Report) -> str:
    """The whole page as text."""
    sections = [
        "<h1>moebius-export verify</h1>",
        f'<p class="{"good" if report.held else "bad"}"><b>{escape(summary(report))}</b></p>',
    ]
    if report.stand_in:
        words = "These are stand-in weights, random numbers: what is filled in is noise by design."
        sections.append(f"<p class=card>{words}</p>")
    if not report.held:
        items = "".join(f"<p>{escape(line)}</p>" for line in explanations(report) if not line.startswith("pass"))
        sections.append(f"<h2>Where and why</h2><div class=card>{items}</div>")
    for pictures in report.pictures:
        sections += [f"<h2>Pictures: {escape(pictures.subject)}</h2>", _pictures(pictures)]
    if report.trajectories:
        sections.append("<h2>Latent drift</h2>")
    for trajectory in report.trajectories:
        limits = [c.budget for c in report.checks if c.area == "trajectory" and c.subject == trajectory.subject]
        label = f"{trajectory.subject}: relative L2 distance from PyTorch, from the start to the last step"
        sections.append(webpage.log_plot([("drift", trajectory.drift)], limits[0] or 0.0, label))
    sections += ["<h2>Checks</h2>", _checks(report)]
    if report.placements:
        items = "".join(f"<p>{escape(line)}</p>" for line in placement_lines(report))
        sections.append(f"<h2>Products, read back from the runtime</h2><div class=card>{items}</div>")
    sections += ["<h2>What was compared</h2>", webpage.facts(report.facts)]
    return webpage.document("moebius-export verify", sections)


def _checks(report: Report) -> str:
    rows = [
        (
            (check.status, _CSS[check.status]),
            (f"{check.subject}: {check.name}", "words"),
            (figure(check.measured), ""),
            (figure(check.budget), ""),
            (check.detail, "soft words"),
        )
        for check in report.checks
    ]
    return webpage.table(("", "", "measured", "budget", ""), rows)


def _pictures(pictures: Pictures) -> str:
    shown = [
        ("before, hole in red", _marked(pictures.before, pictures.mask)),
        ("PyTorch", pictures.reference),
    ]
    if pictures.candidate is None:
        return webpage.pictures(shown) + "<p class=bad>The candidate gave no picture.</p>"
    difference = np.abs(pictures.candidate.astype(int) - pictures.reference)
    amplified = np.clip(difference * _AMPLIFIED, 0, 255).astype(np.uint8)
    shown += [("candidate", pictures.candidate), (f"difference, {_AMPLIFIED} times", amplified)]
    return webpage.pictures(shown)


def _marked(picture: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    marked = picture.copy()
    marked[mask] = (0.4 * picture[mask] + 0.6 * np.array([255, 0, 0])).astype(np.uint8)
    return marked
