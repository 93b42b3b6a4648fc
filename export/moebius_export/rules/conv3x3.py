"""A plain 3x3 convolution as an operator, `moebius.network.layer_ops.conv3x3`, so that a kernel may take it.

Winograd's algorithm (Lavin and Gray, 2015) needs fewer MACs than the sum over nine taps.
"""

from __future__ import annotations

from torch import Tensor, nn

from moebius.network.layer_ops import conv3x3
from moebius_export.rules.base import Rule


class OperatorConv3x3(nn.Module):
    """A 3x3 convolution as one operator; parameters are named as before."""

    def __init__(self, source: nn.Conv2d) -> None:
        super().__init__()
        assert source.bias is not None
        self.weight, self.bias = source.weight, source.bias

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]."""
        return conv3x3(x, self.weight, self.bias)


class FuseConv3x3(Rule):
    """Rule: `Conv2d` of 3x3 -> `OperatorConv3x3`."""

    name = "fuse_conv3x3"
    target = nn.Conv2d
    keeps_macs = True

    def check(self, module: nn.Module) -> str | None:
        """Refuses other kernels, strides, paddings and groups, and convolutions without a bias."""
        assert isinstance(module, nn.Conv2d)
        return not_plain(module)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, nn.Conv2d)
        return OperatorConv3x3(module)


def not_plain(conv: nn.Conv2d) -> str | None:
    """Why a convolution is not 3x3 with stride 1, padding 1 of zeros and a bias, or None."""
    if conv.kernel_size != (3, 3) or conv.padding != (1, 1) or conv.stride != (1, 1) or conv.groups != 1:
        return f"kernel {conv.kernel_size}, padding {conv.padding}, stride {conv.stride}: not a plain 3x3 convolution"
    if conv.padding_mode != "zeros" or conv.dilation != (1, 1):
        return f"padding by {conv.padding_mode} and dilation {conv.dilation}: not a plain 3x3 convolution"
    return None if conv.bias is not None else "its convolution has no bias"
