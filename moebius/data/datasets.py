"""Endless, resumable stream of training samples: pictures that are cropped, masked and flipped at random.

    >>> source = JoinedSource([(SceneSource(10_000, 512), 1), (PhotographSource(), 50)])
    >>> with SampleStream(source, size=512, seed=0, threads=4) as stream:
    ...     for batch in batches(stream, 8):
    ...         ...  # batch.image, batch.mask, batch.categories; stream.state_dict() is the position after it

Each sample has its own random generator, keyed by (seed, epoch, number of the entry in that epoch). A sample therefore
depends neither on threads and processes nor on what was drawn before it.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from moebius.data.masks import Mask, MaskSettings, training_mask
from moebius.data.pictures import BrokenPicture, CropSettings, crop
from moebius.data.sources import Entry, Source, Task
from moebius.errors import DataError, one_line

_AHEAD = 2  # samples in work for each thread


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture for training.

    Attributes:
        image: uint8 RGB [S, S, 3].
        mask: bool [S, S], True in the masked region.
        task: what the masked region is to be filled with.
        name: of the entry, for messages.
        epoch: from 0.
        number: of the entry in its epoch, from 0, counted over all processes.
        own_mask: True if the picture came with its mask, False if the mask was drawn.
    """

    image: npt.NDArray[np.uint8]
    mask: Mask
    task: Task
    name: str
    epoch: int
    number: int
    own_mask: bool = False


@dataclass(frozen=True)
class _Skipped:
    name: str
    reason: str
    epoch: int
    number: int


class SampleStream:
    """Iterator over one process's share of the training samples, with a position that can be saved.

    `state_dict()` is the position after the last sample returned, however far the threads have read ahead.

    Attributes:
        skipped: pictures skipped by this process since the start of training.
        reasons: how often each reason for skipping occurred since this object was created.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        masks: MaskSettings | None = None,
        crops: CropSettings | None = None,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        epochs: int | None = None,
        broken: Literal["skip", "refuse"] = "skip",
        threads: int = 0,
        on_skip: Callable[[str, str], None] | None = None,
    ) -> None:
        """Samples of `size` pixels square.

        Args:
            source: where pictures come from.
            size: pixels, 16 or more.
            masks: the random masks for pictures that come without one.
            crops: how squares are cut.
            seed: 0 or more; same seed, same samples.
            rank: this process among `world`; it gets the entries whose number leaves the remainder `rank`.
            world: number of processes.
            epochs: number of epochs; None is endless.
            broken: whether an unusable picture is counted and skipped, or raises `DataError`.
            threads: number of threads that prepare samples ahead; 0 prepares each sample on demand.
            on_skip: called with name and reason of each skipped picture.

        Raises:
            DataError: an argument is out of its range.
        """
        if size < 16 or seed < 0 or threads < 0 or not 0 <= rank < world or (epochs is not None and epochs < 1):
            raise DataError(
                f"a stream of size={size}, seed={seed}, threads={threads}, rank={rank} of {world}, epochs={epochs}: "
                "expected size >= 16, seed and threads >= 0, 0 <= rank < world and epochs >= 1"
            )
        if broken not in ("skip", "refuse"):
            raise DataError(f"broken={broken}: expected skip or refuse")
        self.source, self.size, self.seed = source, size, seed
        self.masks, self.crops = masks or MaskSettings(), crops or CropSettings()
        self.skipped = 0
        self.reasons: Counter[str] = Counter()
        self._rank, self._world, self._epochs = rank, world, epochs
        self._refuse, self._on_skip = broken == "refuse", on_skip
        self._threads = threads
        self._epoch, self._number = 0, 0  # of the next entry
        self._running: Iterator[Sample] | None = None

    def __iter__(self) -> SampleStream:
        return self

    def __next__(self) -> Sample:
        if self._running is None:
            self._running = self._threaded() if self._threads else self._samples(map(self._make, self._tickets()))
        try:
            return next(self._running)
        except StopIteration:
            raise
        except BaseException:
            self._running = None  # asking again starts from the position
            raise

    def __enter__(self) -> SampleStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops the threads. The position is kept; iterating again continues from it."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]  # a generator
            self._running = None

    def state_dict(self) -> dict[str, int | str]:
        """The position as numbers and text, for JSON."""
        return {
            "epoch": self._epoch,
            "number": self._number,
            "skipped": self.skipped,
            "seed": self.seed,
            "world": self._world,
            "source": self.source.fingerprint(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position, with exactly the samples that would have come next.

        Raises:
            DataError: the state belongs to another source, seed or number of processes, or is malformed.
        """
        values = checked_position(state, self.state_dict(), ("epoch", "number", "skipped"))
        self.close()
        self._epoch, self._number, self.skipped = values

    def _tickets(self) -> Iterator[tuple[Entry, int, int]]:
        """Entries of this process from the position on, with epoch and number."""
        epoch, start = self._epoch, self._number
        while self._epochs is None or epoch < self._epochs:
            given = start  # entries before the position count: their epoch is not empty
            for number, entry in enumerate(self.source.entries(epoch, self.seed, start), start):
                if number % self._world == self._rank:
                    given += 1
                    yield entry, epoch, number
            if not given:
                raise DataError(
                    f"an epoch has no picture for process {self._rank} of {self._world}; give more than processes"
                )
            epoch, start = epoch + 1, 0

    def _make(self, ticket: tuple[Entry, int, int]) -> Sample | _Skipped:
        """Makes the sample of an entry. Depends only on the ticket and the settings."""
        entry, epoch, number = ticket
        rng = np.random.Generator(np.random.PCG64([self.seed, epoch, 3, number]))
        try:
            item = entry.load()
            image, mask = crop(rng, item.image, item.mask, self.size, self.crops)
        except BrokenPicture as error:
            return _Skipped(one_line(entry.name), str(error), epoch, number)
        own = mask is not None
        if mask is None:
            mask = training_mask(rng, self.size, self.masks)
        return Sample(np.asarray(image), mask, item.task, entry.name, epoch, number, own)

    def _threaded(self) -> Iterator[Sample]:
        tickets = self._tickets()
        with ThreadPoolExecutor(self._threads, "data") as pool:
            waiting: deque[Future[Sample | _Skipped]] = deque()

            def results() -> Iterator[Sample | _Skipped]:
                for ticket in tickets:
                    waiting.append(pool.submit(self._make, ticket))
                    if len(waiting) > self._threads * _AHEAD:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()

            try:
                yield from self._samples(results())
            finally:
                for future in waiting:
                    future.cancel()

    def _samples(self, results: Iterator[Sample | _Skipped]) -> Iterator[Sample]:
        """Yields the samples, counts the skipped pictures, and updates the position."""
        fruitful, last = self._epoch, None  # epoch of the last sample; last picture skipped since
        from_start = (self._epoch, self._number) == (0, 0)
        for result in results:
            if isinstance(result, _Skipped):
                last = result
                self._skip(result)
                if result.epoch > fruitful + 1:
                    raise _none_usable(result)
                continue
            fruitful, last, from_start = result.epoch, None, False
            self._epoch, self._number = result.epoch, result.number + 1
            yield result
        if last is not None and from_start:
            raise _none_usable(last)

    def _skip(self, picture: _Skipped) -> None:
        if self._refuse:
            raise DataError(f"{picture.name}: {picture.reason}; repair or remove it, or set broken: skip")
        self._epoch, self._number = picture.epoch, picture.number + 1
        self.skipped += 1
        self.reasons[picture.reason] += 1
        if self._on_skip:
            self._on_skip(picture.name, picture.reason)


