"""Stages `modes`, `guidance-distilled`, `lcm`, `batch`: exported bundles, filled on this machine's device.

On a GPU the graphs run by ONNX Runtime's CUDA provider where it is installed, else by the runtime `torch` with CUDA
graphs; in a dry run by ONNX Runtime on the CPU. The reference is unfused PyTorch, in float32 on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moebius_bench.hardware.network import WEIGHTS
from moebius_bench.hardware.recorder import NotRunError, Recorder, need
from moebius_bench.hardware.stages.engines import GRAPH_LIMITS, available, export_command, exported_preset
from moebius_bench.hardware.stages.torch import PICTURE_LIMITS
from moebius_bench.hardware.timing import interleaved

if TYPE_CHECKING:
    from moebius_runtime.backends.base import Backend
    from moebius_runtime.bundle.bundle import Bundle
    from moebius_runtime.pipeline import InpaintPipeline
    from moebius_runtime.settings.modes import ModeName

_MODES: tuple[ModeName, ...] = ("best", "balanced", "fast")
_BATCHES, _QUICK_BATCHES = (2, 4, 8), (2,)
_ROUNDS = 10
_SCALE, _LCM_STEPS = 2.5, 4
_PSNR = "PSNR in the masked region against PyTorch on the CPU, dB, equal pictures count as 100"


def run_modes(record: Recorder) -> None:
    """A picture in each of the modes `best`, `balanced` and `fast`, each against the reference in the same mode."""
    bundle, (device, reference) = _exported(record, "modes", [])
    options: dict[ModeName, dict[str, object]] = {mode: {"mode": mode} for mode in _MODES}
    if record.request.quick:
        options["best"]["steps"] = options["balanced"]["steps"] = 2
    works: dict[str, Callable[[], object]] = {}
    for mode, chosen in options.items():
        work = partial(_fill, device, bundle, chosen)
        _compare(record, f"mode {mode}", work(), _fill(reference, bundle, chosen), bundle)
        works[f"mode {mode}"] = work
    _time(record, f"a picture in each mode, {_where(device)}", works)


def run_distilled(kind: str) -> Callable[[Recorder], None]:
    """The stage of one kind of distilled bundle: `guidance-distilled`, or `lcm`, which also takes few steps."""
    return partial(_run_distilled, kind)


def _run_distilled(kind: str, record: Recorder) -> None:
    bundle, (device, reference) = _exported(record, kind, ["--weights", str(_checkpoint(record, kind))])
    manifest = bundle.manifest
    held = manifest.guidance is not None and manifest.guidance.distilled == _SCALE
    held &= (
        manifest.defaults.sampler == ("lcm" if kind == "lcm" else "ddim") and "unet_conditional" not in manifest.graphs
    )
    record.check(kind, "the bundle records what was distilled, and has one graph of the U-Net", held)
    chosen: dict[str, object] = {"mode": "best", "sampler": manifest.defaults.sampler}
    if record.request.quick and kind != "lcm":
        chosen["steps"] = 2
    work = partial(_fill, device, bundle, chosen)
    _compare(record, kind, work(), _fill(reference, bundle, chosen), bundle)
    _time(record, f"a picture of a bundle with {kind}, {_where(device)}", {kind: work})


def _checkpoint(record: Recorder, kind: str) -> Path:
    """Random test weights that are recorded as distilled, as `moebius-distill` writes them."""
    from safetensors.torch import save_file

    from moebius import preset
    from moebius.weights.load import load_student

    sizes = preset(exported_preset(record))
    folder = Path(record.request.folder) / f"weights-{kind}"
    folder.mkdir(exist_ok=True)
    student, _ = load_student(WEIGHTS, sizes.student)
    save_file({name: value.contiguous() for name, value in student.state_dict().items()}, folder / "model.safetensors")
    config: dict[str, object] = {"prediction_type": sizes.prediction_type, "guidance": {"distilled": _SCALE}}
    if kind == "lcm":
        config |= {"sampler": "lcm", "num_inference_steps": _LCM_STEPS}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def run_batch(record: Recorder) -> None:
    """Batches of guided steps: each picture of a batch against the same one alone, and the time per picture."""
    from moebius_export.trajectories.scenes import seeded_inputs

    bundle, (device, _) = _exported(record, "batch", ["--dynamic-batch"])
    manifest = bundle.manifest
    for size in _QUICK_BATCHES if record.request.quick else _BATCHES:
        shared = seeded_inputs("unet", manifest, 1)  # a batch has one timestep and one scale
        samples = [seeded_inputs("unet", manifest, seed)["sample"] for seed in range(1, size + 1)]
        alone = [{**shared, "sample": sample} for sample in samples]
        whole = {**shared, "sample": np.concatenate(samples)}  # [size, 9, s, s]
        expected = np.concatenate([device.run("unet", inputs) for inputs in alone])  # [size, 4, s, s]
        errors = [
            float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for a, b in zip(device.run("unet", whole), expected, strict=True)
        ]
        subject = f"a guided step, batch {size}, {_where(device)}"
        if not record.at_most(subject, "largest error of a picture against alone", max(errors), GRAPH_LIMITS["fp32"]):
            return  # times of a wrong result mean nothing
        one, all_ = f"{size} pictures one by one", f"a batch of {size}"
        work: dict[str, Callable[[], object]] = {
            one: partial(_each, device, alone),
            all_: partial(device.run, "unet", whole),
        }
        times = _time(record, subject, work)
        record.speedup(subject, "fp32", one, all_, (times[one], times[all_]))


def _each(device: Backend, alone: list[dict[str, np.ndarray]]) -> None:
    for inputs in alone:
        device.run("unet", inputs)


def _exported(record: Recorder, name: str, more: list[str]) -> tuple[Bundle, tuple[Backend, Backend]]:
    """A new bundle of random test weights; the backend of the device, and the reference."""
    from moebius_export.network.torch_runtime import TorchBackend
    from moebius_runtime.backends import create_backend
    from moebius_runtime.bundle.bundle import Bundle

    if record.request.bundle is not None:
        record.note("made of an export of its own, not of --bundle")
    need("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "onnxruntime", "polygraphy", "ml_dtypes")
    preset = exported_preset(record)
    if preset != record.request.preset:
        record.note(f"reduced from preset {record.request.preset} to {preset}: a full-size export takes minutes")
    out = Path(record.request.folder) / f"bundle-{name}"
    weights = [] if "--weights" in more else ["--weights", WEIGHTS]
    export_command(["onnx", *weights, "--vae", WEIGHTS, "--preset", preset, *more, "--out", str(out)], record.left - 10)
    bundle = Bundle.open(out)
    if record.left < 10:
        raise NotRunError("the export left no time for pictures")
    reference = TorchBackend(bundle, threads=record.threads, device="cpu")
    if record.request.device == "cpu":
        return bundle, (create_backend(bundle, "ort-cpu", threads=record.threads), reference)
    if reason := available("ort-cuda"):
        record.note(f"run by PyTorch: {reason}")
        return bundle, (TorchBackend(bundle, threads=record.threads, device="cuda", form="fast"), reference)
    return bundle, (create_backend(bundle, "ort-cuda"), reference)


def _fill(backend: Backend, bundle: Bundle, chosen: dict[str, object]) -> np.ndarray:
    """A seeded scene filled with these options: uint8 [S, S, 3]."""
    from moebius_export.trajectories.scenes import seeded_scene
    from moebius_runtime.images.pictures import Picture
    from moebius_runtime.settings.options import InpaintOptions

    scene = seeded_scene(bundle.manifest, 1, 1)
    options = InpaintOptions(noise=scene.options.noise, **chosen)  # type: ignore[arg-type]
    found = _pipeline(backend).inpaint(Picture(scene.picture, "RGB"), scene.mask, options)
    filled: np.ndarray = found.picture.to_rgb()
    return filled


def _pipeline(backend: Backend) -> InpaintPipeline:
    from moebius_runtime.pipeline import InpaintPipeline

    return InpaintPipeline(backend, memory="fast")


def _compare(record: Recorder, subject: str, got: np.ndarray, expected: np.ndarray, bundle: Bundle) -> None:
    from moebius_export.trajectories.scenes import seeded_scene
    from moebius_runtime.images.metrics import psnr

    found = psnr(expected, got, seeded_scene(bundle.manifest, 1, 1).mask)
    record.at_least(f"a picture, {subject}", _PSNR, min(found, 100.0), PICTURE_LIMITS["fp32"])


def _time(record: Recorder, subject: str, work: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Times the variants in rounds; each must have run once. A run ends with its result on the host."""
    most = 1 if record.request.quick else _ROUNDS
    seconds = max(record.left - 5, 0) / (1 if len(work) > 2 else 3)
    times = interleaved(work, lambda: None, seconds=seconds, most=most, warm_up=not record.request.quick)
    for label, values in times.items():
        record.timing(subject, label, "fp32", values)
    return times


def _where(backend: Backend) -> str:
    return f"{backend.name}, preset {backend.bundle.manifest.model.preset}"
