"""The stages, in the order in which they run, and the profiles that choose among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType

from moebius_bench.hardware.recorder import Recorder


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        title: shown in the report.
        seconds: time limit.
        function: `module:function` in this package, imported by the process of the stage alone.
        least: seconds below which the stage is not started.
        variant: argument for the function that returns the one to run, such as a precision; None where it is that one.
    """

    title: str
    seconds: float
    function: str
    least: float = 5
    variant: str | None = None

    def load(self) -> Callable[[Recorder], None]:
        """Imports the function of the stage."""
        module, name = self.function.split(":")
        found = getattr(import_module(f"moebius_bench.hardware.{module}"), name)
        function: Callable[[Recorder], None] = found if self.variant is None else found(self.variant)
        return function


STAGES = MappingProxyType(
    {
        "doctor": Stage("moebius-export doctor", 30, "stages.doctor:run"),
        "limits": Stage("The chip's own rates", 30, "probe:run"),
        "torch-bf16": Stage("PyTorch, bf16: CUDA graphs over eager", 60, "stages.torch:run", 15, "bf16"),
        "torch-fp16": Stage("PyTorch, fp16: CUDA graphs over eager", 60, "stages.torch:run", 15, "fp16"),
        "torch-fp32": Stage("PyTorch, fp32: CUDA graphs over eager", 60, "stages.torch:run", 15, "fp32"),
        "triton": Stage("The Triton kernel against the reference", 75, "stages.layers:run_triton", 15),
        "layers": Stage("The λ layers against the reference", 60, "stages.layers:run_layers", 15),
        "training": Stage("A step of the distillation", 60, "stages.training:run", 15),
        "export": Stage("A bundle for the runtimes below", 60, "stages.engines:run_export", 20),
        "ort-cuda": Stage("ONNX Runtime with CUDA", 40, "stages.engines:run", 15, "ort-cuda"),
        "tensorrt": Stage("TensorRT", 90, "stages.engines:run", 20, "tensorrt"),
        "tensorrt-rtx": Stage("TensorRT-RTX", 90, "stages.engines:run", 20, "tensorrt-rtx"),
        "ort-webgpu": Stage("ONNX Runtime with WebGPU on Vulkan", 75, "stages.webgpu:run", 20),
        "modes": Stage("The modes best, balanced and fast", 75, "stages.bundles:run_modes", 20),
        "guidance-distilled": Stage(
            "A bundle with distilled guidance", 60, "stages.bundles:run_distilled", 20, "guidance-distilled"
        ),
        "lcm": Stage("A bundle for sampler lcm", 60, "stages.bundles:run_distilled", 20, "lcm"),
        "batch": Stage("Batch sizes", 60, "stages.bundles:run_batch", 20),
        "small-recipe": Stage("The small network's training recipe", 120, "stages.recipe:run", 40),
        "board": Stage("The board", 15, "stages.jetson:run_board"),
        "board-engines": Stage("TensorRT engines on the board", 1800, "stages.jetson:run_engines", 60),
    }
)
"""Name -> stage. A stage that ends early leaves its time to later ones; one without enough time left is not run."""

_JETSON = ("doctor", "board", "board-engines")

PROFILES = MappingProxyType(
    {"gpu": tuple(name for name in STAGES if name not in _JETSON[1:]), "jetson": _JETSON},
)
"""Profile -> the names of its stages. Those of `jetson` need no PyTorch, and a bundle that was exported elsewhere."""

BUDGETS = MappingProxyType({"gpu": 590.0, "jetson": 2700.0})
"""Profile -> seconds for all of its stages, unless `--budget` names others."""
