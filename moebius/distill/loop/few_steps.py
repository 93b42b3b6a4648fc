"""Training tasks for fewer network evaluations: guidance distillation and latent consistency distillation.

Both train the student's conditional branch, whatever the category of a sample: it is the only one that the finished
network is called with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moebius.data.datasets import Batch
from moebius.data.encoded import LatentBatch
from moebius.distill.loop.context import TrainContext
from moebius.distill.loop.tasks import DiffusionTask, Encoder, Outcome, hole_weights
from moebius.distill.objectives.consistency import (
    consistency_function,
    ddim_step,
    earlier_timesteps,
    grid_places,
    grid_timesteps,
    pseudo_huber,
)
from moebius.distill.objectives.guidance import GuidedTeacher, guidance_loss
from moebius.distill.objectives.losses import LossOptions
from moebius.distill.objectives.timesteps import clamped_snr, sample_timesteps
from moebius.distill.settings import Settings, StartSettings
from moebius.network.lambda_layers import set_crop
from moebius.network.student import Moebius
from moebius_runtime.sampling.lcm import GRID

_ONLY_TASK = LossOptions(coarse=0.0, fine=0.0, perceptual=0.0)


class _ConditionalTask(DiffusionTask):
    """A student that learns from a guided teacher, in the conditional branch alone."""

    network: Moebius

    def __init__(
        self, network: Moebius, settings: Settings, teacher: GuidedTeacher, encode: Encoder | None = None
    ) -> None:
        super().__init__(network, _ONLY_TASK, settings, encode=encode)
        self._guided, self.frozen = teacher, (teacher,)

    def samples(self, batch: Batch | LatentBatch) -> LatentBatch:
        """The batch as latents, with the categories of the conditional branch."""
        sample = super().samples(batch)
        ids = self.network.conditional_ids.to(sample.categories.device)
        return sample._replace(categories=ids.expand(sample.latents.shape[0], -1))  # [B, m]

    def _set_place(self, network: Moebius, place: tuple[float, float]) -> None:
        super()._set_place(network, place)
        if isinstance(self._guided.network, Moebius):
            set_crop(self._guided.network, place)

    def _teach(self, seen: Tensor, timesteps: Tensor, context: TrainContext) -> Tensor:
        with context.autocast():
            wanted: Tensor = self._guided(seen, timesteps)
        return wanted


class GuidanceTask(_ConditionalTask):
    """Guidance distillation, see `moebius.distill.objectives.guidance`."""

    def outcome(self, module: nn.Module, batch: Batch | LatentBatch, context: TrainContext) -> Outcome:
        """The squared error between the conditional output and the teacher's guided prediction."""
        sample, noisy = self._noised(self.network, batch, context)
        seen = torch.cat([noisy.latents, sample.mask, sample.masked], dim=1)  # [B, 9, S, S]
        predicted, _ = module(seen, noisy.timesteps, sample.categories)
        loss = guidance_loss(
            predicted, self._teach(seen, noisy.timesteps, context), self._weight(sample, noisy.timesteps)
        )
        return Outcome(loss, {"loss/guidance": loss.detach()})


class ConsistencyTask(_ConditionalTask):
    """Latent consistency distillation, see `moebius.distill.objectives.consistency`.

    The target network is `average`, the average of the network in training.
    """

    sampler = "lcm"

    def __init__(
        self, network: Moebius, settings: Settings, teacher: GuidedTeacher, encode: Encoder | None = None
    ) -> None:
        super().__init__(network, settings, teacher, encode)
        self._options = settings.consistency
        self._place: tuple[float, float] | None = None

    def _draw_timesteps(self, count: int, context: TrainContext) -> Tensor:
        """Timesteps of the grid, int64 [count]."""
        drawn = self._timesteps
        places = sample_timesteps(
            count, context.generator, sampling=drawn.sampling, count=GRID, mean=drawn.mean, std=drawn.std
        )
        return grid_timesteps(places)

    def _draw_start_timesteps(self, options: StartSettings, count: int, context: TrainContext) -> Tensor:
        """Timesteps of the grid, int64 [count]."""
        first, last = grid_places(options.least, options.most)
        return grid_timesteps(torch.randint(first, last + 1, (count,), generator=context.generator))

    def _weight(self, sample: LatentBatch, timesteps: Tensor) -> Tensor | None:
        """Weights of the distance between clean latents, by region and timestep."""
        weight = None if self._hole_weight == 1 else hole_weights(sample.mask, self._hole_weight)
        if self._snr is None:
            return weight
        by_time = clamped_snr(timesteps, self._bars, self._snr.least, self._snr.most).to(sample.mask.device)
        return by_time if weight is None else weight * by_time

    def _set_place(self, network: Moebius, place: tuple[float, float]) -> None:
        super()._set_place(network, place)
        self._place = place

    def outcome(self, module: nn.Module, batch: Batch | LatentBatch, context: TrainContext) -> Outcome:
        """The pseudo-Huber distance between the student's f and the averaged network's f, one DDIM step further."""
        assert self.average is not None, "the trainer sets it; settings without an average are refused"
        sample, noisy = self._noised(self.network, batch, context)
        start, end = noisy.timesteps, earlier_timesteps(noisy.timesteps)
        kind, bars = self.prediction_type, self._bars

        def seen(latents: Tensor) -> Tensor:
            return torch.cat([latents, sample.mask, sample.masked], dim=1)  # [B, 9, S, S]

        given: tuple[Any, ...] = (seen(noisy.latents), start, sample.categories)
        predicted, _ = module(*given)
        with torch.no_grad():
            guided = self._teach(given[0], start, context)
            earlier = ddim_step(noisy.latents, guided, start, end, bars, kind)
            with self._average_on_crops(self.average), context.autocast():
                target = self.average(seen(earlier), end, sample.categories)
            wanted = consistency_function(earlier, target, end, bars, kind)
        ours = consistency_function(noisy.latents, predicted, start, bars, kind)
        loss = pseudo_huber(ours, wanted, self._options.huber, self._weight(sample, start))
        return Outcome(loss, {"loss/consistency": loss.detach()})

    @contextmanager
    def _average_on_crops(self, average: nn.Module) -> Iterator[None]:
        """The averaged network takes the batch's crops within the block; elsewhere whole pictures, as for samples."""
        set_crop(average, self._place)
        try:
            yield
        finally:
            set_crop(average, None)
