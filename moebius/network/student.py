"""The student network: a U-Net of depthwise-separable residual blocks and LλMI transformers (paper, section 3.2).

Module names are those of the released checkpoints, so that their state dicts load with `strict=True`. A config with
other layers (`moebius.network.variants`) gives one of the networks that the paper compares the released one with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moebius.network.categories import CategoryNetwork
from moebius.network.config import Convolution, StudentConfig
from moebius.network.gla import GatedLinearAttention
from moebius.network.lambda_layers import InteractiveLambda, LambdaForm, LocalLambda, set_lambda_form
from moebius.network.variants import CrossAttention, GegluFeedForward


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding [B, dim] of integer timesteps [B], cosine half first, float32."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies[None]  # [B, dim / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class SeparableConv(nn.Module):
    """3x3 depthwise and 1x1 convolution, each with a batch norm. Adds its input where the channels are equal."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_dw = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.residual = in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]."""
        y = self.bn2(self.conv_pw(F.relu(self.bn1(self.conv_dw(x)))))
        return x + y if self.residual else y


def _convolution(kind: Convolution, in_channels: int, out_channels: int) -> nn.Module:
    """A 3x3 convolution: separable as in the released network, or full as in the teacher."""
    if kind == "full":
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return SeparableConv(in_channels, out_channels)


class TimeEmbedding(nn.Module):
    """Timestep embedding: sinusoids, two linear layers, and the SiLU that every residual block applies to it."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timesteps: Tensor) -> Tensor:
        """Integers [B] -> [B, dim]."""
        sinusoids = timestep_embedding(timesteps, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        return F.silu(self.linear_2(F.silu(self.linear_1(sinusoids))))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with the timestep embedding added between them. Separable in the released network."""

    def __init__(
        self, in_channels: int, out_channels: int, time_dim: int, groups: int, convolution: Convolution = "separable"
    ) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-5)
        self.conv1 = _convolution(convolution, in_channels, out_channels)
        self.time_emb_proj = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = _convolution(convolution, out_channels, out_channels)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """[B, in, H, W] and activated timestep embedding [B, time_dim] -> [B, out, H, W]."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(temb)[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class NamedConv(nn.Module):
    """Wraps a convolution as `conv`, to match the checkpoints' tensor names (`inverted_conv.conv`)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Applies the convolution."""
        return self.conv(x)


