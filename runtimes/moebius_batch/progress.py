"""Progress of a job: one bar on a terminal, a plain line at times in logs and pipes."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from moebius_batch.errors import FailingJobError
from moebius_runtime import console

SILENCE = 30.0
"""Seconds between two lines where there is no terminal."""
_FEW = 50  # pictures below which a share of failures means little


class JobProgress(AbstractContextManager["JobProgress"]):
    """Counts pictures, shows them, and stops a job of which too many pictures fail.

    Args:
        total: pictures of this process's shards that are not finished; None where tars are not listed yet.
        max_error_share: the job stops once more than this share of max(pictures so far, 50) has failed.
        terminal: where to print.
        clock: the current time in seconds.
    """

    def __init__(
        self,
        total: int | None,
        max_error_share: float = 1.0,
        terminal: Console = console.err,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._share, self._console, self._clock = total, max_error_share, terminal, clock
        self.done = self.failed = 0
        self._began = self._printed = clock()
        self._bars: Progress | None = None
        self._task = TaskID(0)
        if terminal.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self._bars = Progress(*columns, console=terminal)
            self._task = self._bars.add_task("pictures", total=total)

    def __enter__(self) -> JobProgress:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif kind is None and self.done:
            self._print()

    def add(self, pictures: int, failed: int) -> None:
        """Counts pictures, of which `failed` failed.

        Raises:
            FailingJobError: too many failed.
        """
        self.done += pictures
        self.failed += failed
        if self._bars is not None:
            self._bars.update(self._task, completed=self.done, description=f"pictures, {self._rate()}")
        elif self._clock() - self._printed >= SILENCE:
            self._print()
        if failed and self.failed > self._share * max(self.done, _FEW):
            raise FailingJobError(
                f"{self.failed} of {self.done} pictures failed, over --max-error-share {self._share:g}; the report "
                "names the errors. What is finished is kept: start the job again, with a larger share if that is fine"
            )

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._clock() - self._began

    def _rate(self) -> str:
        rate = self.done / max(self.seconds, 1e-9)
        return f"{rate:.3g} a second" + f", {self.failed} failed" * bool(self.failed)

    def _print(self) -> None:
        self._printed = self._clock()
        left = ""
        if self._total and 0 < self.done < self._total:
            seconds = self.seconds / self.done * (self._total - self.done)
            left = f", {seconds / 60:.0f} min left" if seconds >= 120 else f", {seconds:.0f} s left"
        total = "" if self._total is None else f" of {self._total}"
        self._console.print(f"moebius-batch: {self.done}{total} pictures, {self._rate()}{left}")
