"""The options of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moebius_calibration.graph.gain import RATES, Rates
from moebius_calibration.plan import Observer, Target


@dataclass(frozen=True)
class Int8Options:
    """How to calibrate and search.

    Attributes:
        target: which runtime the files are for.
        data: folder of images and masks, see `scenes.scenes_of`; None draws them.
        pictures, steps, seed: of the trajectories.
        observer: None tries all of them and takes the one with the least error.
        error: largest relative L2 error of a graph's output in one run.
        psnr: least PSNR in dB inside the mask, against float32, of a whole picture that was not calibrated on.
        samples: number of recorded runs that each trial is evaluated on.
        evaluations: above this number of nodes, those of a module are tried together.
        rates: cost model of the device, in microseconds; None takes the built-in one of the target.
        slower: nodes that INT8 does not make faster on this machine -> why they stay in float, see `files.machine`;
            named as by `graphs.same_node`.
        state: file for the statistics after each picture, from which a stopped calibration resumes.
    """

    target: Target = "tensorrt"
    data: Path | None = None
    pictures: int = 8
    steps: int = 20
    seed: int = 1
    observer: Observer | None = None
    error: float = 0.03
    psnr: float = 35.0
    samples: int = 2
    evaluations: int = 400
    rates: Rates | None = None
    state: Path | None = None
    slower: Mapping[str, str] = field(default_factory=dict)

    @property
    def cost_model(self) -> Rates:
        """The rates that gains are computed with."""
        return self.rates or RATES[self.target]
