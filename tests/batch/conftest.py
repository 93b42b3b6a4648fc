"""Folders of tiny pictures, the toy bundle of the runtime's tests, and the command in this process or in its own."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_batch.run import Request, run_job

_SPEC = importlib.util.spec_from_file_location("toy_fixtures", Path(__file__).parents[1] / "runtime/conftest.py")
_TOYS = sys.modules["toy_fixtures"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TOYS)
make_toy, toy_bundle = _TOYS.make_toy, _TOYS.toy_bundle

ROOT = Path(__file__).parents[2]
RUNTIMES = ROOT / "runtimes"
SIDE = 64
OPTIONS = {"mode": "reference", "steps": 1, "strength": 1.0}  # the fastest: what is filled does not matter here
OWN = "_moebius-batch"


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def mask_png() -> bytes:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[16:32, 20:40] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    return buffer.getvalue()


def make_pictures(folder: Path, count: int, broken: int = 0) -> Path:
    """`count` pictures in three sub-folders, `broken` of them cut in half, and their mask as FOLDER.mask.png."""
    distinct = [png(seed) for seed in range(min(count, 50))]
    every = count // broken if broken else count + 1
    for number in range(count):
        data = distinct[number % len(distinct)]
        path = folder / str(number % 3) / f"p{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data[: len(data) // 2] if number % every == every - 1 else data)
    folder.with_name(f"{folder.name}.mask.png").write_bytes(mask_png())
    return folder


def mask_of(folder: Path) -> str:
    return str(folder.with_name(f"{folder.name}.mask.png"))


def results(out: Path) -> dict[str, bytes]:
    """Every result below a destination, without the job's own files."""
    found = (path for path in sorted(out.rglob("*")) if path.is_file() and OWN not in path.parts)
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in found}


def report(out: Path) -> dict[str, dict]:
    lines = (json.loads(line) for line in (out / OWN / "report.jsonl").read_text().splitlines())
    return {line["key"]: line for line in lines}


@pytest.fixture
def job(toy_bundle, tmp_path) -> Callable[..., int]:
    """job(source, out, **fields of Request): runs it in this process and returns the exit code."""

    def run(source: object, out: object, **fields) -> int:
        fields = {"bundle": toy_bundle.path, "options": OPTIONS, "max_error_share": 1.0, **fields}
        return run_job(Request(source=str(source), out=str(out), **fields))

    return run


@pytest.fixture
def start(toy_bundle, tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """start(source, out, *options): the command in a process of its own, as a user runs it."""

    def begin(source: object, out: object, *options: object, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "moebius_batch.cli", str(source), "--out", str(out)]
        command += ["--bundle", str(toy_bundle.path), "--max-error-share", "1"]
        command += [text for name, value in OPTIONS.items() for text in (f"--{name}", str(value))]
        command += map(str, options)  # the last value of an option counts
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        environment = clean | {"PYTHONPATH": str(RUNTIMES)} | environment
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return begin
