"""A stage's side of the report: what it records is on the disk at once, so that a killed stage loses nothing."""

from __future__ import annotations

import importlib.util
import math
import time
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from moebius_bench.hardware.report import Bound, Check, ChipRate, Speedup, StageOutput, Timing
from moebius_bench.results import Summary
from moebius_bench.stats import summary
from moebius_runtime.files import atomic_write


class NotInstalledError(Exception):
    """What a stage needs is not on this machine. This is no failure."""


class NotRunError(Exception):
    """A stage does not apply to this machine, or has no time. This is no failure."""


class Request(BaseModel):
    """What the parent asks of a stage's process.

    Attributes:
        stage: its name.
        preset: of the networks; a stage may reduce it, with a note.
        device: `cuda` or `cpu`.
        seconds: until the parent ends the process.
        folder: for files that later stages use, such as an exported bundle.
        bundle: a bundle to use in place of an export, or None.
        rates: of the chip, as measured by an earlier stage.
        quick: fewer repetitions and steps, for a dry run.
        out: where the recorded output goes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: str
    preset: str
    device: Literal["cuda", "cpu"]
    seconds: float
    folder: str
    bundle: str | None = None
    rates: list[ChipRate] = []
    quick: bool = False
    out: str


class Recorder:
    """Collects a stage's checks, timings and notes, and writes them after each addition."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self._started = time.monotonic()
        self._output = StageOutput()

    @property
    def left(self) -> float:
        """Seconds until the parent ends this process."""
        return self.request.seconds - (time.monotonic() - self._started)

    @property
    def threads(self) -> int | None:
        """Of PyTorch on the CPU: one in a dry run, which may share its machine; None for the physical cores."""
        return 1 if self.request.quick else None

    @property
    def output(self) -> StageOutput:
        """What was recorded until now."""
        return self._output

    def at_most(self, subject: str, name: str, measured: float, limit: float, detail: str = "") -> bool:
        """A check that a figure is no larger than a limit; NaN fails."""
        return self._figure(subject, name, measured, limit, measured <= limit, detail)

    def at_least(self, subject: str, name: str, measured: float, limit: float, detail: str = "") -> bool:
        """A check that a figure is no smaller than a limit; NaN fails. Infinity counts as the largest float."""
        return self._figure(subject, name, measured, limit, measured >= limit, detail)

    def check(self, subject: str, name: str, passed: bool, detail: str = "") -> bool:
        """A check without a figure."""
        return self._add(Check(subject=subject, name=name, passed=passed, detail=detail))

    def _figure(self, subject: str, name: str, measured: float, limit: float, passed: bool, detail: str) -> bool:
        if not math.isfinite(measured):  # JSON has no such numbers
            detail = f"{measured}{detail and '; '}{detail}"
        figure = measured if math.isfinite(measured) else None
        return self._add(Check(subject=subject, name=name, passed=passed, measured=figure, limit=limit, detail=detail))

    def _add(self, check: Check) -> bool:
        self._extend(checks=[*self._output.checks, check])
        return check.passed

    def timing(
        self,
        subject: str,
        variant: str,
        precision: str,
        seconds: list[float],
        bound: Bound | None = None,
        device_memory: int | None = None,
    ) -> None:
        """Seconds of the counted runs of one variant."""
        found = summary(seconds)
        row = Timing(
            subject=subject,
            variant=variant,
            precision=precision,
            seconds=found,
            bound=bound,
            share=None if bound is None else bound.seconds / found.median,
            device_memory=device_memory,
        )
        self._extend(timings=[*self._output.timings, row])

    def speedup(
        self, subject: str, precision: str, above: str, below: str, pair: tuple[list[float], list[float]]
    ) -> None:
        """Ratio of two variants that ran in the same rounds."""
        ratios = [slow / fast for slow, fast in zip(*pair, strict=True)]
        row = Speedup(subject=subject, precision=precision, above=above, below=below, ratio=summary(ratios))
        self._extend(speedups=[*self._output.speedups, row])

    def rate(self, kind: Literal["matmul", "copy"], precision: str, size: int, per_second: Summary) -> None:
        """A rate of the chip."""
        row = ChipRate(kind=kind, precision=precision, size=size, per_second=per_second)
        self._extend(rates=[*self._output.rates, row])

    def fact(self, name: str, value: str) -> None:
        """Something that was found, under a name."""
        self._extend(facts=self._output.facts | {name: value})

    def note(self, text: str) -> None:
        """Something that the reader must know of these figures."""
        self._extend(notes=[*self._output.notes, text])

    def bound(self, bytes_moved: int, macs: int, precision: str) -> Bound | None:
        """The chip's limit for a piece of work; None where its rates were not measured."""
        copy = next((rate for rate in self.request.rates if rate.kind == "copy"), None)
        matmul = next(
            (rate for rate in self.request.rates if rate.kind == "matmul" and rate.precision == precision), None
        )
        if copy is None or matmul is None:
            return None
        return Bound(
            bytes=bytes_moved,
            macs=macs,
            seconds_by_bytes=bytes_moved / copy.per_second.median,
            seconds_by_macs=macs / matmul.per_second.median,
        )

    def _extend(self, **changes: object) -> None:
        self._output = self._output.model_copy(update=changes)
        with atomic_write(self.request.out) as stream:
            stream.write(self._output.model_dump_json().encode())


def need(*modules: str) -> None:
    """Checks that modules can be found, without importing them.

    Raises:
        NotInstalledError: some are missing; all of those are named.
    """
    if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
        raise NotInstalledError(f"{', '.join(missing)} not installed")


def read_output(path: Path) -> StageOutput:
    """What a stage had recorded when its process ended."""
    return StageOutput.model_validate_json(path.read_bytes()) if path.is_file() else StageOutput()
