"""Stage `limits`: what the chip reaches by itself, measured: square matrix products and copies within its memory.

Every bound of the report is held against these and against no table of a vendor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from moebius_bench.hardware.recorder import Recorder, need
from moebius_bench.hardware.timing import synchronizer
from moebius_bench.stats import summary

_RUNS = 9
_SIZES = {"cuda": 8192, "cpu": 512}  # side of the square matrices
_COPIED = {"cuda": 1 << 30, "cpu": 1 << 25}  # bytes: far above the 60 MB of L2 of the largest chips
_LEAST = 20e-3  # seconds of a timed batch of runs: short ones would time the launch


def run(record: Recorder) -> None:
    """Rates of matrix products in each precision and of copies, medians of 9 batches."""
    need("torch")
    import torch

    limit_threads(record, torch)
    strict_float32(torch)
    device = record.request.device
    wait = synchronizer(torch, device)
    size, copied = _SIZES[device], _COPIED[device]
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        copied = min(copied, free // 8)
        while 6 * 4 * size * size > free and size > 1024:
            size //= 2
        record.fact("device memory", f"{torch.cuda.mem_get_info()[1] / 1e9:.1f} GB, {free / 1e9:.1f} GB free")
        properties = torch.cuda.get_device_properties(0)
        record.fact("device", f"{properties.name}, SM {properties.major}.{properties.minor}")
        record.fact("multiprocessors", str(properties.multi_processor_count))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        # Random values: zeros are multiplied faster, since they take less power.
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        rates = [size**3 / seconds for seconds in _batches(partial(torch.mm, a, b, out=out), wait)]
        record.rate("matmul", precision, size, summary(rates))
        del a, b, out
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    rates = [2 * 4 * source.numel() / seconds for seconds in _batches(lambda: target.copy_(source), wait)]
    record.rate("copy", "fp32", 4 * source.numel(), summary(rates))


def limit_threads(record: Recorder, torch: Any) -> None:
    """Sets the threads of PyTorch on the CPU to those of the recorder."""
    if record.threads is not None:
        torch.set_num_threads(record.threads)


def strict_float32(torch: Any) -> None:
    """Switches TF32 off for this process: float32 products round to float32, in convolutions too."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _batches(work: Callable[[], object], wait: Callable[[], None]) -> list[float]:
    """Seconds of one run, from batches of runs that are long enough to time."""
    work()
    wait()
    started = time.perf_counter()
    work()
    wait()
    repeats = max(1, round(_LEAST / max(time.perf_counter() - started, 1e-9)))
    repeats = min(repeats, 1000)
    found = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        wait()
        found.append((time.perf_counter() - started) / repeats)
    return found
