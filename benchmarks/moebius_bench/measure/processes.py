"""Worker processes: started one at a time, watched, and their answers checked."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from moebius_bench.measure.power import Watch
from moebius_bench.measure.worker_job import Job

COMMAND = (sys.executable, "-m", "moebius_bench.measure.worker")


@dataclass(frozen=True)
class Answer:
    """A worker's result, or why there is none; and what was watched meanwhile."""

    result: dict[str, Any] | None
    error: str | None = None
    samples: list[tuple[float, float]] = field(default_factory=list)
    peak_device_memory: int | None = None


@dataclass(frozen=True)
class Sensors:
    """What is read while a worker runs: watts of the machine, and device memory of a process."""

    power: Callable[[], float | None] | None = None
    power_source: str = ""
    memory: Callable[[int], int | None] | None = None


NO_SENSORS = Sensors()
Runner = Callable[[Job], Answer]


def run_worker(job: Job, sensors: Sensors = NO_SENSORS, command: Sequence[str] = COMMAND) -> Answer:
    """Runs one job in a fresh process and waits for it. A crash is an answer too, with its last words."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        memory = sensors.memory
        with Watch(sensors.power, None if memory is None else lambda: memory(process.pid)) as watch:
            try:
                output, _ = process.communicate(job.model_dump_json())
            except BaseException:
                process.kill()
                process.wait()
                raise
        log.seek(0)
        last_words = [line.strip() for line in log.read().splitlines() if line.strip()]
    result, error = _parse(output, process.returncode, last_words)
    return Answer(result, error, list(watch.samples), watch.peak)


def _parse(output: str, code: int, last_words: list[str]) -> tuple[dict[str, Any] | None, str | None]:
    try:
        answer = json.loads(output)
        if code == 0 and answer["ok"] is True:
            return answer["result"], None
        if code == 0:
            return None, str(answer["error"])
    except (ValueError, KeyError, TypeError):
        pass
    words = f": {last_words[-1][:300]}" if last_words else ""
    if code < 0:
        return None, f"the process was ended by {_signal_name(-code)}{_hint(-code)}{words}"
    return None, f"the process ended with exit code {code} and no result{words}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _hint(number: int) -> str:
    return " (the system ends processes so when memory runs out)" if _signal_name(number) == "SIGKILL" else ""
