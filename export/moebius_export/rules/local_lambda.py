"""Local-λ reassociates: the window is summed over last instead of first.

    Yp[h, v, n] = sum_k Q[h, k, n] sum_d w[k, d] V[v, n + d] = sum_d (sum_k Q[h, k, n] w[k, d]) V[v, n + d]

over the 225 offsets d of the window. The first form costs 225 k v + h k v products per position and a tensor
[k, v, n]; the second 225 h (k + v): 2.6 times fewer at 64x64 (k = v = 40), 5 at 32x32, 10 at 16x16.

As matrix products: the picture is cut into tiles of Ty x Tx positions. Inside a tile, position p sees the window at a
fixed place of the tile's neighbourhood of (Ty + 14) x (Tx + 14) positions; kernels[p, k, j] is the window shifted to
that place, zero elsewhere. Then A = Q kernels [p, h, j] and Yp = A V[j, v], two batched products.

The bias of the position convolution is the same for every position and value, so it joins λc: λc[k, v] += bias[k].
The norms of Q and V fold into their projections. V is padded after its norm, so the shift must not leak into the
padding: it is added before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.lambda_layers import LocalLambda
from moebius_export.rules.base import Rule
from moebius_export.rules.linear import batch_norm_affine, constant, frozen, pointwise


class TiledLocalLambda(nn.Module):
    """`LocalLambda` for a picture of one `size` (H, W), in tiles of `tile` (Ty, Tx) positions."""

    neighbours: Tensor

    def __init__(self, source: LocalLambda, size: tuple[int, int], tile: tuple[int, int]) -> None:
        super().__init__()
        self.heads, self.size, self.tile = source.heads, size, tile
        scale_q, shift_q = batch_norm_affine(source.norm_q)
        scale_v, shift_v = batch_norm_affine(source.norm_v)
        self.query = constant(pointwise(source.to_q, scale_q).t())  # [C, h*k]
        self.query_bias = constant(shift_q)
        self.key = constant(pointwise(source.to_k))  # [k, C]
        self.value = constant(pointwise(source.to_v, scale_v).t())  # [C, v]
        self.value_bias = constant(shift_v)
        window = source.pos_conv.weight[:, 0, 0]  # [k, r, r]
        self.pad = window.shape[-1] // 2
        self.kernels = constant(shifted_kernels(window, tile))  # [Ty*Tx, k, j]
        assert source.pos_conv.bias is not None
        self.content_bias = constant(source.pos_conv.bias[:, None])  # [k, 1]
        self.register_buffer("neighbours", neighbourhoods(size, tile, window.shape[-1]), persistent=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [B, n, C] -> [B, n, C]."""
        batch, positions, channels = x.shape
        (height, width), (tall, wide), heads = self.size, self.tile, self.heads
        rows, columns, depth = height // tall, width // wide, channels // heads
        q = torch.matmul(x, self.query) + self.query_bias  # [B, n, h*k]
        v = torch.matmul(x, self.value) + self.value_bias  # [B, n, v]
        k = torch.matmul(self.key, x.transpose(1, 2)).softmax(dim=-1)  # [B, k, n]
        content = torch.matmul(k, v) + self.content_bias  # λc [B, k, v]
        y = torch.matmul(q.reshape(batch, positions * heads, depth), content).reshape(batch, positions, channels)

        margin = (0, 0, self.pad, self.pad, self.pad, self.pad)
        padded = F.pad(v.reshape(batch, height, width, depth), margin).flatten(1, 2)  # [B, (H+14)*(W+14), v]
        around = padded.index_select(1, self.neighbours).reshape(batch * rows * columns, -1, depth)  # [B*t, j, v]
        tiles = q.reshape(batch, rows, tall, columns, wide, channels).permute(2, 4, 0, 1, 3, 5)
        tiles = tiles.reshape(tall * wide, batch * rows * columns * heads, depth)  # [p, B*t*h, k]
        bands = torch.matmul(tiles, self.kernels)  # [p, B*t*h, j]
        bands = bands.reshape(tall * wide, batch * rows * columns, -1).transpose(0, 1)  # [B*t, p, h*j]
        bands = bands.reshape(batch * rows * columns, tall * wide * heads, -1)  # [B*t, p*h, j]
        near = torch.matmul(bands, around)  # [B*t, p*h, v]
        near = near.reshape(batch, rows, columns, tall, wide, channels).permute(0, 1, 3, 2, 4, 5)
        return y + near.reshape(batch, positions, channels)


def shifted_kernels(window: Tensor, tile: tuple[int, int]) -> Tensor:
    """[k, r, r] -> [Ty*Tx, k, (Ty+r-1)*(Tx+r-1)]: the window where each position of the tile sees it."""
    depth, reach, _ = window.shape
    tall, wide = tile
    kernels = window.new_zeros(tall, wide, depth, tall + reach - 1, wide + reach - 1)
    for y in range(tall):
        for x in range(wide):
            kernels[y, x, :, y : y + reach, x : x + reach] = window
    return kernels.reshape(tall * wide, depth, -1)  # [Ty*Tx, k, j]


def neighbourhoods(size: tuple[int, int], tile: tuple[int, int], reach: int) -> Tensor:
    """int64 [tiles * j]: which position of the padded picture each place of each tile's neighbourhood is."""
    (height, width), (tall, wide) = size, tile
    index = torch.arange((height + reach - 1) * (width + reach - 1)).reshape(height + reach - 1, width + reach - 1)
    return index.unfold(0, tall + reach - 1, tall).unfold(1, wide + reach - 1, wide).flatten()


class ReassociateLocalLambda(Rule):
    """Rule: `LocalLambda` -> `TiledLocalLambda`, for a network of `sample_size` and the tile of each resolution.

    `sizes` maps a layer's depth k, by which the resolutions differ, to its picture's side and its tile.
    """

    name = "reassociate_local_lambda"
    target = LocalLambda

    def __init__(self, sizes: dict[int, tuple[int, tuple[int, int]]]) -> None:
        self.sizes = sizes

    def check(self, module: nn.Module) -> str | None:
        """Refuses layers of unknown resolution, tiles that do not divide it, and norms without constants."""
        assert isinstance(module, LocalLambda)
        depth = module.to_k.out_channels
        if depth not in self.sizes:
            return f"no resolution is known for a depth of {depth}"
        side, tile = self.sizes[depth]
        if side % tile[0] or side % tile[1]:
            return f"tiles of {tile[0]}x{tile[1]} do not divide {side}x{side}"
        return frozen(module.norm_q) or frozen(module.norm_v)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, LocalLambda)
        side, tile = self.sizes[module.to_k.out_channels]
        return TiledLocalLambda(module, (side, side), tile)
