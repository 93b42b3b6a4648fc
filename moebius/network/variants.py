"""Full attention and feed-forward layers, which replace lighter ones of the student in the paper's table 2.

Each is called like the layer of the LλMI block that it replaces. Parameters are named as
diffusers and the teacher name theirs, so a teacher's layer loads into one of these. The fourth, the GLA layer, is the
teacher's own: `moebius.network.gla.GatedLinearAttention`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch.nn.functional as F
from torch import Tensor, nn

GEGLU_MULT = 4  # width of the feed-forward in units of the channels, as in the teacher


_MARKS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "self_attention": {"local_lambda": ".attn1.pos_conv.", "gla": ".attn1.gk_proj."},
        "cross_attention": {"interactive_lambda": ".attn2.rel_pos_emb", "attention": ".attn2.to_out."},
        "feed_forward": {"mix": ".ff.inverted_conv.", "geglu": ".ff.net."},
        "convolution": {"separable": ".conv1.conv_pw.", "full": ".conv1.weight"},
    }
)
"""Field of `StudentConfig` -> value -> a part of a tensor's name that only such a layer has."""


def layers_named(names: Iterable[str]) -> dict[str, str]:
    """Recognizes the layers of a state dict by its tensor names, by field of `StudentConfig`."""
    text = "\n".join(names)
    return {field: value for field, marks in _MARKS.items() for value, mark in marks.items() if mark in text}


class CrossAttention(nn.Module):
    """Softmax attention of picture tokens to the context, in place of Interactive-λ; diffusers' `Attention`."""

    def __init__(self, dim: int, heads: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def forward(self, x: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, n, C] and context [B, m, context_dim] -> [B, n, C]; the picture's `size` does not matter."""
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, h, n or m, C / h]
            for projected in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)  # [B, n, C]
        return self.to_out[0](y)


class GatedProjection(nn.Module):
    """A linear layer gated by GELU of a second one. Both are in `proj`, the gate in the second half."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] -> [..., hidden]."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class GegluFeedForward(nn.Module):
    """The feed-forward of the teacher, in place of Mix-FFN; diffusers' `FeedForward`.

    GEGLU: Shazeer, "GLU Variants Improve Transformer" (2020). `net.1` is diffusers' dropout, of rate 0: nothing.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = GEGLU_MULT * dim
        self.net = nn.Sequential(GatedProjection(dim, hidden), nn.Identity(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, n, C] -> [B, n, C]; the picture's `size` does not matter."""
        return self.net(x)
