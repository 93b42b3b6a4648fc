"""Stages of the profile `jetson`: the board, and TensorRT engines built there. They need no PyTorch.

The reference is `ort-cpu` in fp32 with the same bundle, which was compared with PyTorch where it was exported. In a dry
run the engines' stage runs `ort-cpu` in place of TensorRT and builds nothing.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from moebius_bench.hardware.recorder import Recorder, need
from moebius_bench.hardware.stages.engines import export_command
from moebius_bench.hardware.stages.torch import PICTURE_LIMITS
from moebius_bench.hardware.timing import interleaved

if TYPE_CHECKING:
    from moebius_runtime.bundle.manifest import Precision

_ROUNDS, _STEPS, _QUICK_STEPS = 5, 20, 2
_LONGEST = 400  # characters of a fact
# Read-only queries that a board answers; those that are missing are left out.
_QUERIES = {
    "power mode": ("nvpmodel", "-q"),
    "packages": ("dpkg-query", "--show", "libnvinfer*", "nvidia-jetpack", "nvidia-l4t-core", "python3-libnvinfer*"),
}


def run_board(record: Recorder) -> None:
    """What the board is: release, power mode, clocks, memory and the packages of CUDA and TensorRT."""
    from moebius_runtime.hardware.jetson import describe_jetson, is_jetson

    record.fact("a Jetson", "yes" if is_jetson() else "no")
    for name, value in describe_jetson().items():
        record.fact(name, value)
    for name, command in _QUERIES.items():
        if text := _answer(command):
            record.fact(name, " ".join(text.split())[:_LONGEST])
    record.check("the board", "is a Jetson, or this is a dry run", is_jetson() or record.request.quick)


def _answer(command: tuple[str, ...]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def run_engines(record: Recorder) -> None:
    """Builds FP16 engines, fills a picture with them and with `ort-cpu`, compares and times both."""
    from moebius_export.trajectories.scenes import seeded_scene
    from moebius_runtime.backends import create_backend
    from moebius_runtime.bundle.bundle import Bundle
    from moebius_runtime.images.metrics import psnr, ssim
    from moebius_runtime.images.pictures import Picture
    from moebius_runtime.pipeline import InpaintPipeline

    folder = Path(str(record.request.bundle))
    need("onnxruntime")
    runtime = "ort-cpu" if record.request.quick else "tensorrt"
    precision: Precision = "fp32" if record.request.quick else "fp16"
    if not record.request.quick:
        need("tensorrt", "cuda")
        with _watched(record):
            export_command(["trt", str(folder), f"--{precision}", "--backend", runtime], record.left - 60)
        record.check(f"{runtime}, {precision}", "engines built", passed=True)
    bundle = Bundle.open(folder)
    scene = seeded_scene(bundle.manifest, _QUICK_STEPS if record.request.quick else _STEPS, 1)
    picture = Picture(scene.picture, "RGB")
    threads = record.threads
    device = create_backend(bundle, runtime, precision=precision, threads=threads if runtime == "ort-cpu" else None)
    reference = create_backend(bundle, "ort-cpu", precision="fp32", threads=threads)
    for name, value in device.describe().items():
        record.fact(f"runs on: {name}", value)
    filled = partial(InpaintPipeline(device, memory="fast").inpaint, picture, scene.mask, scene.options)
    expected = InpaintPipeline(reference, memory="low").inpaint(picture, scene.mask, scene.options).picture.to_rgb()
    with _watched(record):
        got = filled().picture.to_rgb()
    subject = f"a picture, {runtime}, {precision}, preset {bundle.manifest.model.preset}"
    name = "PSNR in the masked region against ort-cpu, dB, equal pictures count as 100"
    held = record.at_least(subject, name, min(psnr(expected, got, scene.mask), 100.0), PICTURE_LIMITS[precision])
    record.fact("SSIM in the masked region against ort-cpu", f"{ssim(expected, got, scene.mask):.4f}")
    if not held:
        return  # times of a wrong result mean nothing
    variant = f"{runtime}, {precision}"
    most = 1 if record.request.quick else _ROUNDS
    times = interleaved({variant: filled}, lambda: None, seconds=record.left - 5, most=most, warm_up=False)
    record.timing(f"a whole picture, preset {bundle.manifest.model.preset}", variant, precision, times[variant])


@contextmanager
def _watched(record: Recorder) -> Iterator[None]:
    """Runs `tegrastats` meanwhile, where there is one, and records its first and last line."""
    if shutil.which("tegrastats") is None:
        yield
        return
    watcher = subprocess.Popen(
        ["tegrastats", "--interval", "1000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        yield
    finally:
        watcher.terminate()
        lines = watcher.communicate()[0].splitlines()
        if lines:
            peak = max(lines, key=_used)
            record.fact(f"tegrastats, most memory of {len(lines)} s", peak[:_LONGEST])


def _used(line: str) -> int:
    """MB of memory in a line of tegrastats: `RAM 855/7620MB ...`; 0 where it has none."""
    words = line.split("RAM ", 1)
    number = words[1].split("/", 1)[0] if len(words) == 2 else ""
    return int(number) if number.isdecimal() else 0
