"""The teacher network: PixelHacker's U-Net, that of Stable Diffusion with Gated Linear Attention as self-attention.

Module names are those of the released checkpoints, so that their state dicts load with `strict=True`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from moebius.network.categories import CategoryNetwork
from moebius.network.config import TeacherConfig
from moebius.network.gla import GatedLinearAttention, GlaForm, set_gla_form

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def build_unet(config: TeacherConfig) -> UNet2DConditionModel:
    """diffusers' `UNet2DConditionModel` with fresh weights, in which GLA layers replace the self-attentions."""
    from diffusers import UNet2DConditionModel  # takes seconds to import, so only when a teacher is built
    from diffusers.models.attention import BasicTransformerBlock

    unet = UNet2DConditionModel(**config.to_diffusers())
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock):
            block.attn1 = GatedLinearAttention(block.norm1.normalized_shape[0], config.num_heads, config.gate_rank)
    return unet


class Teacher(CategoryNetwork):
    """The teacher: latent-category embedding and U-Net, called as the student is (`moebius.network.student.Moebius`).

    It takes any latent size. `diff_model.enable_gradient_checkpointing()` saves memory in training.

    Example:
        >>> import torch
        >>> from moebius import Teacher, preset
        >>> teacher = Teacher(preset("tiny").teacher).eval()
        >>> sample, t = torch.randn(1, 9, 16, 16), torch.tensor([500])
        >>> noise, features = teacher.forward_features(sample, t, teacher.conditional_ids[None])
        >>> noise.shape, len(features)
        (torch.Size([1, 4, 16, 16]), 7)
    """

    config: TeacherConfig

    def __init__(self, config: TeacherConfig) -> None:
        super().__init__(config)
        self.diff_model = build_unet(config)

    def set_gla_form(self, form: GlaForm) -> None:
        """Chooses how the GLA layers compute: one of `moebius.network.gla.FORMS`."""
        set_gla_form(self, form)

    def forward_features(self, sample: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The prediction of `forward` and nine feature maps: down levels 0..3, middle block 4, up levels 5..8.

        It repeats `UNet2DConditionModel.forward`, which does not return intermediate features. With n levels there are
        2n + 1 features. Number n + 1, after the first up level, is as large as the student's after its last down level.
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
            size = skips[-1].shape[2:] if skips else None  # an odd size was rounded up when halved
            given = {"encoder_hidden_states": context} if _crosses(block) else {}
            x = block(x, taken, temb, upsample_size=size, **given)
            features.append(x)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))), features


def _crosses(block: nn.Module) -> bool:
    return bool(getattr(block, "has_cross_attention", False))
