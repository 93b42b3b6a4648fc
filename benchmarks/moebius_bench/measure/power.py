"""Energy of a stretch of time, from a sensor that is read again and again meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

Samples = Sequence[tuple[float, float]]
"""(seconds of the monotonic clock, watts), in order of time."""


def energy(samples: Samples, begin: float, end: float) -> float | None:
    """Joules from `begin` to `end`: the integral of the power, linear between samples.

    None where the samples do not reach over the whole stretch: energy is not extrapolated.
    """
    if end <= begin or len(samples) < 2 or samples[0][0] > begin or samples[-1][0] < end:
        return None
    times, watts = np.array(samples).T
    moments = np.concatenate([[begin], times[(times > begin) & (times < end)], [end]])
    values = np.interp(moments, times, watts)
    return float((np.diff(moments) * (values[:-1] + values[1:]) / 2).sum())


class Watch:
    """Reads sensors on a thread of its own while a block runs.

    Attributes:
        samples: what `power` returned, with its times.
        peak: the greatest value that `memory` returned, or None.
    """

    def __init__(
        self,
        power: Callable[[], float | None] | None,
        memory: Callable[[], int | None] | None = None,
        period: float = 0.2,
    ) -> None:
        self.samples: list[tuple[float, float]] = []
        self.peak: int | None = None
        self._power, self._memory, self._period = power, memory, period
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="sensors", daemon=True)

    def __enter__(self) -> Watch:
        if self._power is not None or self._memory is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        while True:
            if self._power is not None and (watts := self._power()) is not None:
                self.samples.append((time.monotonic(), watts))
            if self._memory is not None and (held := self._memory()) is not None:
                self.peak = max(self.peak or 0, held)
            if self._stop.wait(self._period):
                return
