"""The modules that are exported: the network with everything inside that a device should not have to know.

Only students with the released network's layers are accepted; those of `moebius.network.variants` raise `ExportError`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebius import Moebius
from moebius_export.errors import ExportError
from moebius_runtime.bundle.manifest import GraphName


def unet_graphs(student: Moebius, *, distilled: bool = False) -> dict[GraphName, GuidedUNet | ConditionalUNet]:
    """The wrappers of the graphs that a student is exported to, in eval mode.

    Both branches with guidance, and the conditional branch alone. Of a network whose guidance is distilled there is one
    graph, `unet`: its conditional branch.
    """
    conditional = ConditionalUNet(student).eval()
    return {"unet": conditional} if distilled else {"unet": GuidedUNet(student).eval(), "unet_conditional": conditional}


class GuidedUNet(nn.Module):
    """Both guidance branches in one batch, order [unconditional, conditional]; guided noise out.

    Classifier-free guidance (Ho and Salimans, 2022): eps = eps_u + g * (eps_c - eps_u). The latent categories are
    constants of the checkpoint, so they are inside.
    """

    branches = 2
    category_ids: Tensor

    def __init__(self, student: Moebius) -> None:
        super().__init__()
        _check_layers(student)
        self.student = student
        ids = torch.stack([student.unconditional_ids, student.conditional_ids])  # [2, m]
        self.register_buffer("category_ids", ids, persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor, guidance_scale: Tensor) -> Tensor:
        """Sample float32 [B, 9, S, S], timestep int64 [1], guidance_scale float32 [1] -> noise [B, 4, S, S]."""
        return self.guided(*self.both(sample, timestep), guidance_scale)

    def both(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The noise of the unconditional and of the conditional branch, each float32 [B, 4, S, S]."""
        batch = sample.shape[0]
        ids = self.category_ids.repeat_interleave(batch, dim=0)  # [2B, m]
        noise = self.student(torch.cat([sample, sample]), timestep.expand(2 * batch), ids)  # [2B, 4, S, S]
        return parted(noise, batch)

    @staticmethod
    def guided(unconditional: Tensor, conditional: Tensor, guidance_scale: Tensor) -> Tensor:
        """The guided noise [B, 4, S, S] of both branches' noise."""
        return unconditional + guidance_scale * (conditional - unconditional)


def parted(noise: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The noise [2B, 4, S, S] of both branches as [B, 4, S, S] each.

    `chunk` reads the number of parts from the example's B and so fixes an open B to it; it stays where B is fixed, so
    that those graphs keep their bytes.
    """
    unconditional, conditional = noise.chunk(2) if isinstance(batch, int) else noise.split([batch, batch])
    return unconditional, conditional


class ConditionalUNet(nn.Module):
    """The conditional branch alone: equal to guidance at a scale of 1, or distilled guidance, at half the cost."""

    branches = 1
    category_ids: Tensor

    def __init__(self, student: Moebius) -> None:
        super().__init__()
        _check_layers(student)
        self.student = student
        self.register_buffer("category_ids", student.conditional_ids[None], persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Sample float32 [B, 9, S, S] and timestep int64 [1] -> noise [B, 4, S, S]."""
        batch = sample.shape[0]
        return self.student(sample, timestep.expand(batch), self.category_ids.expand(batch, -1))


def _check_layers(student: Moebius) -> None:
    """The rewrites, the layer functions and the runtimes' kernels are made for the released network's layers."""
    if changed := student.config.changed_layers:
        raise ExportError(
            f"a student with {', '.join(f'{name} {value}' for name, value in changed.items())} was given; only the "
            "released network's layers can be exported, train a student with those"
        )
