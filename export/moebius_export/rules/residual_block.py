"""A residual block as one operator, `moebius.network.layer_ops.residual_block`.

Nothing is computed otherwise than by the folded block; a kernel keeps a channel in the cache from its norm to the
product, and adds the shortcut's product to the last one's.
"""

from __future__ import annotations

from torch import Tensor, nn

from moebius.network.layer_ops import residual_block
from moebius.network.student import ResidualBlock
from moebius_export.rules.base import Rule
from moebius_export.rules.linear import no_matrix
from moebius_export.rules.separable_conv import FoldedSeparableConv


class OperatorResidualBlock(nn.Module):
    """`ResidualBlock` with folded norms as one operator."""

    def __init__(self, source: ResidualBlock) -> None:
        super().__init__()
        self.norm1, self.conv1 = source.norm1, source.conv1
        self.norm2, self.conv2 = source.norm2, source.conv2
        self.time_emb_proj = source.time_emb_proj
        self.conv_shortcut = source.conv_shortcut

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """[B, in, H, W] and what the projection of the timestep takes -> [B, out, H, W]."""
        return residual_block(
            x,
            self.time_emb_proj(temb),
            _weights(self.norm1, self.conv1),
            _weights(self.norm2, self.conv2),
            [] if self.conv_shortcut is None else _both(self.conv_shortcut),
            self.norm1.num_groups,
            self.norm1.eps,
        )


class FuseResidualBlock(Rule):
    """Rule: `ResidualBlock` -> `OperatorResidualBlock`; needs its batch norms folded."""

    name = "fuse_residual_block"
    target = ResidualBlock
    keeps_macs = True

    def check(self, module: nn.Module) -> str | None:
        """Refuses blocks with batch norms, with two different group norms, or an inner skip where none belongs."""
        assert isinstance(module, ResidualBlock)
        halves = [half for half in (module.conv1, module.conv2) if isinstance(half, FoldedSeparableConv)]
        if len(halves) < 2:
            return "its batch norms are not folded"
        if (module.norm1.num_groups, module.norm1.eps) != (module.norm2.num_groups, module.norm2.eps):
            return "its group norms differ in groups or epsilon"
        if any(half.residual != (half.conv_pw.in_channels == half.conv_pw.out_channels) for half in halves):
            return "an inner skip is there where channels differ, or missing where they are equal"
        return None if module.conv_shortcut is None else no_matrix(module.conv_shortcut, bias=True)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, ResidualBlock)
        return OperatorResidualBlock(module)


def _both(conv: nn.Conv2d) -> list[Tensor]:
    assert conv.bias is not None
    return [conv.weight, conv.bias]


def _weights(norm: nn.GroupNorm, conv: nn.Module) -> list[Tensor]:
    assert isinstance(conv, FoldedSeparableConv)
    return [norm.weight, norm.bias, *_both(conv.conv_dw), *_both(conv.conv_pw)]
