"""Mix-FFN as one operator, `moebius.network.layer_ops.feed_forward`.

The same MACs in the same order. A kernel saves writing the expanded channels: they are
activated, convolved and gated while they are in the cache.
"""

from __future__ import annotations

from torch import Tensor, nn

from moebius.network.layer_ops import feed_forward
from moebius.network.student import MixFeedForward
from moebius_export.rules.base import Rule
from moebius_export.rules.linear import no_matrix


class OperatorFeedForward(nn.Module):
    """`MixFeedForward` as one operator."""

    def __init__(self, source: MixFeedForward) -> None:
        super().__init__()
        self.inverted_conv = source.inverted_conv
        self.depth_conv = source.depth_conv
        self.point_conv = source.point_conv

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, n, C] -> [B, n, C]."""
        expand, depthwise = self.inverted_conv.conv, self.depth_conv.conv
        assert expand.bias is not None
        assert depthwise.bias is not None
        return feed_forward(
            x, expand.weight, expand.bias, depthwise.weight, depthwise.bias, self.point_conv.conv.weight, size
        )


class FuseFeedForward(Rule):
    """Rule: `MixFeedForward` -> `OperatorFeedForward`."""

    name = "fuse_feed_forward"
    target = MixFeedForward
    keeps_macs = True

    def check(self, module: nn.Module) -> str | None:
        """Refuses convolutions that are not those of the released network."""
        assert isinstance(module, MixFeedForward)
        middle = module.depth_conv.conv
        if middle.kernel_size != (3, 3) or middle.padding != (1, 1) or middle.stride != (1, 1) or middle.bias is None:
            return f"a {middle.kernel_size} convolution of padding {middle.padding} is not 3x3 with a bias"
        if middle.groups != middle.in_channels or middle.groups != middle.out_channels:
            return f"a convolution in {middle.groups} groups is not depthwise"
        return no_matrix(module.inverted_conv.conv, bias=True) or no_matrix(module.point_conv.conv, bias=False)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, MixFeedForward)
        return OperatorFeedForward(module)
