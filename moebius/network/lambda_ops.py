"""The fused λ operators: `torch.ops.moebius.lambda_summary`, `local_lambda` and `interactive_lambda`.

Each is one node of an exported graph (domain `moebius`, see `moebius_export.graph.functions`), and in training the
fused form of a λ layer, with gradients. The slow reference of each stands beside it, named `*_reference`.

Letters in shapes: B batch, n positions (H*W), m context tokens, h heads, k query/key depth, v value depth;
C = h*k = h*v. r is the window, p a place inside a tile of Ty x Tx positions, j one inside its neighbourhood of
(Ty + r - 1) x (Tx + r - 1) positions, t the number of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def default_tile(height: int, width: int) -> tuple[int, int]:
    """The default tile (Ty, Tx) for CPUs: one row of a small picture, 2 x 8 of a larger one if they divide it."""
    if width <= 16 or width % 8:
        return (1, width)
    return (1 if height % 2 else 2, 8)


def eager_tile(height: int, width: int) -> tuple[int, int]:
    """The tile for eager PyTorch and training: 4 x 4, or the largest divisors below."""
    tall, wide = (max(side for side in (1, 2, 3, 4) if whole % side == 0) for whole in (height, width))
    return (tall, wide)


# ---- softmax over the keys, times values -------------------------------------------------------------------------


def lambda_summary_reference(keys: Tensor, values: Tensor) -> Tensor:
    """Reference of `lambda_summary`: λc[k, v] = sum_n softmax_n(keys)[k, n] values[n, v]."""
    return torch.einsum("bkn,bnv->bkv", keys.softmax(dim=-1), values)


@torch.library.custom_op("moebius::lambda_summary", mutates_args=())
def lambda_summary(keys: Tensor, values: Tensor) -> Tensor:
    """Content λ of the whole picture: keys [B, k, n] before their softmax, values [B, n, v] -> [B, k, v]."""
    return torch.matmul(keys.softmax(dim=-1), values)


@lambda_summary.register_fake
def _(keys: Tensor, values: Tensor) -> Tensor:
    return values.new_empty(keys.shape[0], keys.shape[1], values.shape[2])


def _keep_summary(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _summary_gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
    keys, values = ctx.saved_tensors  # type: ignore[attr-defined]
    weights = keys.softmax(dim=-1)  # [B, k, n]
    over_weights = torch.matmul(gradient, values.transpose(1, 2))  # [B, k, n]
    centred = over_weights - (over_weights * weights).sum(dim=-1, keepdim=True)
    return weights * centred, torch.matmul(weights.transpose(1, 2), gradient)


lambda_summary.register_autograd(_summary_gradient, setup_context=_keep_summary)


# ---- Local-λ ------------------------------------------------------------------------------------------------------


def local_lambda_reference(
    query: Tensor, values: Tensor, summary: Tensor, window: Tensor, size: Sequence[int]
) -> Tensor:
    """Reference of `local_lambda`: position λs [k, v, n] by convolution, then their product with the query."""
    batch, positions, depth = values.shape
    image = values.transpose(1, 2).reshape(batch, 1, depth, *size)  # [B, 1, v, H, W]
    reach = window.shape[-1] // 2
    position = F.conv3d(image, window[:, None, None], padding=(0, reach, reach)).flatten(3)  # [B, k, v, n]
    heads = query.reshape(batch, positions, -1, window.shape[0])  # [B, n, h, k]
    y = torch.einsum("bnhk,bkv->bnhv", heads, summary) + torch.einsum("bnhk,bkvn->bnhv", heads, position)
    return y.flatten(2)  # [B, n, h*v]


_BANDS_BYTES = 1 << 23  # bytes of bands held at a time, to stay in the cache; all bands of 4096 positions take 90 MB


class _Tiles:
    """Rearranges tokens into tiles and back, and multiplies some tiles at a time."""

    def __init__(self, query: Tensor, window: Tensor, size: Sequence[int], tile: Sequence[int]) -> None:
        (self.height, self.width), (self.tall, self.wide) = size, tile
        self.batch, self.positions, channels = query.shape
        self.depth, self.reach, _ = window.shape
        self.heads = channels // self.depth
        self.rows, self.columns = self.height // self.tall, self.width // self.wide
        self.tiles, self.places = self.batch * self.rows * self.columns, self.tall * self.wide
        self.near_size = (self.tall + self.reach - 1) * (self.wide + self.reach - 1)  # j
        self.padded = (self.height + self.reach - 1, self.width + self.reach - 1)
        around = _on(query.device, neighbourhoods, self.height, self.width, self.tall, self.wide, self.reach)
        pictures = torch.arange(self.batch, device=query.device)[:, None] * (self.padded[0] * self.padded[1])
        self.around = (pictures + around).reshape(self.tiles, -1)  # [B*t, j]
        self.taps = _on(query.device, window_places, self.tall, self.wide, self.reach)
        band = self.places * self.heads * self.near_size  # of one tile
        self.at_once = min(self.tiles, max(1, _BANDS_BYTES // (band * query.element_size())))
        self._buffers = [query.new_empty(self.at_once * band) for _ in range(2)]

    def runs(self) -> list[slice]:
        """Slices of the tiles 0 ... B*t, each small enough for the buffers."""
        return [slice(start, min(start + self.at_once, self.tiles)) for start in range(0, self.tiles, self.at_once)]

    def queries(self, query: Tensor) -> Tensor:
        """[B, n, h*k] -> [p, B*t, h*k]."""
        tiled = query.reshape(self.batch, self.rows, self.tall, self.columns, self.wide, -1)
        return tiled.permute(2, 4, 0, 1, 3, 5).reshape(self.places, self.tiles, -1)  # [Ty, Tx, B, rows, columns, C]

    def from_queries(self, queries: Tensor) -> Tensor:
        """[p, B*t, h*k] -> [B, n, h*k]."""
        tiled = queries.reshape(self.tall, self.wide, self.batch, self.rows, self.columns, -1)
        tiled = tiled.permute(2, 3, 0, 4, 1, 5)  # [B, rows, Ty, columns, Tx, C]
        return tiled.reshape(self.batch, self.positions, -1)  # [B, n, C]

    def kernels(self, window: Tensor) -> Tensor:
        """[k, r, r] -> [p, k, j], the window shifted to each place's position in the neighbourhood."""
        taps = F.pad(window.flatten(1), (0, 1))  # [k, r*r + 1], the last one zero
        chosen = taps.index_select(1, self.taps)
        return chosen.reshape(self.depth, self.places, -1).transpose(0, 1)  # [k, p*j] -> [k, p, j] -> [p, k, j]

    def from_kernels(self, kernels: Tensor) -> Tensor:
        """The sum over places, [p, k, j] -> [k, r, r]."""
        flat = kernels.transpose(0, 1).reshape(self.depth, -1)  # [k, p*j]
        taps = flat.new_zeros(self.depth, self.reach**2 + 1).index_add(1, self.taps, flat)
        return taps[:, :-1].contiguous().view(self.depth, self.reach, self.reach)  # [k, r*r] -> [k, r, r]

    def margins(self, values: Tensor) -> Tensor:
        """[B, n, v] -> [B*(H+r-1)*(W+r-1), v], zero outside the picture."""
        image = values.reshape(self.batch, self.height, self.width, -1)  # [B, H, W, v]
        return F.pad(image, (0, 0, *[self.reach // 2] * 4)).flatten(0, 2)

    def from_margins(self, padded: Tensor) -> Tensor:
        """[B*(H+r-1)*(W+r-1), v] -> [B, n, v], without the margins."""
        edge = self.reach // 2
        image = padded.reshape(self.batch, *self.padded, -1)[:, edge : edge + self.height, edge : edge + self.width]
        return image.reshape(self.batch, self.positions, -1)  # [B, H, W, v] -> [B, n, v]

    def near(self, padded: Tensor, run: slice) -> Tensor:
        """[B*(H+r-1)*(W+r-1), v] -> [t, j, v], the neighbourhood of each tile of the run."""
        return padded.index_select(0, self.around[run].flatten()).reshape(-1, self.near_size, padded.shape[1])

    def bands(self, queries: Tensor, kernels: Tensor) -> Tensor:
        """A = Q kernels: [p, t, h*k] and [p, k, j] -> [t, p*h, j], in a buffer."""
        by_place = self._buffer(0, self.places, queries.shape[1] * self.heads)  # [p, t*h, j]
        torch.bmm(queries.reshape(self.places, -1, self.depth), kernels, out=by_place)
        by_tile = self._buffer(1, queries.shape[1], self.places * self.heads)  # [t, p*h, j]
        by_tile.view(-1, self.places, self.heads * self.near_size).copy_(
            by_place.view(self.places, -1, self.heads * self.near_size).transpose(0, 1)
        )
        return by_tile

    def bands_gradient(self, outer: Tensor, near: Tensor) -> Tensor:
        """The gradient by the bands: [t, p*h, v] and [t, j, v] -> [p, t*h, j], in a buffer."""
        by_tile = self._buffer(0, outer.shape[0], self.places * self.heads)  # [t, p*h, j]
        torch.bmm(outer, near.transpose(1, 2), out=by_tile)
        by_place = self._buffer(1, self.places, outer.shape[0] * self.heads)  # [p, t*h, j]
        by_place.view(self.places, -1, self.heads * self.near_size).copy_(
            by_tile.view(-1, self.places, self.heads * self.near_size).transpose(0, 1)
        )
        return by_place

    def _buffer(self, number: int, first: int, second: int) -> Tensor:
        """[first, second, j] of buffer 0 or 1."""
        return self._buffers[number][: first * second * self.near_size].view(first, second, self.near_size)

    def in_order(self, position: Tensor) -> Tensor:
        """[B*t, p*h, v] -> [B, n, h*v]."""
        tiled = position.reshape(self.batch, self.rows, self.columns, self.tall, self.wide, -1)
        return tiled.permute(0, 1, 3, 2, 4, 5).reshape(self.batch, self.positions, -1)

    def by_tile(self, tokens: Tensor) -> Tensor:
        """[B, n, h*v] -> [B*t, p*h, v]."""
        tiled = tokens.reshape(self.batch, self.rows, self.tall, self.columns, self.wide, -1)
        tiled = tiled.permute(0, 1, 3, 2, 4, 5)  # [B, rows, columns, Ty, Tx, C]
        return tiled.reshape(self.tiles, -1, self.depth)  # [B*t, p*h, v]


@lru_cache(maxsize=64)
def _on(device: torch.device, table: Callable[..., Tensor], *sizes: int) -> Tensor:
    """Caches a table on a device: a CUDA graph may not contain a copy from the host."""
    return table(*sizes).to(device)


@lru_cache(maxsize=32)
def neighbourhoods(height: int, width: int, tall: int, wide: int, reach: int) -> Tensor:
    """int64 [t*j]: position in the padded picture of each place of each tile's neighbourhood."""
    index = torch.arange((height + reach - 1) * (width + reach - 1)).reshape(height + reach - 1, width + reach - 1)
    return index.unfold(0, tall + reach - 1, tall).unfold(1, wide + reach - 1, wide).flatten()


@lru_cache(maxsize=32)
def window_places(tall: int, wide: int, reach: int) -> Tensor:
    """int64 [p*j]: window tap of each place of a tile at each place of the neighbourhood; r*r if there is none."""
    places = torch.full((tall, wide, tall + reach - 1, wide + reach - 1), reach * reach)
    for y in range(tall):
        for x in range(wide):
            places[y, x, y : y + reach, x : x + reach] = torch.arange(reach * reach).reshape(reach, reach)
    return places.flatten()


@torch.library.custom_op("moebius::local_lambda", mutates_args=())
def local_lambda(
    query: Tensor, values: Tensor, summary: Tensor, window: Tensor, size: Sequence[int], tile: Sequence[int]
) -> Tensor:
    """Applies Local-λ to the query: a content λ plus a λ per position from an r x r neighbourhood.

    The sums are reordered, so that the window is summed over last:

        Yp[h, v, n] = sum_k Q[h, k, n] sum_d w[k, d] V[v, n + d] = sum_d (sum_k Q[h, k, n] w[k, d]) V[v, n + d]

    over the r*r offsets d. The picture is cut into tiles; place p of a tile sees the window at a fixed part of the
    tile's neighbourhood, kernels[p, k, j], zero elsewhere: A = Q kernels [p, h, j], Yp = A V[j, v].

    Args:
        query: [B, n, h*k], after its norm.
        values: [B, n, v], after their norm.
        summary: [B, k, v], from `lambda_summary`; the bias of the position convolution is added to it.
        window: [k, r, r], the position convolution's weight; r is odd.
        size: (H, W), n = H*W in raster order.
        tile: (Ty, Tx), which divide H and W. Affects speed only.

    Returns:
        [B, n, h*v].

    Raises:
        ValueError: the shapes do not fit each other.
    """
    _check_local(query, values, summary, window, size, tile)
    plan = _Tiles(query, window, size, tile)
    queries, kernels, padded = plan.queries(query), plan.kernels(window), plan.margins(values)
    position = query.new_empty(plan.tiles, plan.places * plan.heads, plan.depth)  # [B*t, p*h, v]
    for run in plan.runs():
        torch.bmm(plan.bands(queries[:, run], kernels), plan.near(padded, run), out=position[run])
    content = torch.matmul(query.reshape(plan.batch, -1, plan.depth), summary)  # [B, n*h, k] -> [B, n*h, v]
    return plan.in_order(position) + content.reshape(plan.batch, plan.positions, -1)  # [B, n, h*v]


def _check_local(
    query: Tensor, values: Tensor, summary: Tensor, window: Tensor, size: Sequence[int], tile: Sequence[int]
) -> None:
    (height, width), (tall, wide), depth = size, tile, window.shape[0]
    if height % tall or width % wide:
        raise ValueError(f"tiles of {tall}x{wide} do not divide {height}x{width}")
    if query.shape[1] != height * width or values.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"query {list(query.shape)} and values {list(values.shape)}: expected {height * width} positions"
        )
    if (
        query.shape[2] % depth
        or summary.shape[1:] != (depth, depth)
        or values.shape[2] != depth
        or window.shape[1] != window.shape[2]
    ):
        raise ValueError(
            f"query {list(query.shape)}, values {list(values.shape)}, summary {list(summary.shape)} and window "
            f"{list(window.shape)} do not fit: expected [B, n, h*k], [B, n, v], [B, k, v] and [k, r, r], v = k"
        )
    if window.shape[1] % 2 == 0:
        raise ValueError(f"a window of {window.shape[1]} has no middle; expected an odd size")


@local_lambda.register_fake
def _(
    query: Tensor, values: Tensor, summary: Tensor, window: Tensor, size: Sequence[int], tile: Sequence[int]
) -> Tensor:
    _check_local(query, values, summary, window, size, tile)
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2] // window.shape[0] * values.shape[2])


@torch.library.custom_op("moebius::local_lambda_backward", mutates_args=())
def local_lambda_backward(
    gradient: Tensor,
    query: Tensor,
    values: Tensor,
    summary: Tensor,
    window: Tensor,
    size: Sequence[int],
    tile: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `local_lambda` by query, values, summary and window, given that by its output [B, n, h*v].

    The bands are recomputed rather than stored, to save memory.
    """
    plan = _Tiles(query, window, size, tile)
    queries, kernels, padded = plan.queries(query), plan.kernels(window), plan.margins(values)
    outer = plan.by_tile(gradient)  # [B*t, p*h, v]
    by_queries, by_kernels, by_padded = torch.empty_like(queries), torch.zeros_like(kernels), torch.zeros_like(padded)
    for run in plan.runs():
        bands = plan.bands(queries[:, run], kernels)  # [t, p*h, j]
        by_near = torch.bmm(bands.transpose(1, 2), outer[run])  # [t, j, v]
        by_padded.index_add_(0, plan.around[run].flatten(), by_near.flatten(0, 1))
        by_bands = plan.bands_gradient(outer[run], plan.near(padded, run))  # [p, t*h, j]
        by_query = torch.bmm(by_bands, kernels.transpose(1, 2))  # [p, t*h, k]
        by_queries[:, run] = by_query.reshape(plan.places, -1, by_queries.shape[2])
        heads_of_run = queries[:, run].reshape(plan.places, -1, plan.depth)  # [p, t*h, k]
        by_kernels.baddbmm_(heads_of_run.transpose(1, 2), by_bands)
    per_head = gradient.reshape(plan.batch, -1, plan.depth)  # [B, n*h, v]
    by_position, by_values = plan.from_queries(by_queries), plan.from_margins(by_padded)  # [B, n, h*k], [B, n, v]
    by_content = torch.matmul(per_head, summary.transpose(1, 2)).reshape(query.shape)  # [B, n*h, k] -> [B, n, h*k]
    by_summary = torch.matmul(query.reshape(plan.batch, -1, plan.depth).transpose(1, 2), per_head)  # [B, k, v]
    by_window = plan.from_kernels(by_kernels)
    return by_position + by_content, by_values, by_summary, by_window


@local_lambda_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    values: Tensor,
    summary: Tensor,
    window: Tensor,
    size: Sequence[int],
    tile: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(values), torch.empty_like(summary), torch.empty_like(window)


def _keep_local(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.size, ctx.tile = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(*tensors)


def _local_gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors  # type: ignore[attr-defined]
    return (*local_lambda_backward(gradient.contiguous(), *tensors, ctx.size, ctx.tile), None, None)  # type: ignore[attr-defined]


local_lambda.register_autograd(_local_gradient, setup_context=_keep_local)


# ---- Interactive-λ ------------------------------------------------------------------------------------------------


def interactive_lambda_reference(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Reference of `interactive_lambda`: λ[n, k, v] = sum_m keys[n, k, m] values[m, v], times the query."""
    heads = query.unflatten(3, (-1, keys.shape[2]))  # [branch, B, n, h, k]
    position = torch.einsum("ankm,amv->ankv", keys, values)
    return torch.einsum("abnhk,ankv->abnhv", heads, position).flatten(3)


@torch.library.custom_op("moebius::interactive_lambda", mutates_args=())
def interactive_lambda(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Applies Interactive-λ to the query, multiplied from the left: Y = (Q E') V.

    Args:
        query: [branch, B, n, h*k], after its norm.
        keys: [branch, n, k, m], E'[n, k, m] = rel_pos_emb[n, m, k] + softmax_m(K)[k, m].
        values: [branch, m, v], after their norm.

    Returns:
        [branch, B, n, h*v].
    """
    heads = query.unflatten(3, (-1, keys.shape[2]))  # [branch, B, n, h*k] -> [branch, B, n, h, k]
    scores = torch.matmul(heads, keys[:, None]).flatten(2, 3)  # [branch, B, n, h, m] -> [branch, B, n*h, m]
    return torch.matmul(scores, values[:, None]).unflatten(2, (query.shape[2], -1)).flatten(3)  # [branch, B, n, h*v]


@interactive_lambda.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return query.new_empty(*query.shape[:3], query.shape[3] // keys.shape[2] * values.shape[2])


def _keep_interactive(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _interactive_gradient(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, ...]:
    query, keys, values = ctx.saved_tensors  # type: ignore[attr-defined]
    heads = query.unflatten(3, (-1, keys.shape[2]))  # [branch, B, n, h, k]
    outer = gradient.unflatten(3, (heads.shape[3], -1))  # [branch, B, n, h*v] -> [branch, B, n, h, v]
    scores = torch.matmul(heads, keys[:, None])  # [branch, B, n, h, m]
    by_scores = torch.einsum("abnhv,amv->abnhm", outer, values)
    by_query = torch.matmul(by_scores, keys[:, None].transpose(3, 4)).flatten(3)  # [branch, B, n, h*k]
    by_keys = torch.einsum("abnhk,abnhm->ankm", heads, by_scores)
    return by_query, by_keys, torch.einsum("abnhm,abnhv->amv", scores, outer)


interactive_lambda.register_autograd(_interactive_gradient, setup_context=_keep_interactive)
