"""The VAE decoder in two parts, so that only a window of its upper levels need be decoded.

`LowerDecoder` ends after the first upsampling: it holds the attention, sees the whole square, and takes an eighth of
the decoder's MACs. `UpperDecoder` is convolutions and group norms. A convolution needs the window and its receptive
field only. A group norm needs the mean and the variance of the whole square, which the window does not have.

`UpperDecoder` therefore also decodes an overview, one cell of every block of the square's features. In front of
every group norm it compares, per group, the overview's statistics over the square (m, v) with those over the window's
blocks (m', v'), and takes their relation for that of the real ones:

    the mean over the square      = the window's mean + (m - m') / sqrt(v') of the window's standard deviations,
    the variance over the square  = the window's variance * v / v'.

The overview's coarser detail changes all four of its statistics; in their relation that mostly cancels. A window of
the whole square gives m = m' and v = v', the exact decoder. (Tiled VAEs take the statistics of a decode at low
resolution as they are, with that error in them. Means of blocks in place of single cells gave larger errors:
docs/speed.md.) The relation moves into the norm's gain and shift, so that an ordinary group norm of the window remains.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from moebius.network.layer_ops import group_norm

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

BLOCK = 4
"""Side of the overview's blocks, in cells of the features."""


class LowerDecoder(nn.Module):
    """Decodes a scaled latent up to the features after the first upsampling."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        decoder = vae.decoder
        self.post_quant_conv, self.conv_in, self.mid_block = vae.post_quant_conv, decoder.conv_in, decoder.mid_block
        self.up_block = decoder.up_blocks[0]
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latent: Tensor) -> Tensor:
        """Scaled latent [B, C, s, s] -> features [B, F, 2s, 2s]."""
        return self.up_block(self.mid_block(self.conv_in(self.post_quant_conv(latent / self.scaling_factor))))


class UpperDecoder(nn.Module):
    """Decodes a window of the features to its part of the picture."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        decoder = vae.decoder
        self.up_blocks = decoder.up_blocks[1:]
        self.conv_norm_out, self.conv_out = decoder.conv_norm_out, decoder.conv_out

    def forward(self, features: Tensor, overview: Tensor, inside: Tensor) -> Tensor:
        """Decodes a window.

        Args:
            features: of the window, float32 [1, F, h, w].
            overview: a cell near the middle of every `BLOCK` x `BLOCK` block of the whole square's features,
                [1, F, k, k].
            inside: 1 in the blocks of the window and 0 elsewhere, [1, 1, k, k].

        Returns:
            [1, 3, 4h, 4w], for four resolutions.
        """
        x, o, m = features, overview, inside
        for block in self.up_blocks:
            for resnet in block.resnets:
                x, o = _residual(resnet, x, o, m)
            for upsampler in block.upsamplers or ():
                x, o = upsampler(x), upsampler(o)
                m = F.interpolate(m, scale_factor=2.0, mode="nearest")
        x, _ = _norm(self.conv_norm_out, x, o, m)
        return self.conv_out(F.silu(x))


def _residual(resnet: Any, x: Tensor, o: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """diffusers' `ResnetBlock2D` without a timestep, on the window and on the overview."""
    a, b = _norm(resnet.norm1, x, o, inside)
    a, b = resnet.conv1(F.silu(a)), resnet.conv1(F.silu(b))
    a, b = _norm(resnet.norm2, a, b, inside)
    a, b = resnet.conv2(F.silu(a)), resnet.conv2(F.silu(b))
    if resnet.conv_shortcut is not None:
        x, o = resnet.conv_shortcut(x), resnet.conv_shortcut(o)
    return x + a, o + b


def _norm(norm: Any, x: Tensor, o: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """The group norm of the window with the square's statistics, and that of the overview.

    `norm` is `nn.GroupNorm`, or what the rule `fuse_group_norm` makes of it: one operator.
    """
    plain = isinstance(norm, nn.GroupNorm)
    groups = norm.num_groups if plain else norm.groups
    gain, shift = window_affine(norm.weight, norm.bias, o, inside, groups, norm.eps)
    if plain:
        return F.group_norm(x, groups, gain, shift, norm.eps), F.group_norm(o, groups, norm.weight, norm.bias, norm.eps)
    return group_norm(x, gain, shift, groups, norm.eps), group_norm(o, norm.weight, norm.bias, groups, norm.eps)


def window_affine(
    gain: Tensor, shift: Tensor, overview: Tensor, inside: Tensor, groups: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gain and shift [C] with which a group norm of the window is one with the square's statistics.

    With the statistics of the module's docstring, (x - mean) / std * gain + shift over the square is
    norm(x) * r * gain + shift - (m - m') / sqrt(v) * gain, where r = sqrt(v' / v) and norm is that of the window.

    Args:
        gain, shift: of the norm, [C].
        overview: in front of the norm, [1, C, k, k].
        inside: [1, 1, k, k].
        groups, eps: of the norm.
    """
    _, channels, height, width = overview.shape
    grouped = overview.reshape(groups, channels // groups, height * width)  # [1, C, k, k] -> [G, C/G, k*k]
    weight = inside.reshape(1, 1, height * width)
    weight = weight / weight.mean()  # so that a weighted mean is the mean of the products
    mean, window_mean = _mean(grouped), _mean(grouped * weight)  # [G, 1, 1]
    variance = _mean((grouped - mean).pow(2)) + eps
    window_variance = _mean((grouped - window_mean).pow(2) * weight) + eps
    ratio = (window_variance / variance).sqrt()
    moved = (mean - window_mean) / variance.sqrt()
    of_groups = gain.reshape(groups, channels // groups, 1)
    own_shift = shift.reshape(groups, channels // groups, 1) - moved * of_groups
    return (of_groups * ratio).reshape(channels), own_shift.reshape(channels)  # [G, C/G, 1] -> [C]


def _mean(values: Tensor) -> Tensor:
    """Means of the groups, [G, c, n] -> [G, 1, 1]: over positions first, which keeps float32's digits."""
    return values.mean(2, keepdim=True).mean(1, keepdim=True)
