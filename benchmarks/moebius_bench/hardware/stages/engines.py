"""Stages `export`, `ort-cuda`, `tensorrt`, `tensorrt-rtx`: files and engines built, verified and timed.

The network's files do not travel to the machine: `export` makes a bundle there, of the small preset, since a full-size
export takes minutes. With `--bundle` an existing one is used in its place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moebius_bench.hardware.recorder import NotInstalledError, NotRunError, Recorder, need
from moebius_bench.hardware.stages.torch import BASELINE, PICTURE_LIMITS
from moebius_bench.hardware.timing import TooSlowError, interleaved

if TYPE_CHECKING:
    from moebius_runtime.bundle.bundle import Bundle
    from moebius_runtime.bundle.manifest import GraphName, Precision

# Modules of each runtime; a library for the CPU answers to onnxruntime too, so its providers are looked at as well.
MODULES = {
    "ort-cuda": ("onnxruntime",),
    "tensorrt": ("tensorrt", "cuda"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda"),
}
PLUGIN_SWITCH = "MOEBIUS_TRT_PLUGIN"
_FOLDER = "bundle"
_GRAPHS: tuple[GraphName, ...] = ("unet", "vae_encoder", "vae_decoder")
# A graph's output against PyTorch in float32, relative L2. fp32: TF32 is off in our engines, and other kernels add in
# another order; fp16 and bf16: the limits of moebius_export.verify.budgets.
GRAPH_LIMITS = {"fp32": 1e-4, "fp16": 8e-3, "bf16": 6e-2}
_ROUNDS = 10
_STEPS, _QUICK_STEPS = 20, 2

Build = Callable[["Path", str, str, bool], None]
"""Builds engines of (bundle, runtime, precision, plugins)."""


def available(runtime: str) -> str | None:
    """Why the runtime's library is not installed; None where it is."""
    from importlib.util import find_spec

    missing = [name for name in MODULES[runtime] if find_spec(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    if runtime == "ort-cuda":
        from moebius_runtime.backends.ort import import_onnxruntime

        providers = import_onnxruntime().get_available_providers()
        if "CUDAExecutionProvider" not in providers:
            return f"onnxruntime-gpu not installed: this ONNX Runtime has {', '.join(providers)}"
    return None


def run_export(record: Recorder) -> None:
    """Exports a bundle for the runtimes that are installed."""
    if record.request.bundle is not None:
        raise NotRunError(f"{record.request.bundle} is used in place of an export")
    _need_gpu(record)
    reasons = {name: available(name) for name in MODULES}
    if all(reasons.values()):
        raise NotRunError(f"no runtime needs a bundle: {'; '.join(reason for reason in reasons.values() if reason)}")
    need("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "onnxruntime", "polygraphy", "ml_dtypes")
    preset = exported_preset(record)
    if preset != record.request.preset:
        record.note(f"reduced from preset {record.request.preset} to {preset}: a full-size export takes minutes")
    from moebius_bench.hardware.network import WEIGHTS

    out = Path(record.request.folder) / _FOLDER
    options = ["--weights", WEIGHTS, "--vae", WEIGHTS, "--preset", preset, "--target", "tensorrt"]
    export_command(["onnx", *options, "--out", str(out)], record.left - 3)
    record.check(f"bundle, preset {preset}", "exported, every file agrees with PyTorch", passed=True)


def exported_preset(record: Recorder) -> str:
    """The preset of an exported bundle: a full-size export takes minutes."""
    return "tiny" if record.request.preset == "tiny" else "small"


def export_command(arguments: list[str], seconds: float, environment: Mapping[str, str] | None = None) -> None:
    """Runs `moebius-export` in a process of its own.

    Raises:
        RuntimeUnavailableError: it failed, with its last lines, or took too long.
    """
    from moebius_runtime.errors import RuntimeUnavailableError

    command = [sys.executable, "-m", "moebius_export.commands.app", *arguments]
    shown = f"moebius-export {' '.join(arguments[:1])}"
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=max(seconds, 1),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeUnavailableError(f"{shown} took longer than {seconds:.0f} s and was ended") from error
    if done.returncode:
        last = " ".join((done.stderr or done.stdout).split())[-600:]
        raise RuntimeUnavailableError(f"{shown} ended with exit code {done.returncode}: {last}")


def run(runtime: str) -> Callable[[Recorder], None]:
    """The stage of one runtime."""
    return partial(_run, runtime)


def _run(runtime: str, record: Recorder) -> None:
    need(*MODULES[runtime])
    if reason := available(runtime):
        raise NotInstalledError(reason)
    _need_gpu(record)
    need("torch", "diffusers")
    measure(record, runtime, bundle_of(record), partial(build_engines, record))


def _need_gpu(record: Recorder) -> None:
    if record.request.device != "cuda":
        raise NotRunError("there is no NVIDIA GPU that PyTorch sees")


def bundle_of(record: Recorder) -> Path:
    """The bundle that was named, or a copy of the exported one in which this stage may write.

    Raises:
        NotRunError: there is none, as the export did not come to an end.
    """
    if record.request.bundle is not None:
        return Path(record.request.bundle)
    exported = Path(record.request.folder) / _FOLDER
    if not (exported / "manifest.json").is_file():
        raise NotRunError("there is no bundle: the stage export did not make one")
    return Path(shutil.copytree(exported, Path(record.request.folder) / f"bundle-{record.request.stage}"))


def build_engines(record: Recorder, bundle: Path, runtime: str, precision: str, plugins: bool) -> None:
    """Runs `moebius-export trt`, which makes FP16 models first where they are missing."""
    environment = {PLUGIN_SWITCH: "1" if plugins else "0"}
    export_command(["trt", str(bundle), f"--{precision}", "--backend", runtime], record.left - 5, environment)


def measure(record: Recorder, runtime: str, bundle: Path, build: Build) -> None:
    """Each precision of a runtime, and for TensorRT the plugin off and on: built, verified, timed.

    One that fails is a failed check, and the next is tried.
    """
    cases: list[tuple[Precision, bool]] = [("fp32", False)]
    if runtime.startswith("tensorrt"):
        cases.append(("fp16", False))
    if runtime == "tensorrt":
        cases.insert(1, ("fp32", True))
        record.note("the plugin was built in fp32 only: in fp16 it needs models of `precision --keep LocalLambda`")
    elif runtime == "tensorrt-rtx":
        record.note("the plugin was left out: TensorRT-RTX has no such plugins")
    for number, (precision, plugins) in enumerate(cases):
        variant = f"{runtime}, plugin {'on' if plugins else 'off'}" if runtime == "tensorrt" else runtime
        try:
            if runtime.startswith("tensorrt"):
                build(bundle, runtime, precision, plugins)
                record.check(f"{variant}, {precision}", "engines built", passed=True)
            verify_and_time(record, runtime, variant, bundle, precision, record.left / (len(cases) - number))
        except TooSlowError as error:
            record.note(f"{variant}, {precision}: not timed, {error}")
        except Exception as error:  # of a driver or a library; the report must hold it, and the others go on
            text = " ".join(f"{type(error).__name__}: {error}".split())[:600]
            record.check(f"{variant}, {precision}", "runs", passed=False, detail=text)


def verify_and_time(
    record: Recorder, runtime: str, variant: str, folder: Path, precision: Precision, seconds: float
) -> None:
    """Compares graphs and a picture of a runtime with PyTorch on the CPU; where they hold, times both on the device."""
    from moebius_export.network.torch_runtime import TorchBackend
    from moebius_export.trajectories.scenes import seeded_inputs, seeded_scene
    from moebius_runtime.backends import create_backend
    from moebius_runtime.bundle.bundle import Bundle
    from moebius_runtime.images.metrics import psnr
    from moebius_runtime.images.pictures import Picture
    from moebius_runtime.pipeline import InpaintPipeline

    bundle = Bundle.open(folder)
    preset = bundle.manifest.model.preset
    backend = create_backend(bundle, runtime, precision=precision)
    reference = TorchBackend(bundle, threads=record.threads, device="cpu")
    held = True
    for graph in _GRAPHS:
        limit = GRAPH_LIMITS[_precision_of(bundle, graph, precision)]
        for seed in (1, 2):  # the second run of a graph is replayed
            inputs = seeded_inputs(graph, bundle.manifest, seed)
            expected, got = reference.run(graph, inputs), backend.run(graph, inputs)
            error = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
            subject = f"{graph}, {variant}, {precision}, preset {preset}, seed {seed}"
            held &= record.at_most(subject, "relative error", error, limit)
    if not held:
        return  # times of a wrong result mean nothing
    scene = seeded_scene(bundle.manifest, _QUICK_STEPS if record.request.quick else _STEPS, 1)
    slow = TorchBackend(
        bundle, threads=record.threads, device=record.request.device, cuda_graphs=False, precision=precision
    )
    pipelines = {
        BASELINE: InpaintPipeline(slow, memory="fast"),
        variant: InpaintPipeline(backend, memory="fast"),
    }
    picture = Picture(scene.picture, "RGB")
    first, second = (
        pipeline.inpaint(picture, scene.mask, scene.options).picture.to_rgb() for pipeline in pipelines.values()
    )
    found = min(psnr(first, second, scene.mask), 100.0)
    subject = f"a whole picture, preset {preset}"
    name = "PSNR in the masked region, dB, equal pictures count as 100"
    record.at_least(f"{subject}, {variant}, {precision}", name, found, PICTURE_LIMITS[precision])
    guided = seeded_inputs("unet", bundle.manifest, 1)
    most = 1 if record.request.quick else _ROUNDS
    works: dict[str, dict[str, Callable[[], object]]] = {
        f"a guided step, preset {preset}": {
            label: partial(pipeline.backend.run, "unet", guided) for label, pipeline in pipelines.items()
        },
        subject: {
            label: partial(pipeline.inpaint, picture, scene.mask, scene.options)
            for label, pipeline in pipelines.items()
        },
    }
    for what, work in works.items():
        # Each run ends with its result on the host, so there is nothing to wait for.
        times = interleaved(work, lambda: None, seconds=seconds / 3, most=most, warm_up=False)
        for label, values in times.items():
            record.timing(what, label, precision, values)
        record.speedup(what, precision, BASELINE, variant, (times[BASELINE], times[variant]))


def _precision_of(bundle: Bundle, graph: GraphName, precision: Precision) -> str:
    """The autoencoder often has float32 files alone, and keeps float32's limit only where these run."""
    return precision if precision in bundle.graph(graph).files else "fp32"
