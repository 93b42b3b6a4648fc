"""Every sampler by its name, the timesteps that it takes, and the noise that it needs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt

from moebius_runtime.sampling.lcm import lcm, lcm_timesteps
from moebius_runtime.sampling.samplers import SAMPLERS, SPACINGS, Sampler
from moebius_runtime.sampling.schedule import Latents, NoiseSchedule

SAMPLER_NAMES: tuple[str, ...] = (*SAMPLERS, "lcm")
"""`SAMPLERS` and `lcm`, which only networks of the consistency objective can be sampled with."""


def sampler_of(name: str, noises: Iterator[Latents]) -> Sampler:
    """The sampler of a name in `SAMPLER_NAMES`; `lcm` takes its noise from `noises`, see `schedule.noise_stream`."""
    return partial(lcm, noises=noises) if name == "lcm" else SAMPLERS[name]


def timesteps_of(schedule: NoiseSchedule, name: str, steps: int, strength: float) -> npt.NDArray[np.int64]:
    """The timesteps that a sampler evaluates, int64 [n], falling.

    See `lcm.lcm_timesteps`, and `NoiseSchedule.inference_timesteps` for the other samplers.
    """
    if name == "lcm":
        return lcm_timesteps(schedule, steps, strength)
    return schedule.inference_timesteps(steps, strength, SPACINGS[name])
