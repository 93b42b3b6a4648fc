"""The results of a verification: one `Check` per question, and the report that holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from moebius_runtime.files import atomic_write

Status = Literal["pass", "fail", "not run", "note"]
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Check:
    """One check and its result.

    Attributes:
        area: files, manifest, weights, parity, placement, trajectory, picture, engine or bisect.
        subject: what was checked, such as `unet fp32`.
        name: of the check, such as `relative error`.
        status: `not run` is never a pass; a `note` has no verdict.
        measured, budget: the figure and its limit, if the check has them.
        detail: where it failed or why it was not run.
    """

    area: str
    subject: str
    name: str
    status: Status
    measured: float | None = None
    budget: float | None = None
    detail: str = ""


def at_most(area: str, subject: str, name: str, measured: float, budget: float, detail: str = "") -> Check:
    """A check that a figure is at most its budget; NaN fails."""
    return Check(area, subject, name, "pass" if measured <= budget else "fail", measured, budget, detail)


def at_least(area: str, subject: str, name: str, measured: float, budget: float, detail: str = "") -> Check:
    """A check that a figure is at least its budget; NaN fails."""
    return Check(area, subject, name, "pass" if measured >= budget else "fail", measured, budget, detail)


def verdict(area: str, subject: str, name: str, problem: str | None, passed: str = "") -> Check:
    """A check without a figure, which fails if there is a problem."""
    return Check(area, subject, name, "fail" if problem else "pass", detail=problem or passed)


@dataclass(frozen=True)
class Trajectory:
    """Latent drift of one candidate: entry 0 is the start, entry i the latents after step i, timestep `timesteps[i-1]`.

    `drift` is the relative L2 distance from PyTorch's latents. It is shorter if the candidate stopped early.
    """

    subject: str
    timesteps: list[int]
    drift: list[float]


@dataclass(frozen=True)
class Placement:
    """Types and providers of the MACs of a graph.

    `rows` are (provider, element type, GMAC, share of the graph); `ahead` is the GMAC that the runtime folded from
    constants while loading.
    """

    subject: str
    rows: list[tuple[str, str, float, float]]
    ahead: float


@dataclass(frozen=True)
class Pictures:
    """Pictures of one candidate for the page: uint8 [S, S, 3] each; `candidate` is None if it gave no picture."""

    subject: str
    before: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_]
    reference: npt.NDArray[np.uint8]
    candidate: npt.NDArray[np.uint8] | None


@dataclass
class Report:
    """All results. `facts` names what was compared, and the versions and options."""

    bundle: str
    facts: Mapping[str, str]
    stand_in: bool
    checks: list[Check] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    pictures: list[Pictures] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Whether every check was run and passed, and there was at least one."""
        statuses = {check.status for check in self.checks}
        return "pass" in statuses and not statuses & {"fail", "not run"}

    @property
    def exit_code(self) -> int:
        """0 if every check passed, else 1."""
        return 0 if self.held else 1

    def count(self, status: Status) -> int:
        """How many checks have that status."""
        return sum(check.status == status for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """JSON data with stable keys. Figures that are not finite are the strings inf, -inf and nan."""
        return {
            "schema_version": SCHEMA_VERSION,
            "bundle": self.bundle,
            "held": self.held,
            "exit_code": self.exit_code,
            "stand_in_weights": self.stand_in,
            "facts": dict(self.facts),
            "checks": [_plain(asdict(check)) for check in self.checks],
            "trajectories": [_plain(asdict(trajectory)) for trajectory in self.trajectories],
            "placement": [
                {
                    "subject": placement.subject,
                    "gmac_worked_out_while_loading": placement.ahead,
                    "ran": [
                        {"provider": provider, "type": kind, "gmac": gmac, "share": share}
                        for provider, kind, gmac, share in placement.rows
                    ],
                }
                for placement in self.placements
            ],
        }


def write_json(report: Report, path: str | Path) -> None:
    """Writes the report as JSON, whole or not at all."""
    text = json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
    with atomic_write(path) as stream:
        stream.write(text.encode())


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
