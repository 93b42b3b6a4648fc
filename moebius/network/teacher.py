"""The teacher network: PixelHacker's U-Net, that of Stable Diffusion with Gated Linear Attention as self-attention.

Module names are those of the released checkpoints, so that their state dicts load with `strict=True`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moebius.network.config import TeacherConfig
from moebius.network.gla import GatedLinearAttention, GlaForm, set_gla_form

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def build_unet(config: TeacherConfig) -> UNet2DConditionModel:
    """diffusers' `UNet2DConditionModel` with fresh weights and a GLA layer for every self-attention."""
    from diffusers import UNet2DConditionModel  # seconds to import: only where a teacher is really built
    from diffusers.models.attention import BasicTransformerBlock

    unet = UNet2DConditionModel(**config.to_diffusers())
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn1 = GatedLinearAttention(block.norm1.normalized_shape[0], config.num_heads, config.gate_rank)
    return unet


class Teacher(nn.Module):
    """The teacher: latent-category embedding and U-Net, called as the student is (`moebius.network.student.Moebius`).

    Nothing ties it to one latent size. `diff_model.enable_gradient_checkpointing()` saves memory in training.

    Example:
        >>> import torch
        >>> from moebius import Teacher, preset
        >>> teacher = Teacher(preset("tiny").teacher).eval()
        >>> sample, t = torch.randn(1, 9, 16, 16), torch.tensor([500])
        >>> noise, features = teacher.forward_features(sample, t, teacher.conditional_ids[None])
        >>> noise.shape, len(features)
        (torch.Size([1, 4, 16, 16]), 7)
    """

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding_layer = nn.Embedding(config.num_categories, config.embedding_dim)
        self.diff_model = build_unet(config)

    @property
    def conditional_ids(self) -> Tensor:
        """Category ids [m] of the conditional branch: the first half."""
        return torch.arange(self.config.tokens, device=self.embedding_layer.weight.device)

    @property
    def unconditional_ids(self) -> Tensor:
        """Category ids [m] of the unconditional branch: the second half."""
        return self.conditional_ids + self.config.tokens

    def set_gla_form(self, form: GlaForm) -> None:
        """How the GLA layers compute, see `moebius.network.gla`: `"auto"`, `"recurrence"`, `"chunked"` or `"fla"`."""
        set_gla_form(self, form)

    def forward(self, sample: Tensor, timesteps: Tensor, input_ids: Tensor) -> Tensor:
        """Predicted noise [B, 4, H, W] for sample [B, 9, H, W], timesteps [B] and category ids [B, m]."""
        return self.forward_features(sample, timesteps, input_ids)[0]

    def forward_features(self, sample: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, with the nine feature maps: down levels 0..3, the middle 4, up levels 5..8.

        This is `UNet2DConditionModel.forward` without its options, which has no outputs between. With n levels there
        are 2n + 1 features; number n + 1, after the first up level, is as large as the student's after its last down
        level.
        """
        unet = self.diff_model
        temb = unet.time_embedding(unet.time_proj(timesteps).to(sample.dtype))
        context = unet.encoder_hid_proj(self.embedding_layer(input_ids))

        x = unet.conv_in(sample)
        skips, features = [x], []
        for block in unet.down_blocks:
            given = {"encoder_hidden_states": context} if _crosses(block) else {}
            x, passed = block(x, temb, **given)
            skips += passed
            features.append(x)
        x = unet.mid_block(x, temb, encoder_hidden_states=context)
        features.append(x)
        for block in unet.up_blocks:
            count = len(block.resnets)
            taken, skips = tuple(skips[-count:]), skips[:-count]
            size = skips[-1].shape[2:] if skips else None  # where halving rounded up, doubling has to give one less
            given = {"encoder_hidden_states": context} if _crosses(block) else {}
            x = block(x, taken, temb, upsample_size=size, **given)
            features.append(x)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), features


def _crosses(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))
