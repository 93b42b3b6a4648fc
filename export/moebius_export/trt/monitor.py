"""Progress and log messages of a build. The builder calls both from its own threads, where they must never raise."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

_INTERVAL = 0.1  # seconds between two reports
_KEPT = 20  # messages
_ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")


class Phases:
    """Turns the nested phases of a build into one share of the whole.

    Args:
        report: called with (innermost phase, share from 0 to 1), at most ten times a second.
    """

    def __init__(self, report: Callable[[str, float], None]) -> None:
        self._report = report
        self._lock = threading.Lock()
        self._stack: list[list[Any]] = []  # [name, steps done, steps]
        self._last = 0.0
        self._share = 0.0
        self._stopped = threading.Event()
        self.problem: BaseException | None = None

    def stop(self) -> None:
        """Ends the build at its next step."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside `parent` or on its own."""
        with self._lock:
            if parent is not None:
                names = [entry[0] for entry in self._stack]
                if parent in names:  # when a build fails, phases of other branches end without a call
                    del self._stack[names.index(parent) + 1 :]
            self._stack.append([phase, 0, max(1, int(steps))])
        self._report_share()

    def step(self, phase: str, step: int) -> bool:
        """A step of a phase is done. Returns False to end the build."""
        with self._lock:
            for entry in self._stack:
                if entry[0] == phase:
                    entry[1] = min(int(step) + 1, entry[2])
        self._report_share()
        return not self.stopped

    def finish(self, phase: str) -> None:
        """A phase ended, possibly before its last step."""
        with self._lock:
            names = [entry[0] for entry in self._stack]
            if phase in names:
                del self._stack[names.index(phase) :]
        self._report_share()

    def _report_share(self) -> None:
        """Reports the share. An exception of `report` ends the build and is stored in `problem` for its caller."""
        with self._lock:
            now = time.monotonic()
            if now - self._last < _INTERVAL or not self._stack:
                return
            self._last = now
            share, width = 0.0, 1.0
            for _, done, steps in self._stack:
                share += width * done / steps
                width /= steps
            self._share = max(self._share, min(share, 1.0))  # phases repeat: the bar never goes back
            name, share = self._stack[-1][0], self._share
        try:
            self._report(str(name), share)
        except BaseException as error:
            self.problem = self.problem or error
            self.stop()


def monitor_for(module: Any, phases: Phases) -> Any:
    """An `IProgressMonitor` of that library that forwards to `phases`."""

    class Monitor(module.IProgressMonitor):
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            _quiet(phases, lambda: phases.start(phase_name, parent_phase, num_steps))

        def step_complete(self, phase_name: str, step: int) -> bool:
            return bool(_quiet(phases, lambda: phases.step(phase_name, step)))

        def phase_finish(self, phase_name: str) -> None:
            _quiet(phases, lambda: phases.finish(phase_name))

    return Monitor()


def _quiet(phases: Phases, call: Callable[[], Any]) -> Any:
    """Runs `call`. An exception, which may be a KeyboardInterrupt, ends the build instead of the process."""
    try:
        return call()
    except BaseException as error:
        phases.problem = phases.problem or error
        phases.stop()
        return False


class Messages:
    """The last errors that the library logged, and the activation memory that it reported for an engine."""

    def __init__(self) -> None:
        self._errors: deque[str] = deque(maxlen=_KEPT)
        self.activations: int | None = None

    def clear(self) -> None:
        """Removes the messages of another graph."""
        self._errors.clear()
        self.activations = None

    def add(self, severity: int, text: str) -> None:
        """Adds a message. `severity`: 0 internal error, 1 error, 2 warning, 3 information, 4 verbose."""
        if severity <= 1:
            self._errors.append(" ".join(text.split())[:500])
        elif severity == 3 and (found := _ACTIVATIONS.search(text)):
            self.activations = int(found[1])

    @property
    def last(self) -> str:
        """The last errors on one line, without repetitions."""
        return "; ".join(dict.fromkeys(list(self._errors)[-3:])) or "the builder gave no reason"


def logger_for(module: Any, messages: Messages) -> Any:
    """An `ILogger` of that library that adds to `messages` and prints nothing."""

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            try:
                messages.add(int(severity), msg)
            except BaseException as error:
                messages.add(1, f"(a message was lost: {error})")

    return Logger()
