"""Variants timed next to each other, round by round, on a CPU or a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

Work = Callable[[], object]


class TooSlowError(Exception):
    """Not one counted round fits into the time that is left."""


def synchronizer(torch: Any, device: str) -> Callable[[], None]:
    """A function that waits until the device has done what it was given."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def interleaved(
    work: Mapping[str, Work], wait: Callable[[], None], *, seconds: float, most: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every variant in each counted round. The variant that begins changes from round to round.

    Args:
        work: variant -> what is timed.
        wait: see `synchronizer`; called before and after each run.
        seconds: no round begins that would end after these, by the longest round so far.
        most: counted rounds.
        warm_up: one round before them that does not count; captures and autotuning happen there.

    Raises:
        TooSlowError: the time does not allow one counted round.
    """
    began = time.monotonic()
    names, found = list(work), {name: list[float]() for name in work}
    longest = last = 0.0
    for number in range(most + warm_up):
        counted = number - warm_up + 1
        if number and time.monotonic() - began + longest > seconds:
            if counted < 2:
                raise TooSlowError(f"a round takes {last:.1f} s and {seconds:.0f} s are there in all")
            break
        round_began = time.monotonic()
        for name in names if number % 2 else reversed(names):
            wait()
            started = time.perf_counter()
            work[name]()
            wait()
            if counted > 0:
                found[name].append(time.perf_counter() - started)
        last = time.monotonic() - round_began
        if counted > 0:  # the first may hold captures and autotuning
            longest = max(longest, last)
    return found
