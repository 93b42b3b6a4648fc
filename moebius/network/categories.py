"""What student and teacher have in common: the latent categories, their embedding, and how the network is called."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebius.network.config import StudentConfig, TeacherConfig


class CategoryNetwork(nn.Module):
    """Embedding of the latent categories and a U-Net. Subclasses build `diff_model` and implement `forward_features`.

    The attributes are named as in the released state dicts: `embedding_layer` and `diff_model`.
    """

    def __init__(self, config: StudentConfig | TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_layer = nn.Embedding(config.num_categories, config.embedding_dim)

    @property
    def conditional_ids(self) -> Tensor:
        """Category ids [m] of the conditional branch: the first half."""
        return torch.arange(self.config.tokens, device=self.embedding_layer.weight.device)

    @property
    def unconditional_ids(self) -> Tensor:
        """Category ids [m] of the unconditional branch: the second half."""
        return self.conditional_ids + self.config.tokens

    def forward(self, sample: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Predicted noise (or velocity) [B, 4, H, W] for sample [B, 9, H, W], timesteps [B], category ids [B, m]."""
        return self.forward_features(sample, timesteps, input_ids)[0]

    def forward_features(self, sample: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The prediction of `forward` and the feature maps that distillation compares."""
        raise NotImplementedError
