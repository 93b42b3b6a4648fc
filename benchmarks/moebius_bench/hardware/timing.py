"""Times variants interleaved, round by round, on a CPU or a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

Work = Callable[[], object]


class TooSlowError(Exception):
    """The remaining time is too short for one measured round."""


def synchronizer(torch: Any, device: str) -> Callable[[], None]:
    """A function that waits until the device has finished all work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def interleaved(
    work: Mapping[str, Work], wait: Callable[[], None], *, seconds: float, most: int, warm_up: bool = True
) -> dict[str, list[float]]:
    """Seconds of every variant in each measured round. The first variant changes from round to round.

    Args:
        work: variant -> function to time.
        wait: see `synchronizer`; called before and after each run.
        seconds: no round starts that would end later, by the longest round so far.
        most: number of measured rounds.
        warm_up: run one more round first, not measured, for captures and autotuning.

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
                raise TooSlowError(f"a round takes {last:.1f} s, and {seconds:.0f} s are available")
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
