"""Access to the machine: files, programs and libraries. Every check reads through it, so tests can replay machines."""

from __future__ import annotations

import json
import platform
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebius_export.doctor.questions import MARK

_ASK_SECONDS = 120  # PyTorch on a cold Jetson takes tens of seconds
_RUN_SECONDS = 20


@dataclass(frozen=True)
class Ran:
    """Exit code and output (both streams) of a program."""

    code: int
    text: str


@dataclass(frozen=True)
class Answer:
    """The answer of a library about itself: its facts in `value`, or why it does not work in `problem`.

    `missing` is true if it is not installed, false if it is installed and does not work.
    """

    value: Any = None
    problem: str | None = None
    missing: bool = False


def run_command(arguments: Sequence[str]) -> Ran | None:
    """Runs a program of the system; None if it is not installed."""
    program = shutil.which(arguments[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *arguments[1:]], capture_output=True, text=True, errors="replace", timeout=_RUN_SECONDS
        )
    except subprocess.TimeoutExpired:
        return Ran(124, f"no answer in {_RUN_SECONDS} s")
    except OSError as error:
        return Ran(126, str(error.strerror))
    return Ran(done.returncode, done.stdout + done.stderr)


def ask_library(name: str) -> Answer:
    """Asks a library of `questions.QUESTIONS` in a process of its own. The answer also says if that process dies."""
    command = [sys.executable, "-m", "moebius_export.doctor.questions", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_ASK_SECONDS)
    except subprocess.TimeoutExpired:
        return Answer(problem=f"importing it takes more than {_ASK_SECONDS} s")
    return read_answer(done.returncode, done.stdout, done.stderr)


def read_answer(code: int, out: str, err: str) -> Answer:
    """Reads the answer from the exit code and the output of such a process."""
    line = next((line for line in out.splitlines() if line.startswith(MARK)), None)
    if line is None:
        if code < 0:
            return Answer(problem=f"importing it ends the process ({signal.Signals(-code).name})")
        last = (err.strip().splitlines() or ["no message"])[-1]
        return Answer(problem=f"importing it ends the process (exit code {code}: {last[:300]})")
    content = json.loads(line.removeprefix(MARK))
    if "error" in content:
        return Answer(problem=" ".join(str(content["error"]).split())[:500], missing=content["kind"] == "missing")
    return Answer(value=content["value"])


@dataclass(frozen=True)
class Sources:
    """The machine that the doctor checks.

    Attributes:
        root: root of its file tree.
        run: runs a program of the system.
        ask: asks a library.
        free_disk: free bytes of the disk of a path.
        machine: as `platform.machine()`.
        python: version, such as (3, 10).
    """

    root: Path = Path("/")
    run: Callable[[Sequence[str]], Ran | None] = run_command
    ask: Callable[[str], Answer] = ask_library
    free_disk: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free
    machine: str = field(default_factory=platform.machine)
    python: tuple[int, int] = field(default_factory=lambda: (sys.version_info[0], sys.version_info[1]))

    def smi(self, arguments: Sequence[str]) -> str | None:
        """Output of nvidia-smi, for `moebius_runtime.hardware.nvidia.Query`; None if it fails."""
        ran = self.run(["nvidia-smi", *arguments])
        return ran.text if ran is not None and ran.code == 0 else None
