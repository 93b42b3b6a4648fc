"""The two λ layers, Local-λ and Interactive-λ: the unfused reference of the paper, and a fused form of each.

Moebius (ECCV 2026), section 3.2; lambda layers are from Bello, "LambdaNetworks" (ICLR 2021). The reference (einsum and
Conv3d) is the default, and what the export traces; every fused form is tested against it. With `form = "fast"` a layer
computes the same by the operators of `moebius.network.lambda_ops`, in training and in inference, with the same modules.

Letters in shapes: B batch, n positions (H*W), m context tokens, h heads, k query/key depth, v value depth;
C = h*k = h*v.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from moebius.network.lambda_ops import eager_tile, interactive_lambda, lambda_summary, local_lambda
from moebius.network.triton_lambda import local_lambda_triton

LambdaForm = Literal["reference", "fast", "triton"]
Place = tuple[float, float]
"""The top and left of a crop, as shares of the picture's side."""
FORMS: tuple[LambdaForm, ...] = get_args(LambdaForm)


def set_lambda_form(network: nn.Module, form: LambdaForm) -> None:
    """Chooses how all λ layers of a network compute. Results agree up to rounding.

    "triton" is the fast form with Local-λ in one CUDA kernel (see `moebius.network.triton_lambda`).

    Raises:
        ValueError: an unknown form.
    """
    if form not in FORMS:
        raise ValueError(f"λ form {form!r}: expected {', '.join(map(repr, FORMS[:-1]))} or {FORMS[-1]!r}")
    for module in network.modules():
        if isinstance(module, LocalLambda | InteractiveLambda):
            module.form = form


def set_crop(network: nn.Module, place: Place | None) -> None:
    """Names the place of the crops that the network gets from now on; None: it gets whole pictures.

    A network that is tied to pictures of one size then takes crops of any size that fit there. The place must be a
    whole position at every level of the network.
    """
    for module in network.modules():
        if isinstance(module, InteractiveLambda):
            module.place = place


