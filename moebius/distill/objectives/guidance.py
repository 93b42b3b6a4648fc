"""Guidance distillation: one conditional output learns what guidance makes of two.

Meng et al. 2023, "On Distillation of Guided Diffusion Models" (arXiv 2210.03142), section 3.1, stage one, at one fixed
scale. The paper's guided prediction is (1 + w) c - w u, with c and u of the conditional and the unconditional branch.
This project's `guidance_scale` is g = 1 + w, as in the runtime and in diffusers: u + g (c - u).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebius.distill.objectives.losses import mean_squared_error
from moebius.network.student import Moebius
from moebius.network.teacher import Teacher


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """The guided prediction u + scale * (c - u), which is c + w (c - u) with w = scale - 1; float32 at least.

    It is linear, so it holds for noise, velocity and clean latents alike. Both inputs are [B, 4, S, S].
    """
    dtype = torch.promote_types(conditional.dtype, torch.float32)
    base = unconditional.to(dtype)
    return base + scale * (conditional.to(dtype) - base)


class GuidedTeacher(nn.Module):
    """A frozen network as a teacher: its guided prediction.

    Args:
        network: student or teacher network with trained weights; it is put into eval mode.
        scale: of the guidance. 1 evaluates the conditional branch alone, which is also right for a network whose
            conditional output was distilled already.
    """

    def __init__(self, network: Moebius | Teacher, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network.requires_grad_(False).eval(), scale

    @torch.no_grad()
    def forward(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        """Noisy latents, mask and masked latents [B, 9, S, S] and timesteps [B] -> guided prediction [B, 4, S, S]."""
        count, network = sample.shape[0], self.network
        conditional = network.conditional_ids[None].expand(count, -1)  # [B, m]
        if self.scale == 1:
            predicted: Tensor = network(sample, timesteps, conditional)
            return predicted.to(torch.promote_types(predicted.dtype, torch.float32))
        ids = torch.cat([network.unconditional_ids[None].expand(count, -1), conditional])  # [2B, m]
        both = network(torch.cat([sample, sample]), timesteps.repeat(2), ids)  # [2B, 4, S, S]
        unconditional, wanted = both.chunk(2)
        return guided(wanted, unconditional, self.scale)


def guidance_loss(predicted: Tensor, wanted: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared error between the student's conditional output and the guided prediction; a scalar.

    It is the paper's loss, which is on clean latents, with the weight that the network was trained with: the
    signal-to-noise ratio (SNR) for a network that predicts noise, SNR + 1 for velocity.

    Args:
        predicted: [B, 4, S, S], with its graph.
        wanted: of the same shape; detached.
        weight: [B, 1, S, S], of squared errors; None is uniform.

    Raises:
        TrainingError: the shapes differ.
    """
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return mean_squared_error(predicted.to(dtype), wanted.detach(), "the guided prediction", weight)
