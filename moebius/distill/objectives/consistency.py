"""Latent consistency distillation: one evaluation leads from any timestep to the start of the trajectory.

Luo et al. 2023, "Latent Consistency Models" (arXiv 2310.04378), algorithm 1, at one fixed guidance scale. With the
teacher's guided prediction, one DDIM step leads from the noisy latents at timestep t to those at t - k. The student's
f at t learns the f of its average (EMA) at t - k. The loss and the grid of timesteps follow the public recipe,
diffusers' `examples/consistency_distillation`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moebius.distill.objectives.timesteps import add_noise, predict_clean, predict_noise
from moebius.errors import TrainingError
from moebius.network.config import PredictionType
from moebius_runtime.sampling.lcm import GRID, SIGMA_DATA, TIMESTEP_SCALING, interval


@dataclass(frozen=True)
class ConsistencyOptions:
    """Options of the consistency objective.

    Attributes:
        steps: evaluations that the finished weights recommend to the runtime, 1 to 50. Training does not depend on it.
        huber: c of the pseudo-Huber loss.

    Raises:
        TrainingError: a number is out of its range.
    """

    steps: int = 4
    huber: float = 0.001

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= GRID:
            raise TrainingError(f"the recommended steps are {self.steps}; expected 1 to {GRID} (usual: 2 to 8)")
        if not (math.isfinite(self.huber) and self.huber > 0):
            raise TrainingError(f"the pseudo-Huber loss's c is {self.huber}; expected a number above 0 (usual: 0.001)")


def grid_timesteps(places: Tensor, count: int = 1000) -> Tensor:
    """Timesteps of places 0 to 49 on the distillation's grid, int64: 19, 39, ..., 999 of 1,000."""
    return (places + 1) * interval(count) - 1


def grid_places(least: int, most: int, count: int = 1000) -> tuple[int, int]:
    """First and last place on the grid whose timesteps are `least` to `most`; first > last where none is."""
    step = interval(count)
    return max(-(-(least + 1) // step) - 1, 0), (most + 1) // step - 1


def earlier_timesteps(timesteps: Tensor, count: int = 1000) -> Tensor:
    """The timesteps t - k after one step of the teacher, k = 20 of 1,000; at least 0, where f is the identity."""
    return (timesteps - interval(count)).clamp(min=0)


def boundary(timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """c_skip and c_out, each float64 [B, 1, 1, 1]: `moebius_runtime.sampling.lcm.boundary` of a batch."""
    scaled = timesteps.double()[:, None, None, None] * TIMESTEP_SCALING
    below = scaled.square() + SIGMA_DATA**2
    return SIGMA_DATA**2 / below, scaled / below.sqrt()


def consistency_function(
    noisy: Tensor,
    predicted: Tensor,
    timesteps: Tensor,
    bars: Tensor,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """f = c_skip * noisy + c_out * clean, the clean latents being those that the prediction implies.

    Luo et al. 2023, equation 9. Shapes and dtypes as in `moebius.distill.objectives.timesteps.predict_clean`.
    """
    clean = predict_clean(noisy, predicted, timesteps, bars, prediction_type)
    skip, out = (value.to(clean.dtype) for value in boundary(timesteps))
    return skip * noisy + out * clean


def ddim_step(
    noisy: Tensor,
    predicted: Tensor,
    start: Tensor,
    end: Tensor,
    bars: Tensor,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """One DDIM step without added noise, from timesteps `start` to `end`, both int64 [B].

    Song et al. 2021, equation 12 with sigma 0. `predicted` is the guided prediction, see
    `moebius.distill.objectives.guidance.guided`: the step is linear in it, so this is the guided solver of Luo et al.
    2023, equation 15. Shapes and dtypes as in `moebius.distill.objectives.timesteps.add_noise`.
    """
    clean = predict_clean(noisy, predicted, start, bars, prediction_type)
    noise = predict_noise(noisy, predicted, start, bars, prediction_type)
    return add_noise(clean, noise, end, bars)


def pseudo_huber(ours: Tensor, theirs: Tensor, c: float, weight: Tensor | None = None) -> Tensor:
    """Mean over elements of sqrt(d² + c²) - c, d = ours - theirs; a scalar.

    Song and Dhariwal 2023, "Improved Techniques for Training Consistency Models", section 3.2, per element as in the
    public recipe. Between d² / 2c near 0 and |d| far from it.

    Args:
        ours: [B, 4, S, S], with its graph.
        theirs: of the same shape; detached.
        c: above 0.
        weight: [B, 1, S, S]; None is uniform.

    Raises:
        TrainingError: the shapes differ.
    """
    if ours.shape != theirs.shape:
        raise TrainingError(f"clean latents {list(ours.shape)} and {list(theirs.shape)}; expected equal shapes")
    errors = (ours - theirs.detach().to(ours.dtype)).square()
    distances = torch.sqrt(errors + c**2) - c
    return (distances if weight is None else distances * weight).mean()
