"""The report as one page: what held, the drift, and the pictures with their difference amplified."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from moebius_export.pages import png_uri, render
from moebius_export.verify.results import Pictures, Report
from moebius_export.verify.wording import explanations, figure, placement_lines, summary
from moebius_runtime.files import atomic_write

_TEMPLATE = Path(__file__).with_name("templates") / "verify.html"
_CSS = {"pass": "good", "fail": "bad", "not run": "bad", "note": "soft"}
_AMPLIFIED = 64


def write_page(report: Report, path: str | Path) -> None:
    """The report as one HTML file, written whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(page(report).encode())


def page(report: Report) -> str:
    """The whole page as text."""
    failures = [line for line in explanations(report) if not line.startswith("pass")]
    limits = {check.subject: check.budget or 0.0 for check in report.checks if check.area == "trajectory"}
    return render(
        _TEMPLATE,
        title="moebius-export verify",
        report=report,
        summary=summary(report),
        failures=[] if report.held else failures,
        pictures=[(one.subject, _captioned(one)) for one in report.pictures],
        trajectories=[(one.subject, one.drift, limits[one.subject]) for one in report.trajectories],
        checks=[
            (
                (check.status, _CSS[check.status]),
                (f"{check.subject}: {check.name}", "words"),
                (figure(check.measured), ""),
                (figure(check.budget), ""),
                (check.detail, "soft words"),
            )
            for check in report.checks
        ],
        placements=placement_lines(report) if report.placements else [],
    )


def _captioned(pictures: Pictures) -> list[tuple[str, str]]:
    """Captions and `data:` addresses; two of them where the candidate gave no picture."""
    shown = [
        ("before, masked region in red", _marked(pictures.before, pictures.mask)),
        ("PyTorch", pictures.reference),
    ]
    if pictures.candidate is not None:
        difference = np.abs(pictures.candidate.astype(int) - pictures.reference)
        amplified = np.clip(difference * _AMPLIFIED, 0, 255).astype(np.uint8)
        shown += [("candidate", pictures.candidate), (f"difference, {_AMPLIFIED} times", amplified)]
    return [(caption, png_uri(pixels)) for caption, pixels in shown]


def _marked(picture: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    marked = picture.copy()
    marked[mask] = (0.4 * picture[mask] + 0.6 * np.array([255, 0, 0])).astype(np.uint8)
    return marked
