"""Events that a build reports to its caller, which alone prints them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moebius_export.trt.forecast import Forecast


@dataclass(frozen=True)
class Note:
    """A line that the user should read."""

    text: str


@dataclass(frozen=True)
class Stage:
    """A stage begins: `export`, `precision plan`, `parse` or `build`. `detail` is why it runs or what it works on."""

    name: str
    detail: str


@dataclass(frozen=True)
class Step:
    """Progress within a stage. `share` is 0 to 1, None where the work does not report it."""

    graph: str
    phase: str
    share: float | None


@dataclass(frozen=True)
class Built:
    """An engine of `size` bytes is built. The builder reports `device_memory` bytes for its activations."""

    graph: str
    seconds: float
    size: int
    device_memory: int | None


Event = Note | Stage | Step | Built | Forecast
Report = Callable[[Event], None]
