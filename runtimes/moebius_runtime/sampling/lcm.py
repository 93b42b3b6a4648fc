"""The sampler of latent consistency models: clean latents at every step, then noise of the next timestep.

Luo et al. 2023, "Latent Consistency Models" (arXiv 2310.04378), algorithm 3. Such a network was distilled so that one
evaluation leads from any timestep to the start of the trajectory. The constants below are part of the trained
function, so training (`moebius.distill.objectives.consistency`) takes them from here.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import InputError
from moebius_runtime.sampling.samplers import Callback, Cancelled, Denoise, check_timesteps, clean_latents, walk
from moebius_runtime.sampling.schedule import Latents, NoiseSchedule

GRID = 50
"""Timesteps of the distillation, evenly spaced: every 20th of 1,000, as in the paper (k = 20)."""
SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


def interval(num_train_timesteps: int) -> int:
    """k, the training timesteps between two timesteps of the grid: 20 of 1,000."""
    return num_train_timesteps // GRID


def boundary(timestep: float) -> tuple[float, float]:
    """c_skip and c_out of a timestep, for f = c_skip * noisy + c_out * clean (Luo et al. 2023, section 4.1).

    With s = 10 * timestep: 0.5² / (s² + 0.5²) and s / sqrt(s² + 0.5²), so that f is the identity at timestep 0.
    """
    scaled, data = timestep * TIMESTEP_SCALING, SIGMA_DATA**2
    below = scaled**2 + data
    return data / below, scaled / below**0.5


def lcm_timesteps(schedule: NoiseSchedule, steps: int, strength: float = 1.0) -> npt.NDArray[np.int64]:
    """The timesteps to evaluate, int64 [steps], falling: evenly chosen from the distillation's grid.

    The grid of 1,000 training timesteps is 19, 39, ..., 999; 4 steps take 999, 759, 499 and 259, as diffusers'
    `LCMScheduler` does. Unlike in `NoiseSchedule.inference_timesteps`, `strength` drops no step: it shortens the grid
    to its first int(50 * strength) timesteps, so that the run starts with less noise.

    Raises:
        InputError: strength is not above 0 and at most 1, or the grid has fewer timesteps than `steps`.
    """
    if schedule.num_train_timesteps < GRID:
        raise InputError(
            f"the schedule has {schedule.num_train_timesteps} timesteps and sampler lcm takes {GRID} of them; use "
            "another sampler"
        )
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}; expected a number above 0 and at most 1 (default 0.99).")
    kept = int(GRID * strength)
    if not 1 <= steps <= kept:
        raise InputError(
            f"{steps} steps with sampler lcm at strength {strength:g}; expected 1 to {kept}, the timesteps that the "
            "network was distilled at"
        )
    grid = np.arange(kept, 0, -1, dtype=np.int64) * interval(schedule.num_train_timesteps) - 1
    places = np.floor(np.linspace(0, kept, num=steps, endpoint=False)).astype(np.int64)
    chosen: npt.NDArray[np.int64] = grid[places]
    return chosen


def lcm(
    denoise: Denoise,
    latents: Latents,
    schedule: NoiseSchedule,
    timesteps: npt.NDArray[np.int64],
    callback: Callback | None = None,
    cancelled: Cancelled | None = None,
    *,
    noises: Iterator[Latents],
) -> Latents:
    """Multistep sampling of a latent consistency model: Luo et al. 2023, algorithm 3.

    Each step predicts clean latents, f = c_skip * noisy + c_out * clean, and adds fresh noise of the next timestep;
    the last step adds none.

    Args:
        denoise: the network, see `Denoise`; called once per timestep.
        latents: float32 [B, 4, h, w], at the noise level of timesteps[0].
        schedule: the process that the network was trained on.
        timesteps: int64 [n], strictly falling, as `lcm_timesteps` gives them.
        callback: called after every step, see `Callback`.
        cancelled: asked before every step, see `Cancelled`.
        noises: noise of the latents' shape for each step but the last, see `schedule.noise_stream`.

    Returns:
        Clean latents, float32 [B, 4, h, w], on the latents' scale.

    Raises:
        CancelledError: `cancelled` returned True.
        InputError: the latents, the timesteps or the noise are not as described.
        OutputError: the prediction has another shape, or it or the latents are not finite.
    """
    falling = check_timesteps(schedule, timesteps)

    def advance(step: int, x: Latents, noise: Latents) -> Latents:
        timestep = falling[step]
        skip, out = boundary(timestep)
        reached: Latents = skip * x + out * clean_latents(schedule, x, noise, timestep)
        return reached if step == len(falling) - 1 else schedule.add_noise(reached, next(noises), falling[step + 1])

    return walk(denoise, latents, schedule, timesteps, callback, cancelled, advance)
