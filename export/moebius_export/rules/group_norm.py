"""A group norm as an operator, `moebius.network.layer_ops.group_norm`.

The same sums in an order that keeps float32's digits: over rows first, then over the means of rows. Written as
InstanceNormalization, ONNX Runtime sums a million values of the VAE at once, and the whole decoder was off by 1.6e-5.
"""

from __future__ import annotations

from torch import Tensor, nn

from moebius.network.layer_ops import group_norm
from moebius_export.rules.base import Rule


class OperatorGroupNorm(nn.Module):
    """`nn.GroupNorm` as one operator; parameters are named as before."""

    def __init__(self, source: nn.GroupNorm) -> None:
        super().__init__()
        self.weight, self.bias = source.weight, source.bias
        self.groups, self.eps = source.num_groups, source.eps

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same."""
        return group_norm(x, self.weight, self.bias, self.groups, self.eps)


class FuseGroupNorm(Rule):
    """Rule: `GroupNorm` -> `OperatorGroupNorm`."""

    name = "fuse_group_norm"
    target = nn.GroupNorm
    keeps_macs = True

    def check(self, module: nn.Module) -> str | None:
        """Refuses norms without gain and shift."""
        assert isinstance(module, nn.GroupNorm)
        return None if module.affine else "it has no gain and shift"

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, nn.GroupNorm)
        return OperatorGroupNorm(module)
