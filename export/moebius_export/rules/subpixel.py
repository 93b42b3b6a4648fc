"""Nearest x2 upsampling, then a 3x3 convolution: four 2x2 convolutions on the small picture and a pixel shuffle.

Row 2i + a of the result sees rows 2i + a - 1, 2i + a, 2i + a + 1 of the enlarged picture, which are rows i - 1, i, i of
the small one for a = 0 and i, i, i + 1 for a = 1: two rows, with the kernel's rows summed where they meet. Columns
likewise. 16 products instead of 36. Zero padding stays zero padding: the row above the enlarged picture is the row
above the small one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.student import Resample
from moebius_export.rules.base import Rule
from moebius_export.rules.linear import constant


class SubPixelUpsample(nn.Module):
    """`Resample(up=True)` or diffusers' `Upsample2D` without the enlarged picture."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.kernels = nn.ParameterList(
            constant(_merged(_merged(conv.weight, 2, row), 3, column)) for row in (0, 1) for column in (0, 1)
        )
        assert conv.bias is not None
        self.bias = constant(conv.bias)

    def forward(self, x: Tensor, output_size: int | None = None) -> Tensor:
        """[B, C, H, W] -> [B, C', 2H, 2W]. `output_size` is diffusers' and must be None."""
        batch, _, height, width = x.shape
        phases = []
        for index, kernel in enumerate(self.kernels):
            row, column = divmod(index, 2)
            phases.append(F.conv2d(F.pad(x, (1 - column, column, 1 - row, row)), kernel, self.bias))
        stacked = torch.stack(phases, dim=2)  # [B, C', 4, H, W], phase = 2 * row + column
        return F.pixel_shuffle(stacked.reshape(batch, -1, height, width), 2)  # [B, C' * 4, H, W] -> [B, C', 2H, 2W]


def _merged(kernel: Tensor, axis: int, phase: int) -> Tensor:
    """The three taps along an axis as the two that a phase sees."""
    first, middle, last = kernel.split(1, dim=axis)
    return torch.cat([first, middle + last] if phase == 0 else [first + middle, last], dim=axis)


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
            return "it does not enlarge by nearest neighbour"
        if getattr(module, "norm", None) is not None:
            return "it normalises before it enlarges"
        if not isinstance(module.conv, nn.Conv2d):
            return "it has no convolution"
        return _no_upsampler(module.conv)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module.conv, nn.Conv2d)
        return SubPixelUpsample(module.conv)


def _no_upsampler(conv: nn.Conv2d) -> str | None:
    if conv.kernel_size != (3, 3) or conv.padding != (1, 1) or conv.stride != (1, 1) or conv.groups != 1:
        return f"kernel {conv.kernel_size}, padding {conv.padding}, stride {conv.stride}: not a plain 3x3 convolution"
    return None if conv.bias is not None else "its convolution has no bias"
