"""Endless, resumable stream over the encoded samples that `moebius.data.encoding` wrote, in random order.

>>> with EncodedStream("latents", batch=32, seed=0) as stream:
...     for batch in stream:
...         ...  # batch.latents, batch.masked, batch.mask, batch.categories
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from torch import Tensor

from moebius.data import shards
from moebius.data.datasets import checked_position
from moebius.data.shards import Index, shard_name
from moebius.errors import DataError

_OPEN_SHARDS = 64


class LatentBatch(NamedTuple):
    """Encoded samples, on the CPU.

    `latents` and `masked`: float32 [B, 4, S, S], scaled, of the picture and of the picture with the masked region set
    to 0. `mask`: float32 [B, 1, S, S], 1 in the masked region. `categories`: int64 [B, m]. `start`: float32
    [B, 4, S, S], of the picture with smooth values under the mask; None if the encoding has none.
    """

    latents: Tensor
    masked: Tensor
    mask: Tensor
    categories: Tensor
    start: Tensor | None = None

    def to(self, device: torch.device) -> LatentBatch:
        """The same on a device."""
        return LatentBatch(*(None if value is None else value.to(device) for value in self))  # type: ignore[arg-type]


class EncodedStream:
    """Endless batches of one process. Each epoch is a permutation of all samples: every mask of every picture.

    Samples are numbered over all processes and epochs; process r of w gets number n of the global batch if n % w = r.
    So the processes together get what one process with a batch w times as large would get.

    `state_dict()` is the position after the last batch returned. A shard's SHA-256 and values are checked once, when
    the first of its samples is read; samples are then read one by one.

    Attributes:
        index: the content of `index.json`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        batch: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        check_all: bool = False,
    ) -> None:
        """Opens a folder.

        Args:
            folder: a finished encoding.
            batch: samples of a batch of this process.
            seed: of the order, 0 or more.
            rank: this process among `world`.
            world: number of processes.
            check_all: checks every shard now; otherwise only their sizes.

        Raises:
            DataError: an argument is out of its range, or the encoding is not complete.
        """
        if batch < 1 or seed < 0 or not 0 <= rank < world:
            raise DataError(
                f"encoded samples with batch={batch}, seed={seed}, rank={rank} of {world}: expected batch >= 1, "
                "seed >= 0 and 0 <= rank < world"
            )
        self.folder = Path(folder)
        self.index: Index = shards.read_index(self.folder)
        self._batch, self._seed, self._rank, self._world = batch, seed, rank, world
        self._position = 0  # samples given so far, by all processes
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None
        self._known: set[int] = set()
        self._open: OrderedDict[int, Any] = OrderedDict()
        for number in range(len(self.index.shards)):
            shards.check_shard(self.folder, self.index, number, content=False)
            if check_all:
                self._check(number)

    def __len__(self) -> int:
        """Samples of an epoch."""
        return self.index.encoding.count * self.index.encoding.masks_per_picture

    def __iter__(self) -> Iterator[LatentBatch]:
        return self

    def __next__(self) -> LatentBatch:
        numbers = range(self._position + self._rank, self._position + self._batch * self._world, self._world)
        samples = [self._sample(number) for number in numbers]
        self._position += self._batch * self._world
        latents, masked, mask, categories, *start = (torch.stack(values) for values in zip(*samples, strict=True))
        return LatentBatch(
            latents.float(), masked.float(), mask.float(), categories, start[0].float() if start else None
        )

    def __enter__(self) -> EncodedStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files. The position is kept; iterating again continues from it."""
        self._open.clear()

    def state_dict(self) -> dict[str, int | str]:
        """The position as numbers and text, for JSON."""
        return {
            "position": self._position,
            "seed": self._seed,
            "world": self._world,
            "source": self.index.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position, with exactly the samples that would have come next.

        Raises:
            DataError: the state belongs to other latents, another seed or number of processes, or is malformed.
        """
        (self._position,) = checked_position(state, self.state_dict(), ("position",))

    def _sample(self, number: int) -> tuple[Tensor, ...]:
        """Sample `number` of the endless sequence, in the stored dtypes and the order of `LatentBatch`."""
        epoch, place = divmod(number, len(self))
        if self._order is None or self._order[0] != epoch:
            rng = np.random.Generator(np.random.PCG64([self._seed, epoch, 5]))
            self._order = epoch, rng.permutation(len(self))
        picture, mask = divmod(int(self._order[1][place]), self.index.encoding.masks_per_picture)
        shard, row = divmod(picture, self.index.encoding.shard_size)
        file = self._file(shard)
        return (
            file.get_slice("latents")[row],
            file.get_slice("masked_latents")[row, mask],
            file.get_slice("mask")[row, mask],
            file.get_slice("categories")[row],
            *([file.get_slice("start_latents")[row, mask]] if self.index.encoding.starts else []),
        )

    def _file(self, number: int) -> Any:
        """A memory-mapped shard. At most `_OPEN_SHARDS` stay open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        self._check(number)
        if len(self._open) >= _OPEN_SHARDS:
            self._open.popitem(last=False)
        self._open[number] = safe_open(self.folder / shard_name(number), framework="pt", device="cpu")
        return self._open[number]

    def _check(self, number: int) -> None:
        if number not in self._known:
            shards.load_shard(self.folder, self.index, number)
            self._known.add(number)
