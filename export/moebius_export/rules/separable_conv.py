"""Batch norms fold into the convolutions before them.

norm(W x) = (s W) x + t with s = gain / sqrt(var + eps), t = bias - mean s: constants in eval mode. Padding is not
touched: it belongs to the input of the convolution, the shift to its output.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from moebius.network.student import SeparableConv
from moebius_export.rules.base import Rule
from moebius_export.rules.linear import batch_norm_affine, constant, frozen


class FoldedSeparableConv(nn.Module):
    """`SeparableConv` as two convolutions with biases."""

    def __init__(self, source: SeparableConv) -> None:
        super().__init__()
        self.conv_dw = folded(source.conv_dw, source.bn1)
        self.conv_pw = folded(source.conv_pw, source.bn2)
        self.residual = source.residual

    def forward(self, x: Tensor) -> Tensor:
        """[B, in, H, W] -> [B, out, H, W]."""
        y = self.conv_pw(F.relu(self.conv_dw(x)))
        return x + y if self.residual else y


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A new convolution with a bias that equals `norm(conv(x))`; `conv` has none."""
    scale, shift = batch_norm_affine(norm)
    result = nn.Conv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        stride=conv.stride,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        groups=conv.groups,
        device="meta",
    )
    result.weight = constant(conv.weight * scale[:, None, None, None])
    result.bias = constant(shift)
    return result


class FoldBatchNorms(Rule):
    """Rule: `SeparableConv` -> `FoldedSeparableConv`."""

    name = "fold_batch_norms"
    target = SeparableConv
    keeps_macs = True

    def check(self, module: nn.Module) -> str | None:
        """Refuses norms without constants and convolutions that already have a bias."""
        assert isinstance(module, SeparableConv)
        if module.conv_dw.bias is not None or module.conv_pw.bias is not None:
            return "a convolution has a bias, which the norm would scale too"
        return frozen(module.bn1) or frozen(module.bn2)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, SeparableConv)
        return FoldedSeparableConv(module)
