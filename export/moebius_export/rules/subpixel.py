"""Nearest x2 upsampling, then a 3x3 convolution: four 2x2 convolutions on the small picture and a pixel shuffle.

Row 2i + a of the result sees rows 2i + a - 1, 2i + a, 2i + a + 1 of the enlarged picture, which are rows i - 1, i, i of
the small one for a = 0 and i, i, i + 1 for a = 1: two rows, with the kernel's rows summed where they meet. Columns
likewise. 16 MACs instead of 36: the body of the function `UpsampleConv3x3`. Zero padding stays zero padding: the
row above the enlarged picture is the row above the small one.

A kernel needs 9: with d[i] = x[i] - x[i - 1] and s the sum of the kernel's three rows w, the two outputs are
s x[i] - w[0] d[i] and s x[i] + w[2] d[i + 1], columns likewise.
"""

from __future__ import annotations

from torch import Tensor, nn

from moebius.network.layer_ops import upsample_conv3x3
from moebius.network.student import Resample
from moebius_export.rules.base import Rule
from moebius_export.rules.conv3x3 import not_plain


class SubPixelUpsample(nn.Module):
    """`Resample(up=True)` or diffusers' `Upsample2D` as the operator `moebius.network.layer_ops.upsample_conv3x3`."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C', 2H, 2W]. `output_size` is diffusers' and must be None."""
        assert self.bias is not None
        return upsample_conv3x3(x, self.weight, self.bias)


class SubPixelUpsampling(Rule):
    """Rule: an upsampler -> `SubPixelUpsample`. `target` is the U-Net's `Resample` or diffusers' `Upsample2D`."""

    name = "sub_pixel_upsampling"

    def __init__(self, target: type[nn.Module] = Resample) -> None:
        self.target = target

    def check(self, module: nn.Module) -> str | None:
        """Refuses downsamplers, other ways to enlarge, and kernels or padding other than 3x3 and 1."""
        if not getattr(module, "up", True):
            return "it is a downsampler"
        if getattr(module, "use_conv_transpose", False) or not getattr(module, "interpolate", True):
            return "its upsampling is not nearest-neighbor"
        if getattr(module, "norm", None) is not None:
            return "it normalises before it enlarges"
        if not isinstance(module.conv, nn.Conv2d):
            return "it has no convolution"
        return not_plain(module.conv)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module.conv, nn.Conv2d)
        return SubPixelUpsample(module.conv)
