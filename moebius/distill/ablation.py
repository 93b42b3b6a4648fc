"""Which losses help: the same student trained with one set of them after another (paper, table 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from moebius.config import PredictionType
from moebius.data.encoded import EncodedStream, LatentBatch
from moebius.distill.losses import NAMES, LossOptions
from moebius.distill.samples import fill_latents
from moebius.distill.settings import Settings
from moebius.distill.tasks import evaluating
from moebius.distill.timesteps import add_noise, alphas_cumprod, velocity
from moebius.distill.trainer import Trainer
from moebius.errors import TrainingError
from moebius.student import Moebius
from moebius.vae import VaeDecoder

Combination = tuple[str, tuple[str, ...], bool]
"""A name, the losses that are on, and whether they are balanced."""

COMBINATIONS: tuple[Combination, ...] = (
    ("task", ("task",), False),
    ("fine", ("fine",), False),
    ("task + fine", ("task", "fine"), True),
    ("task + coarse", ("task", "coarse"), True),
    ("task + fine + coarse", ("task", "fine", "coarse"), True),
    ("task + fine + coarse, not balanced", ("task", "fine", "coarse"), False),
)
"""The paper's rows without the perceptual loss, whose weights are not free; rows with it where it can be had."""
_TIMESTEPS = (100, 300, 500, 700, 900)


class Row(NamedTuple):
    """What one combination reached on samples that it was not trained on.

    Attributes:
        name: of the combination.
        error: mean squared error of what is predicted, over five timesteps.
        psnr: in dB, of the filled pictures inside of their holes, against the true picture through the VAE; pixels of
            all samples together.
        seconds: of the training.
    """

    name: str
    error: float
    psnr: float
    seconds: float


def settings_of(base: Settings, combination: Combination, steps: int) -> Settings:
    """A run's settings with one combination of losses; what is on has the multiplier of `base`, or 1.

    Raises:
        TrainingError: a combination needs a teacher, or the perceptual loss' weights, and `base` has none.
    """
    name, active, balanced = combination
    multipliers = {loss: (base.losses.multiplier(loss) or 1.0) if loss in active else 0.0 for loss in NAMES}
    losses = LossOptions(**multipliers, taps=base.losses.taps)
    if losses.needs_teacher and base.teacher is None:
        raise TrainingError(f"the combination {name} compares with a teacher and the settings have none; name one")
    if losses.perceptual and base.perceptual is None:
        raise TrainingError(f"the combination {name} needs `perceptual: {{weights: FILE}}` in the settings")
    out = base.out / name.replace(" ", "").replace(",", "-")
    update = {"losses": losses, "balance": replace(base.balance, enabled=balanced), "steps": steps, "out": out}
    return base.model_copy(update=update | {"save_every": steps, "samples": None, "tensorboard": False})


def evaluate(
    student: Moebius,
    held_out: EncodedStream,
    decoder: VaeDecoder,
    *,
    count: int,
    steps: int,
    prediction_type: PredictionType = "epsilon",
    seed: int = 0,
) -> tuple[float, float]:
    """`Row.error` and `Row.psnr` on the first `count` samples of a stream that is at its start.

    Noise is drawn from `seed`, so every network sees the same.
    """
    with evaluating(student):
        return _evaluate(student, held_out, decoder, count, steps, prediction_type, seed)


def _evaluate(
    student: Moebius,
    held_out: EncodedStream,
    decoder: VaeDecoder,
    count: int,
    steps: int,
    prediction_type: PredictionType,
    seed: int,
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(seed)
    bars, errors, inside, places = alphas_cumprod(), [], 0.0, 0.0
    done = 0
    for batch in held_out:
        errors.append(_error(student, batch, bars, generator, prediction_type))
        filled = fill_latents(
            student, batch, steps=steps, guidance_scale=1.0, generator=generator, prediction_type=prediction_type
        )
        with torch.no_grad():
            truth, new = (decoder(value).clamp(-1, 1) for value in (batch.latents, filled))
        hole = torch.nn.functional.interpolate(batch.mask, size=truth.shape[2:], mode="nearest")
        inside += float(((truth - new).square() * hole).sum())
        places += float(hole.sum()) * truth.shape[1]
        done += batch.latents.shape[0]
        if done >= count:
            break
    psnr = 10 * torch.log10(torch.tensor(4 * places / inside))  # pixels from -1 to 1: a range of 2
    return float(torch.stack(errors).mean()), float(psnr)


@torch.no_grad()
def _error(
    student: Moebius, batch: LatentBatch, bars: Tensor, generator: torch.Generator, prediction_type: PredictionType
) -> Tensor:
    terms = []
    count = batch.latents.shape[0]
    ids = student.conditional_ids[None].expand(count, -1)
    for timestep in _TIMESTEPS:
        times = torch.full((count,), timestep)
        noise = torch.randn(batch.latents.shape, generator=generator)
        seen = torch.cat([add_noise(batch.latents, noise, times, bars), batch.mask, batch.masked], dim=1)
        target = noise if prediction_type == "epsilon" else velocity(batch.latents, noise, times, bars)
        terms.append((student(seen, times, ids) - target).square().mean())
    return torch.stack(terms).mean()


def ablate(
    base: Settings,
    steps: int,
    measure: Callable[[Moebius], tuple[float, float]],
    *,
    combinations: tuple[Combination, ...] = COMBINATIONS,
    on_step: Callable[[str, int], None] = lambda name, step: None,
    on_row: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """Trains each combination for `steps` from the same weights on the same batches, and measures it.

    Args:
        base: a student's run; its losses and steps are replaced.
        steps: of each.
        measure: gives error and PSNR of the trained (averaged) network, see `evaluate`.
        combinations: which.
        on_step: told name and step.
        on_row: given each row when it is known.
    """
    import time

    rows = []
    for combination in combinations:
        name, started = combination[0], time.perf_counter()
        trainer = Trainer(settings_of(base, combination, steps))
        trainer.on_step = lambda report, name=name: on_step(name, report.step)  # type: ignore[misc]
        trainer.run()
        seconds = time.perf_counter() - started
        network = trainer.weights
        assert isinstance(network, Moebius)
        rows.append(Row(name, *measure(network), seconds))
        on_row(rows[-1])
    return rows
