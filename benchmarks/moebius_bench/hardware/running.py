"""Runs each stage in a process of its own, with a time limit, and gathers the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from moebius_bench.hardware.recorder import Request, read_output
from moebius_bench.hardware.report import ChipRate, HardwareReport, StageOutput, StageResult, Status
from moebius_bench.hardware.stages import STAGES
from moebius_bench.measure.machine import describe_machine, installed_version
from moebius_runtime.hardware.nvidia import describe_gpus

COMMAND = (sys.executable, "-m", "moebius_bench.hardware.worker")
LIBRARIES = (
    "torch",
    "triton",
    "diffusers",
    "accelerate",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "cuda-bindings",
    "numpy",
)
WEIGHTS = "random test weights (stand-in:0)"
_OUTPUT_LINES = 3  # of a broken process's standard error
_GRACE = 5.0  # seconds for a process to end after it was asked to

Announce = Callable[[str, str], None]
"""Called with the name of a stage and its progress."""


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        name: of the report.
        profile: see `stages.PROFILES`.
        stages: in this order.
        device: `cuda` or `cpu`.
        preset: of the networks.
        budget: seconds for all stages together.
        bundle: see `recorder.Request`.
        dry_run: fewer repetitions; marked in the report.
    """

    name: str
    profile: str
    stages: tuple[str, ...]
    device: Literal["cuda", "cpu"]
    preset: str
    budget: float
    bundle: Path | None = None
    dry_run: bool = False


def run_stages(plan: Plan, announce: Announce, command: Sequence[str] = COMMAND) -> HardwareReport:
    """Runs every stage of a plan, one after the other. None can stop the others."""
    created, began = datetime.now(timezone.utc), time.monotonic()
    results: list[StageResult] = []
    rates: list[ChipRate] = []
    with tempfile.TemporaryDirectory(prefix="moebius-hardware-") as folder:
        for name in plan.stages:
            left = plan.budget - (time.monotonic() - began)
            result = _one(name, plan, rates, Path(folder), left, announce, command)
            rates += result.output.rates
            results.append(result)
            announce(name, f"{result.verdict} ({result.seconds:.0f} s)")
    return HardwareReport(
        name=plan.name,
        created=created.isoformat(timespec="seconds"),
        version=installed_version("moebius-edge") or "from a source tree",
        commit=_commit(),
        profile=plan.profile,
        dry_run=plan.dry_run,
        device=plan.device,
        machine=describe_machine(),
        gpus=describe_gpus(),
        libraries={name: installed_version(name) or "not installed" for name in LIBRARIES},
        preset=plan.preset,
        weights=WEIGHTS,
        seconds=time.monotonic() - began,
        budget_seconds=plan.budget,
        stages=results,
    )


def _one(
    name: str,
    plan: Plan,
    rates: list[ChipRate],
    folder: Path,
    left: float,
    announce: Announce,
    command: Sequence[str],
) -> StageResult:
    stage = STAGES[name]
    budget = min(stage.seconds, left)
    if budget < stage.least:
        reason = f"{max(left, 0):.0f} s of {plan.budget:.0f} s are left, and it needs {stage.least:.0f} s at least"
        return StageResult(
            name=name, title=stage.title, status="not run", reason=reason, seconds=0, budget_seconds=stage.seconds
        )
    announce(name, f"begins, {budget:.0f} s at most")
    out = folder / f"{name}.json"
    request = Request(
        stage=name,
        preset=plan.preset,
        device=plan.device,
        seconds=budget,
        folder=str(folder),
        bundle=None if plan.bundle is None else str(plan.bundle.resolve()),
        rates=rates,
        quick=plan.dry_run,
        out=str(out),
    )
    started = time.monotonic()
    status, reason = _process(request, command)
    seconds = time.monotonic() - started
    return StageResult(
        name=name,
        title=stage.title,
        status=status,
        reason=private(reason),
        seconds=seconds,
        budget_seconds=budget,
        output=_private_output(out),
    )


def _process(request: Request, command: Sequence[str]) -> tuple[Status, str]:
    """Runs the process of a stage and returns how it ended. Its process group ends with it."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            output, _ = process.communicate(request.model_dump_json(), timeout=request.seconds)
        except subprocess.TimeoutExpired:
            _end(process)
            return "timed out", f"it was ended after {request.seconds:.0f} s; what it had recorded is kept"
        except BaseException:
            _end(process)
            raise
        log.seek(0)
        last = [line.strip() for line in log.read().splitlines() if line.strip()][-_OUTPUT_LINES:]
    try:
        answer = json.loads(output)
        if process.returncode == 0:
            return answer["status"], answer["reason"]
    except (ValueError, KeyError, TypeError):
        pass
    code = process.returncode
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return "failed", f"its process {how} and gave no answer{': ' if last else ''}{' | '.join(last)[:1000]}"


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the process of a stage and its children: by SIGTERM, so that the GPU is released, then SIGKILL.

    Windows has neither: the process alone is ended there.
    """
    if sys.platform == "win32":
        process.kill()
        process.communicate()
        return
    for number in (signal.SIGTERM, signal.SIGKILL):  # noqa: TID251
        try:
            os.killpg(process.pid, number)  # noqa: TID251
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE)
            break
        except subprocess.TimeoutExpired:
            continue
    process.communicate()


def private(text: str) -> str:
    """A text with the folders of this user replaced, because reports are published."""
    for folder, name in ((str(Path.cwd()), "."), (str(Path.home()), "~"), (tempfile.gettempdir(), "TMP")):
        if len(folder) > 1:
            text = text.replace(folder, name)
    return text


def _private_output(path: Path) -> StageOutput:
    output = read_output(path)
    return output.model_copy(
        update={
            "checks": [check.model_copy(update={"detail": private(check.detail)}) for check in output.checks],
            "facts": {name: private(value) for name, value in output.facts.items()},
            "notes": [private(note) for note in output.notes],
        }
    )


def find_device() -> Literal["cuda", "cpu"]:
    """`cuda` where PyTorch sees a GPU. A separate process checks it, because a broken driver can end that process."""
    script = "import torch; print(torch.cuda.is_available())"
    try:
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return "cpu"
    return "cuda" if done.returncode == 0 and done.stdout.strip() == "True" else "cpu"


def _commit() -> str | None:
    """The commit of this checkout; None outside a checkout or without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
