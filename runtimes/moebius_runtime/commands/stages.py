"""Progress of a long command: a spinner on a terminal, plain lines in logs and pipes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rich.console import Console

from moebius_runtime.console import err, one_line

SILENCE = 30.0
"""Seconds between two lines of one stage, also if the stage reports nothing."""


class Stages(AbstractContextManager["Stages"]):
    """A callable that prints progress: call it with (stage, done, total) for each step; `total` 0 means unknown.

    On a terminal it updates the line of a spinner. Elsewhere it prints a line when a new stage begins and at most every
    `SILENCE` seconds within a stage; a timer prints one if the work reports nothing for so long. The text of `stage` up
    to its first colon is its name.

    Args:
        title: name of the command.
        console: where to print.
        clock: the current time in seconds.
    """

    def __init__(self, title: str, console: Console = err, clock: Callable[[], float] = time.monotonic) -> None:
        self._title, self._console, self._clock = title, console, clock
        self._status: Any = console.status(title) if console.is_terminal else None
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._stage, self._text = "", "started"
        self._began = self._printed = clock()

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        """Reports a step."""
        text = one_line(f"{stage}: {done} of {total}" if total else stage)
        if self._status is not None:
            self._status.update(text)
            return
        with self._lock:
            name = stage.partition(":")[0]
            self._text = text
            if name != self._stage:
                self._stage = name
                self._print(text)
            else:
                self._again()

    def beat(self) -> None:
        """Names the stage again if nothing was printed for `SILENCE` seconds."""
        with self._lock:
            self._again()

    def __enter__(self) -> Stages:
        if self._status is not None:
            self._status.start()
        else:
            threading.Thread(target=self._watch, name="stages", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._status is not None:
            self._status.stop()

    def _watch(self) -> None:
        while not self._ended.wait(1.0):
            self.beat()

    def _again(self) -> None:
        if self._clock() - self._printed >= SILENCE:
            self._print(self._text)

    def _print(self, text: str) -> None:
        self._printed = self._clock()
        self._console.print(f"{self._title}: {text} ({self._printed - self._began:.0f} s)")
