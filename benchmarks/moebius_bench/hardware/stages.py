"""The stages, in the order in which they run, and the profiles that choose among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from moebius_bench.hardware.recorder import Recorder


@dataclass(frozen=True)
class Stage:
    """A stage: its title, the seconds that it may take at most, and what finds its function.

    `least`: seconds below which it is not begun. `run` imports what the stage needs, so that only its own process does.
    """

    title: str
    seconds: float
    run: Callable[[], Callable[[Recorder], None]]
    least: float = 5


def _doctor() -> Callable[[Recorder], None]:
    from moebius_bench.hardware.stage_doctor import run

    return run


def _limits() -> Callable[[Recorder], None]:
    from moebius_bench.hardware.probe import run

    return run


def _triton() -> Callable[[Recorder], None]:
    from moebius_bench.hardware.stage_layers import run_triton

    return run_triton


def _layers() -> Callable[[Recorder], None]:
    from moebius_bench.hardware.stage_layers import run_layers

    return run_layers


def _torch(precision: str) -> Callable[[], Callable[[Recorder], None]]:
    def find() -> Callable[[Recorder], None]:
        from moebius_bench.hardware.stage_torch import run

        return run(precision)

    return find


def _training() -> Callable[[Recorder], None]:
    from moebius_bench.hardware.stage_training import run

    return run


def _export() -> Callable[[Recorder], None]:
    from moebius_bench.hardware.stage_engines import run_export

    return run_export


def _engines(runtime: str) -> Callable[[], Callable[[Recorder], None]]:
    def find() -> Callable[[Recorder], None]:
        from moebius_bench.hardware.stage_engines import run

        return run(runtime)

    return find


STAGES = MappingProxyType(
    {
        "doctor": Stage("moebius-export doctor", 30, _doctor),
        "limits": Stage("The chip's own rates", 30, _limits),
        "torch-bf16": Stage("PyTorch, bf16: CUDA graphs over eager", 60, _torch("bf16"), 15),
        "torch-fp16": Stage("PyTorch, fp16: CUDA graphs over eager", 60, _torch("fp16"), 15),
        "torch-fp32": Stage("PyTorch, fp32: CUDA graphs over eager", 60, _torch("fp32"), 15),
        "triton": Stage("The Triton kernel against the reference", 75, _triton, 15),
        "layers": Stage("The λ layers against the reference", 60, _layers, 15),
        "training": Stage("A step of the distillation", 60, _training, 15),
        "export": Stage("A bundle for the runtimes below", 60, _export, 20),
        "ort-cuda": Stage("ONNX Runtime with CUDA", 40, _engines("ort-cuda"), 15),
        "tensorrt": Stage("TensorRT", 90, _engines("tensorrt"), 20),
        "tensorrt-rtx": Stage("TensorRT-RTX", 90, _engines("tensorrt-rtx"), 20),
    }
)
"""Name -> stage. A stage that ends early leaves its time to those behind it; one that comes too late is not run."""

PROFILES = MappingProxyType({"gpu": tuple(STAGES)})
"""Profile -> the names of its stages. A profile of another kind of machine, such as a Jetson, goes here."""
