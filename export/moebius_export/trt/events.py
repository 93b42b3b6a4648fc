"""What a build tells its caller, which alone draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moebius_export.trt.forecast import Forecast


@dataclass(frozen=True)
class Note:
    """A line that the user should read."""

    text: str


@dataclass(frozen=True)
class Step:
    """Where a graph's work is: `share` from 0 to 1, None where the library does not say."""

    graph: str
    phase: str
    share: float | None


@dataclass(frozen=True)
class Built:
    """An engine is there, of `size` bytes. `device_memory` is what the builder says that its activations need."""

    graph: str
    seconds: float
    size: int
    device_memory: int | None


Event = Note | Step | Built | Forecast
Report = Callable[[Event], None]
