"""Squares that are cropped from latents: around the masked region, and where in its picture a student takes one."""

from __future__ import annotations

import torch
from torch import Tensor

from moebius.data.encoded import LatentBatch
from moebius.errors import TrainingError
from moebius.network.student import Moebius


def squares_on_mask(mask: Tensor, size: int, places: Tensor, margin: int = 0) -> list[tuple[int, int]]:
    """Chooses a square of each sample that contains part of its masked region, as its top and left.

    Args:
        mask: [B, 1, S, S], S >= size.
        size: side of the square.
        places: [B, 3] in [0, 1): a pixel of the masked region, and its row and column in the square.
        margin: at each side of the square, where the pixel does not lie unless the square touches the edge there.

    Raises:
        TrainingError: S is less than `size`.
    """
    side = mask.shape[-1]
    if side < size:
        raise TrainingError(f"a crop of {size} from latents of {side}x{side}; expected a crop of {side} or less")
    found = []
    for index, (which, down, right) in enumerate(places.tolist()):
        masked_at = mask[index, 0].nonzero()  # [places, 2]
        y, x = masked_at[int(which * len(masked_at))].tolist() if len(masked_at) else (side // 2, side // 2)
        top, left = (
            min(max(at - margin - int(share * (size - 2 * margin)), 0), side - size)
            for at, share in ((y, down), (x, right))
        )
        found.append((top, left))
    return found


def crop_to_hole(batch: LatentBatch, size: int, places: Tensor) -> LatentBatch:
    """Crops a square from each sample that contains part of its masked region.

    Args:
        batch: on one device, S >= size.
        size: of the square.
        places: see `squares_on_mask`.
    """
    rows: list[list[Tensor]] = []
    for index, (top, left) in enumerate(squares_on_mask(batch.mask, size, places)):
        square = (slice(index, index + 1), slice(None), slice(top, top + size), slice(left, left + size))
        cropped = (batch.latents, batch.masked, batch.mask, *([] if batch.start is None else [batch.start]))
        rows.append([value[square] for value in cropped])
    latents, masked, mask, *start = (torch.cat(values) for values in zip(*rows, strict=True))
    return LatentBatch(latents, masked, mask, batch.categories, start[0] if start else None)


def crop_place(network: Moebius, size: int, generator: torch.Generator) -> tuple[float, float]:
    """Draws the place of a crop of `size` latents, a whole position at every level of the network."""
    side = network.config.sample_size
    coarsest = 1 << (len(network.config.block_out_channels) - 1)
    places = torch.randint((side - size) // coarsest + 1, (2,), generator=generator) * coarsest
    top, left = (int(place) / side for place in places)
    return top, left