class MixFeedForward(nn.Module):
    """Mix-FFN: expand, 3x3 depthwise, gate, project."""

    def __init__(self, dim: int, mult: int) -> None:
        super().__init__()
        hidden = dim * mult
        self.inverted_conv = NamedConv(nn.Conv2d(dim, hidden, 1))
        self.depth_conv = NamedConv(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden))
        self.point_conv = NamedConv(nn.Conv2d(hidden // 2, dim, 1, bias=False))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, n, C] -> [B, n, C]."""
        height, width = size
        image = x.transpose(1, 2).unflatten(2, (height, width))  # [B, C, H, W]
        value, gate = self.depth_conv(F.silu(self.inverted_conv(image))).chunk(2, dim=1)
        return self.point_conv(value * F.silu(gate)).flatten(2).transpose(1, 2)  # [B, n, C]


class LambdaBlock(nn.Module):
    """Pre-norm transformer block with residuals: Local-λ, Interactive-λ and Mix-FFN, or the config's replacements."""

    def __init__(self, dim: int, positions: int, config: StudentConfig) -> None:
        super().__init__()
        heads, context_dim = config.num_heads, config.cross_attention_dim
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn1 = (
            GatedLinearAttention(dim, heads)
            if config.self_attention == "gla"
            else LocalLambda(dim, heads, config.window)
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.attn2 = (
            CrossAttention(dim, heads, context_dim)
            if config.cross_attention == "attention"
            else InteractiveLambda(dim, heads, positions, config.tokens, context_dim)
        )
        self.norm3 = nn.LayerNorm(dim, eps=1e-5)
        self.ff = GegluFeedForward(dim) if config.feed_forward == "geglu" else MixFeedForward(dim, config.ff_mult)

    def forward(self, x: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, n, C] and context [B, m, cross_attention_dim] -> [B, n, C]."""
        y = self.norm1(x)
        x = x + (self.attn1(y) if isinstance(self.attn1, GatedLinearAttention) else self.attn1(y, size))
        x = x + self.attn2(self.norm2(x), context, size)
        return x + self.ff(self.norm3(x), size)


class LambdaTransformer(nn.Module):
    """LλMI transformer: a `LambdaBlock` between two 1x1 convolutions, with a residual connection."""

    def __init__(self, dim: int, positions: int, config: StudentConfig) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, dim, eps=1e-6)
        self.proj_in = nn.Conv2d(dim, dim, 1)
        self.transformer_blocks = nn.ModuleList([LambdaBlock(dim, positions, config)])
        self.proj_out = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W] and context [B, m, cross_attention_dim] -> [B, C, H, W]."""
        size = (x.shape[2], x.shape[3])
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # [B, n, C]
        for block in self.transformer_blocks:
            tokens = block(tokens, context, size)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, size))  # tokens -> [B, C, H, W]


class Resample(nn.Module):
    """3x3 convolution with stride 2, or nearest-neighbour upsampling by 2 followed by a 3x3 convolution."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, 2H, 2W] or [B, C, H/2, W/2]."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if self.up else x)


class Level(nn.Module):
    """One resolution of the U-Net: residual blocks, each followed by a transformer, then an optional resampler."""

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int,
        positions: int,
        config: StudentConfig,
        time_dim: int,
        resample: str | None,
    ) -> None:
        super().__init__()
        groups = config.norm_num_groups
        self.resnets = nn.ModuleList(
            ResidualBlock(channels, out_channels, time_dim, groups, config.convolution) for channels in in_channels
        )
        self.attentions = nn.ModuleList(LambdaTransformer(out_channels, positions, config) for _ in in_channels)
        if resample is not None:
            resampler = nn.ModuleList([Resample(out_channels, up=resample == "up")])
            setattr(self, f"{resample}samplers", resampler)
        self.resampler_name = None if resample is None else f"{resample}samplers.0"

    def resample(self, x: Tensor) -> Tensor | None:
        """[B, C, H, W] at the next level's resolution, or None if this is the last level."""
        return None if self.resampler_name is None else self.get_submodule(self.resampler_name)(x)


class DiffusionModel(nn.Module):
    """The U-Net without the latent-category embedding."""

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        levels = len(channels)
        first, time_dim = channels[0], channels[0] * 4
        positions = [(config.sample_size >> level) ** 2 for level in range(levels)]
        self.gradient_checkpointing = False

        self.conv_in = _convolution(config.convolution, config.in_channels, first)
        self.time_embedding = TimeEmbedding(first, time_dim)
        self.encoder_hid_proj = nn.Linear(config.embedding_dim, config.cross_attention_dim)

        skips = [first]  # channels of every skip connection, in push order
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(channels):
            inputs = [channels[max(level - 1, 0)]] + [width] * (config.layers_per_block - 1)
            last = level == levels - 1
            resample = None if last else "down"
            self.down_blocks.append(Level(inputs, width, positions[level], config, time_dim, resample))
            skips += [width] * (config.layers_per_block + (not last))

        self.up_blocks = nn.ModuleList()
        below = channels[-1]
        for level in reversed(range(levels)):
            width = channels[level]
            inputs = []
            for _ in range(config.layers_per_block + 1):
                inputs.append(below + skips.pop())
                below = width
            resample = "up" if level else None
            self.up_blocks.append(Level(inputs, width, positions[level], config, time_dim, resample))

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, first, eps=1e-5)
        self.conv_out = _convolution(config.convolution, first, config.out_channels)

    def forward(self, sample: Tensor, timesteps: Tensor, embeddings: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The prediction and the feature maps of all levels.

        Args:
            sample: [B, 9, S, S]: noisy latents, mask, latents of the masked picture.
            timesteps: [B] integers in 0..999.
            embeddings: [B, m, embedding_dim], the latent categories.

        Returns:
            The prediction [B, 4, S, S], and the output of each down level and each up level.
        """
        temb = self.time_embedding(timesteps)
        context = self.encoder_hid_proj(embeddings)

        x = self.conv_in(sample)
        skips, features = [x], []
        for level in _levels(self.down_blocks):
            for resnet, attention in zip(level.resnets, level.attentions, strict=True):
                x = self._run(attention, self._run(resnet, x, temb), context)
                skips.append(x)
            if (smaller := level.resample(x)) is not None:
                x = smaller
                skips.append(x)
            features.append(x)
        for level in _levels(self.up_blocks):
            for resnet, attention in zip(level.resnets, level.attentions, strict=True):
                x = torch.cat([x, _matching(skips.pop(), x)], dim=1)
                x = self._run(attention, self._run(resnet, x, temb), context)
            if (larger := level.resample(x)) is not None:
                x = larger
            features.append(x)
        return self.conv_out(F.silu(self.conv_norm_out(x))), features

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor:
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return module(*inputs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return nullcontext(), _StatisticsKept(module)

        run: Callable[..., Tensor] = checkpoint
        return run(module, *inputs, use_reentrant=False, context_fn=contexts)


def _matching(skip: Tensor, x: Tensor) -> Tensor:
    """Repeats a skip connection from before the guidance branches split, once per branch; others are unchanged."""
    return skip if skip.shape[0] == x.shape[0] else torch.cat([skip, skip])


def _levels(blocks: nn.ModuleList) -> list[Level]:
    return [block for block in blocks if isinstance(block, Level)]


class _StatisticsKept(AbstractContextManager[None]):
    """Stops batch norms from counting a batch twice while a checkpointed block is recomputed.

    The running statistics must still be passed to the kernel, or it would save other tensors than the first time; a
    momentum of 0 leaves them unchanged. Balancing takes gradients several times, so this is entered repeatedly.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self._kept: list[tuple[float | None, Tensor | None]] = []

    def __enter__(self) -> None:
        self._kept = [(norm.momentum, norm.num_batches_tracked) for norm in self._norms]
        for norm in self._norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None

    def __exit__(self, *error: object) -> None:
        for norm, (momentum, count) in zip(self._norms, self._kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


class Moebius(CategoryNetwork):
    """The student: latent-category embedding and U-Net, with the tensor names of the released checkpoints.

    Example:
        >>> import torch
        >>> from moebius import Moebius, preset
        >>> model = Moebius(preset("tiny").student).eval()
        >>> sample, t = torch.randn(2, 9, 16, 16), torch.tensor([500, 500])
        >>> noise_pred = model(sample, t, torch.stack([model.unconditional_ids, model.conditional_ids]))
        >>> noise_pred.shape
        torch.Size([2, 4, 16, 16])
    """

    config: StudentConfig

    def __init__(self, config: StudentConfig) -> None:
        super().__init__(config)
        self.diff_model = DiffusionModel(config)

    def set_lambda_form(self, form: LambdaForm) -> None:
        """Chooses how the λ layers compute: `"reference"` (unfused), `"fast"` or `"triton"` (fused operators)."""
        set_lambda_form(self, form)

    def forward_features(self, sample: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The prediction of `forward` and six feature maps [B, C, H, W]: down levels 0..2, up levels 3..5."""
        return self.diff_model(sample, timesteps, self.embedding_layer(input_ids))
