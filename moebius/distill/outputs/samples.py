"""Sample pictures of a network in training: truth, masked picture, result."""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from moebius.data.datasets import Batch
from moebius.data.encoded import LatentBatch
from moebius.distill.loop.assembly import device_of
from moebius.distill.loop.tasks import DiffusionTask, Task, TaskSampler, VaeTask, evaluating
from moebius.network.config import PredictionType
from moebius.network.student import Moebius
from moebius.network.teacher import Teacher
from moebius.network.vae import VaeDecoder

Picture = npt.NDArray[np.uint8]


@torch.no_grad()
def fill_latents(
    network: Moebius | Teacher,
    batch: LatentBatch,
    *,
    steps: int,
    guidance_scale: float,
    generator: torch.Generator,
    prediction_type: PredictionType = "epsilon",
    sampler: TaskSampler = "ddim",
) -> Tensor:
    """Fills the masked region from noise, with guidance between the category branches.

    Args:
        network: in eval mode.
        batch: `latents` give the shape only.
        steps: of the sampler.
        guidance_scale: 1 evaluates the conditional branch alone.
        generator: of the starting noise and of the noise between steps of `lcm`, on the CPU.
        prediction_type: what the network predicts.
        sampler: `ddim` (Song et al. 2020), evenly spaced in 1000 timesteps, or `lcm` (Luo et al. 2023) on the grid
            of the distillation, for networks of the consistency objective.

    Returns:
        Scaled latents [B, 4, S, S].
    """
    from diffusers import DDIMScheduler, LCMScheduler  # seconds to import

    kind = {"ddim": DDIMScheduler, "lcm": LCMScheduler}[sampler]
    drawing = {"generator": generator} if sampler == "lcm" else {}
    scheduler = kind(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,
    )
    scheduler.set_timesteps(steps)
    device = batch.masked.device
    latents = torch.randn(batch.latents.shape, generator=generator).to(device)
    count = latents.shape[0]
    ids = network.conditional_ids[None].expand(count, -1)  # [B, m]
    against = network.unconditional_ids[None].expand(count, -1)
    for timestep in scheduler.timesteps:
        times = timestep.to(device).expand(count)
        seen = torch.cat([latents, batch.mask, batch.masked], dim=1)  # [B, 9, S, S]
        predicted = network(seen, times, ids)
        if guidance_scale != 1:
            other = network(seen, times, against)
            predicted = other + guidance_scale * (predicted - other)
        latents = scheduler.step(predicted, int(timestep), latents, **drawing).prev_sample
    return latents


def sheet(
    task: Task,
    network: nn.Module,
    batch: Batch | LatentBatch,
    decoder: VaeDecoder | None,
    *,
    steps: int,
    guidance_scale: float,
    seed: int = 0,
) -> Picture:
    """Draws one row per sample, uint8 [rows * height, columns * width, 3].

    For a VAE: the picture and its reconstruction. For student or teacher: truth, masked picture, filled picture, all
    through the VAE, the last with the truth outside the masked region.
    """
    with evaluating(network):
        if isinstance(task, VaeTask):
            assert isinstance(batch, Batch)
            with torch.no_grad():
                columns = [batch.image, network(batch.image.to(device_of(network))).sample.cpu()]
        else:
            columns = _filled(cast(DiffusionTask, task), network, batch, decoder, steps, guidance_scale, seed)
    rows = torch.cat(columns, dim=3)  # [B, 3, H, columns * W]
    joined = rows.permute(0, 2, 3, 1).flatten(0, 1)  # [B * H, columns * W, 3]
    return ((joined + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()


def _filled(
    task: DiffusionTask,
    network: nn.Module,
    batch: Batch | LatentBatch,
    decoder: VaeDecoder | None,
    steps: int,
    guidance_scale: float,
    seed: int,
) -> list[Tensor]:
    assert decoder is not None
    assert isinstance(network, Moebius | Teacher)
    device = device_of(network)
    samples = task.samples(batch).to(device)
    generator = torch.Generator().manual_seed(seed)
    filled = fill_latents(
        network,
        samples,
        steps=steps,
        guidance_scale=guidance_scale,
        generator=generator,
        prediction_type=task.prediction_type,
        sampler=task.sampler,
    )
    decoder = decoder.to(device)
    with torch.no_grad():
        truth, masked, new = (decoder(value).cpu() for value in (samples.latents, samples.masked, filled))
    mask = samples.mask.cpu()
    masked_at = nn.functional.interpolate(mask, size=truth.shape[2:], mode="nearest")
    return [truth, masked, truth * (1 - masked_at) + new * masked_at]