def checked_position(state: dict[str, Any], ours: dict[str, Any], counts: tuple[str, ...]) -> list[int]:
    """Checks that a saved position belongs to the stream at position `ours`; returns its numbers named `counts`.

    Raises:
        DataError: it belongs to another source, seed or number of processes, or is malformed.
    """
    if state.keys() != ours.keys():
        raise DataError(f"a data position of {', '.join(sorted(map(str, state)))}: expected {', '.join(sorted(ours))}")
    for key, what in (("seed", "seed"), ("world", "number of processes"), ("source", "set of pictures")):
        if state[key] != ours[key]:
            raise DataError(f"the saved data position has another {what} ({state[key]}, now {ours[key]}); restore it")
    values = [state[key] for key in counts]
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values):
        raise DataError(f"a data position of {', '.join(counts)} = {values}: expected numbers of 0 or more")
    return values


def _none_usable(last: _Skipped) -> DataError:
    return DataError(f"no picture of a whole epoch could be used, lastly {last.name}: {last.reason}; check the data")


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as tensors, on the CPU.

    Attributes:
        image: float32 [B, 3, S, S] in [-1, 1].
        mask: float32 [B, 1, S, S], 1 in the masked region.
        categories: int64 [B, m], the ids of the branch that each sample trains.
    """

    image: torch.Tensor
    mask: torch.Tensor
    categories: torch.Tensor


def category_ids(task: Task, num_categories: int = 20) -> list[int]:
    """Latent category ids of a task: the first half for `background`, the second half for `foreground`."""
    half = num_categories // 2
    return list(range(half)) if task == "background" else list(range(half, 2 * half))


def collate(samples: list[Sample], num_categories: int = 20) -> Batch:
    """Stacks samples of one size into a `Batch`."""
    pixels = torch.from_numpy(np.stack([sample.image for sample in samples]))  # [B, S, S, 3]
    image = pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()
    mask = torch.from_numpy(np.stack([sample.mask for sample in samples]))[:, None].float()
    ids = torch.tensor([category_ids(sample.task, num_categories) for sample in samples])
    return Batch(image, mask, ids)


def batches(stream: SampleStream, size: int, num_categories: int = 20) -> Iterator[Batch]:
    """Yields batches of `size` samples, drawn from the stream on demand. If the stream ends, the last may be smaller.

    After each batch, `stream.state_dict()` is the position after it.
    """
    held: list[Sample] = []
    for sample in stream:
        held.append(sample)
        if len(held) == size:
            yield collate(held, num_categories)
            held = []
    if held:
        yield collate(held, num_categories)
