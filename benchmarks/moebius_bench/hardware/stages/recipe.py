"""Stage `small-recipe`: the training recipe of the small network, scripts/train-small-on-gpu.sh, at a short length."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from moebius_bench.hardware.recorder import NotInstalledError, NotRunError, Recorder, need

SCRIPT = Path(__file__).resolve().parents[4] / "scripts/train-small-on-gpu.sh"
_CHANGED = 500  # of 620 parameters: those of frozen batch norms stay
# What the script takes from the environment.
LENGTHS = {"PICTURES": 64, "MASKS": 2, "STEPS": 60, "BATCH": 64, "WHOLE_STEPS": 10, "WHOLE_BATCH": 16, "THREADS": 8}
QUICK_LENGTHS = {"PICTURES": 2, "MASKS": 1, "STEPS": 1, "BATCH": 2, "WHOLE_STEPS": 1, "WHOLE_BATCH": 1, "THREADS": 0}


def run(record: Recorder) -> None:
    """Draws, encodes and trains; the weights must load, be finite, and differ from those that it started from."""
    need("torch", "diffusers", "accelerate", "skimage", "yaml", "safetensors")
    if not SCRIPT.is_file():
        raise NotRunError("the recipe runs from a checkout: there is no scripts/train-small-on-gpu.sh here")
    if shutil.which("bash") is None:
        raise NotInstalledError("bash not installed")
    out = Path(record.request.folder) / "small"
    lengths = QUICK_LENGTHS if record.request.quick else LENGTHS
    environment = os.environ | {name: str(value) for name, value in lengths.items()}
    environment |= {"PYTHON": sys.executable, "DEVICE": record.request.device}
    for line in _script(out, environment, record.left - 10):
        if found := re.fullmatch(r"== (.*) after (\d+) s.*", line):
            record.fact(f"{found[1]} after", f"{found[2]} s")
    record.fact("lengths", ", ".join(f"{name}={value}" for name, value in lengths.items()))
    from moebius import preset
    from moebius.weights.load import load_student

    sizes = preset("small").student
    (made, checkpoint), (before, _) = load_student(str(out / "whole"), sizes), load_student("shipped:small", sizes)
    record.check("the recipe's weights", "are no random test weights", not checkpoint.stand_in)
    pairs = list(zip(made.parameters(), before.parameters(), strict=True))
    changed = sum(not a.equal(b) for a, b in pairs)
    record.at_least("the recipe's weights", f"parameters of {len(pairs)} that training changed", changed, _CHANGED)
    moved = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in pairs))
    size = math.sqrt(sum(float(b.double().square().sum()) for _, b in pairs))
    # Random weights would be 1.4 away, and NaN fails too.
    record.at_most("the recipe's weights", "relative distance from the start", moved / size, 0.5)


def _script(out: Path, environment: dict[str, str], seconds: float) -> list[str]:
    """Runs the script and returns its output's lines.

    Raises:
        RuntimeUnavailableError: it failed, with its last lines, or took too long.
    """
    from moebius_runtime.errors import RuntimeUnavailableError

    process = subprocess.Popen(
        ["bash", str(SCRIPT), str(out)],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate(timeout=max(seconds, 1))
    except subprocess.TimeoutExpired as error:
        process.send_signal(signal.SIGTERM)  # its children end with the process group of this stage
        raise RuntimeUnavailableError(f"{SCRIPT.name} took longer than {seconds:.0f} s and was ended") from error
    if process.returncode:
        last = " ".join(output.split())[-600:]
        raise RuntimeUnavailableError(f"{SCRIPT.name} ended with exit code {process.returncode}: {last}")
    return output.splitlines()