class LocalLambda(nn.Module):
    """Local-λ: a content λ of the whole picture, plus a λ per position from a `window` x `window` neighbourhood.

    Parameters are named as in the released checkpoints: `to_q`, `to_k`, `to_v`, `norm_q`, `norm_v`, `pos_conv`.
    """

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.form: LambdaForm = "reference"
        depth = dim // heads
        self.to_q = nn.Conv2d(dim, dim, 1, bias=False)
        self.to_k = nn.Conv2d(dim, depth, 1, bias=False)
        self.to_v = nn.Conv2d(dim, depth, 1, bias=False)
        self.norm_q = nn.BatchNorm2d(dim)
        self.norm_v = nn.BatchNorm2d(depth)
        self.pos_conv = nn.Conv3d(1, depth, (1, window, window), padding=(0, window // 2, window // 2))

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, n, C] of a picture of `size` (H, W), n = H*W in raster order -> [B, n, C]."""
        if self.form != "reference":
            return self._fast(x, size)
        height, width = size
        batch, positions, channels = x.shape
        image = x.transpose(1, 2).reshape(batch, channels, height, width)  # [B, C, H, W]
        q = self.norm_q(self.to_q(image)).reshape(batch, self.heads, -1, positions)  # [B, h, k, n]
        k = self.to_k(image).flatten(2).softmax(dim=-1)  # [B, k, n], sums to 1 over the positions
        v = self.norm_v(self.to_v(image))  # [B, v, H, W]
        content = torch.einsum("bkn,bvn->bkv", k, v.flatten(2))  # λc
        position = self.pos_conv(v.unsqueeze(1)).flatten(3)  # λp [B, k, v, n]
        y = torch.einsum("bhkn,bkv->bhvn", q, content) + torch.einsum("bhkn,bkvn->bhvn", q, position)
        return y.reshape(batch, channels, positions).transpose(1, 2)  # [B, h*v, n] -> [B, n, C]

    def _fast(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """The fused form, which sums over the window last (`moebius.network.lambda_ops.local_lambda`)."""
        image = x.transpose(1, 2).unflatten(2, size)  # [B, C, H, W]
        query = _tokens(self.norm_q, self.to_q(image))  # [B, n, h*k]
        values = _tokens(self.norm_v, self.to_v(image))  # [B, n, v]
        assert self.pos_conv.bias is not None
        keys, values = _for_products(self.to_k(image).flatten(2), values)
        summary = lambda_summary(keys, values) + self.pos_conv.bias[:, None]  # λc [B, k, v]
        query, summary, window = _for_products(query, summary, self.pos_conv.weight[:, 0, 0])  # window [k, r, r]
        if self.form == "triton":
            return local_lambda_triton(query, values, summary, window, size)
        return local_lambda(query, values, summary, window, size, eager_tile(*size))


class InteractiveLambda(nn.Module):
    """Interactive-λ: λ from the context tokens, with a learned embedding per position and token.

    `rel_pos_emb` [n, m, k, 1] ties the layer to `positions` positions and `tokens` context tokens. For training on
    crops, `place` names the crop's place (`set_crop`), and the layer takes the embeddings of those positions.
    """

    def __init__(self, dim: int, heads: int, positions: int, tokens: int, context_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.form: LambdaForm = "reference"
        self.place: Place | None = None
        depth = dim // heads
        self.to_q = nn.Conv2d(dim, dim, 1, bias=False)
        self.to_k = nn.Linear(context_dim, depth, bias=False)
        self.to_v = nn.Linear(context_dim, depth, bias=False)
        self.norm_q = nn.BatchNorm2d(dim)
        self.norm_v = nn.BatchNorm1d(depth)
        self.rel_pos_emb = nn.Parameter(torch.randn(positions, tokens, depth, 1))

    def forward(self, x: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, n, C] of a picture of `size` (H, W) and context [B, m, context_dim] -> [B, n, C]."""
        if self.form != "reference":
            return self._fast(x, context, size)
        height, width = size
        batch, positions, channels = x.shape
        image = x.transpose(1, 2).reshape(batch, channels, height, width)  # [B, C, H, W]
        q = self.norm_q(self.to_q(image)).reshape(batch, self.heads, -1, positions)  # [B, h, k, n]
        k = self.to_k(context).transpose(1, 2).softmax(dim=-1)  # [B, k, m], sums to 1 over the tokens
        v = self.norm_v(self.to_v(context).transpose(1, 2))  # [B, v, m]
        content = torch.einsum("bkm,bvm->bkv", k, v)  # λc
        position = torch.einsum("nmk,bvm->bnkv", self._positions(size), v)  # λp
        y = torch.einsum("bhkn,bkv->bhvn", q, content) + torch.einsum("bhkn,bnkv->bhvn", q, position)
        return y.reshape(batch, channels, positions).transpose(1, 2)  # [B, h*v, n] -> [B, n, C]

    def _positions(self, size: tuple[int, int]) -> Tensor:
        """Embeddings of the positions of the picture, or of a crop of `size`: [n, m, k]."""
        embeddings = self.rel_pos_emb.squeeze(-1)
        if self.place is None:
            return embeddings
        side = math.isqrt(len(embeddings))
        if size == (side, side):
            return embeddings
        top, left = (round(share * side) for share in self.place)
        grid = embeddings.unflatten(0, (side, side))  # [S, S, m, k]
        return grid[top : top + size[0], left : left + size[1]].flatten(0, 1)

    def _fast(self, x: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        """The fused form (Q E') V. Each sample is its own branch, because contexts may differ between samples."""
        query = _tokens(self.norm_q, self.to_q(x.transpose(1, 2).unflatten(2, size)))  # [B, n, h*k]
        weights = self.to_k(context).softmax(dim=1)  # [B, m, k]
        values = self.norm_v(self.to_v(context).transpose(1, 2)).transpose(1, 2)  # [B, m, v]
        keys = self._positions(size) + weights[:, None]  # [B, n, m, k], E' with its last two axes swapped
        query, keys, values = _for_products(query, keys, values)
        return interactive_lambda(query[:, None], keys.transpose(2, 3), values)[:, 0]


def _for_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts to autocast's dtype if autocast is on, which does not know our operators."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def _tokens(norm: nn.Module, image: Tensor) -> Tensor:
    """Applies a norm to [B, C, H, W] -> [B, H*W, C], contiguous.

    The norm must see channels last, the layout of its gradient: PyTorch 2.13's batch norm on a CPU gives wrong
    gradients at batch 1 if the two layouts differ, and convolutions return channels first for a batch of one.
    """
    return norm(image.contiguous(memory_format=torch.channels_last)).flatten(2).transpose(1, 2).contiguous()
