"""Progress and messages of a build. Both are called from the builder's threads and must never raise there."""

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
    """The phases of a build, one in the other, as a share of the whole.

    Args:
        report: told (innermost phase, share from 0 to 1), at most ten times a second.
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
        """Lets the builder end at its next step."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        """Whether the build was asked to end."""
        return self._stopped.is_set()

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside `parent` or on its own."""
        with self._lock:
            if parent is not None:
                names = [entry[0] for entry in self._stack]
                if parent in names:  # phases of other branches end without notice when a build fails
                    del self._stack[names.index(parent) + 1 :]
            self._stack.append([phase, 0, max(1, int(steps))])
        self._say()

    def step(self, phase: str, step: int) -> bool:
        """A step of a phase is done; False ends the build."""
        with self._lock:
            for entry in self._stack:
                if entry[0] == phase:
                    entry[1] = min(int(step) + 1, entry[2])
        self._say()
        return not self.stopped

    def finish(self, phase: str) -> None:
        """A phase ended, maybe before its last step."""
        with self._lock:
            names = [entry[0] for entry in self._stack]
            if phase in names:
                del self._stack[names.index(phase) :]
        self._say()

    def _say(self) -> None:
        """Reports the share; what the report raises is kept for the caller of the build, which then ends."""
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
    """An `IProgressMonitor` of that library that tells `phases`."""

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
    """Calls; an exception ends the build instead of the process. A keyboard interrupt may arrive here as well."""
    try:
        return call()
    except BaseException as error:
        phases.problem = phases.problem or error
        phases.stop()
        return False


class Messages:
    """What the library says: its last complaints, and the memory that it states for an engine."""

    def __init__(self) -> None:
        self._complaints: deque[str] = deque(maxlen=_KEPT)
        self.activations: int | None = None

    def clear(self) -> None:
        """Forgets what was said of another graph."""
        self._complaints.clear()
        self.activations = None

    def add(self, severity: int, text: str) -> None:
        """A message; `severity` is 0 for an internal error, 1 error, 2 warning, 3 information, 4 verbose."""
        if severity <= 1:
            self._complaints.append(" ".join(text.split())[:500])
        elif severity == 3 and (found := _ACTIVATIONS.search(text)):
            self.activations = int(found[1])

    @property
    def last(self) -> str:
        """The last errors, on one line; of repeated ones each once."""
        return "; ".join(dict.fromkeys(list(self._complaints)[-3:])) or "the builder gave no reason"


def logger_for(module: Any, messages: Messages) -> Any:
    """An `ILogger` of that library that tells `messages` and writes nothing."""

    class Logger(module.ILogger):
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            try:
                messages.add(int(severity), msg)
            except BaseException as error:
                messages.add(1, f"(a message was lost: {error})")

    return Logger()
