"""Stages `torch-fp32`, `torch-bf16`, `torch-fp16`: the runtime `torch` in its fast variants over eager PyTorch.

A guided step and a whole picture, all variants next to each other in every round, with the chip's limits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from moebius_bench.hardware.network import Networks, build_networks, reduced
from moebius_bench.hardware.probe import strict_float32
from moebius_bench.hardware.recorder import Recorder, need
from moebius_bench.hardware.timing import TooSlowError, interleaved, synchronizer

if TYPE_CHECKING:
    from moebius.network.lambda_layers import LambdaForm
    from moebius_export.network.torch_runtime import TorchBackend
    from moebius_runtime.bundle.manifest import GraphName

BASELINE = "eager, unfused"

# A guided step's output against eager PyTorch in float32 on the CPU, relative L2. fp32: 3e-5 is the export's limit for
# the order of additions (moebius_export.onnx_export.parity); a GPU's convolutions may use Winograd's algorithm,
# which rounds more.
# fp16: twice the 6.3e-3 that everything in fp16 costs at full size (emulated); bf16 keeps 3 bits less, 8 times that.
# Seen with the small preset on a CPU: 2.9e-6, 8.4e-3 and 6.6e-2.
STEP_LIMITS = {"fp32": 1e-4, "fp16": 1.3e-2, "bf16": 1e-1}
# The masked region of a picture against the baseline's of the same precision, PSNR in dB. fp32 and fp16: the limits of
# moebius_export.verify.budgets. Two steps of the tiny preset gave 88, 57 and 41 dB; drift grows with the steps.
PICTURE_LIMITS = {"fp32": 60.0, "fp16": 38.0, "bf16": 25.0}
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_STAGE_GRAPHS: dict[str, GraphName] = {"step": "unet", "encode": "vae_encoder", "decode": "vae_decoder"}
_STEP_ROUNDS, _PICTURE_ROUNDS = 50, 10
_STEP_SHARE = 0.4  # of the time that is left once the variants are warm
_STEPS, _QUICK_STEPS = 20, 2


@dataclass(frozen=True)
class _Variant:
    name: str
    form: LambdaForm
    graphs: bool


def run(precision: str) -> Callable[[Recorder], None]:
    """The stage of one precision."""
    return partial(_run, precision)


def _run(precision: str, record: Recorder) -> None:
    need("torch", "safetensors", "huggingface_hub")
    import torch

    strict_float32(torch)
    torch.backends.cudnn.benchmark = record.request.device == "cuda"  # both sides get the fastest algorithms
    reduced(record, lambda name: _measure(record, name, precision))


def variants(record: Recorder) -> list[_Variant]:
    """The baseline and the fast variants that this machine can run; others are noted."""
    import torch

    from moebius.network.triton_lambda import unavailable

    found = [_Variant(BASELINE, "reference", graphs=False), _Variant("eager, fused λ", "fast", graphs=False)]
    if record.request.device == "cpu":
        record.note("CUDA graphs and the Triton kernel were left out: the device is a CPU")
        return found
    found.append(_Variant("CUDA graphs, fused λ", "fast", graphs=True))
    if problem := unavailable(torch.device(record.request.device)):
        record.note(f"the Triton kernel was left out: {problem}")
    else:
        found.append(_Variant("CUDA graphs, Triton", "triton", graphs=True))
    return found


def _measure(record: Recorder, preset_name: str, precision: str) -> None:
    from moebius_export.trajectories.scenes import seeded_inputs

    with_vae = _has_vae(record)
    networks = build_networks(preset_name, autoencoder=with_vae)
    inputs = seeded_inputs("unet", networks.bundle.manifest, 1)
    expected = _on_cpu(networks, inputs, record.threads)
    macs = _macs(networks)
    backends: dict[str, TorchBackend] = {}
    baseline_broken = False
    for variant in variants(record):
        backend = _backend(record, networks, variant, precision)
        try:
            got = backend.run("unet", inputs)
        except Exception as error:  # one variant that a driver refuses must not take the others' figures along
            if type(error).__name__ == "OutOfMemoryError":
                raise
            text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            record.check(f"{variant.name}, {precision}, preset {preset_name}", "runs", passed=False, detail=text)
            baseline_broken |= variant.name == BASELINE
            continue
        distance = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        subject = f"a guided step, {variant.name}, {precision}, preset {preset_name}"
        if record.at_most(subject, "relative error", distance, STEP_LIMITS[precision]) or variant.name == BASELINE:
            backends[variant.name] = backend
    if baseline_broken:
        return
    size = sum(parameter.numel() for parameter in networks.modules["unet"].parameters()) * _BYTES[precision]
    steps = {name: partial(backend.run, "unet", inputs) for name, backend in backends.items()}
    _time(
        record,
        f"a guided step, preset {preset_name}",
        precision,
        steps,
        record.left * (_STEP_SHARE if with_vae else 0.9),
        _STEP_ROUNDS,
        (size + sum(array.nbytes for array in inputs.values()) + expected.nbytes, macs["unet"]),
    )
    if with_vae:
        _pictures(record, networks, backends, precision, preset_name, macs)


def _has_vae(record: Recorder) -> bool:
    from importlib.util import find_spec

    if find_spec("diffusers") is None:
        record.note("whole pictures were left out: diffusers, which holds the autoencoder, is not installed")
        return False
    return True


def _on_cpu(networks: Networks, inputs: dict[str, np.ndarray], threads: int | None) -> np.ndarray:
    """The reference: unfused network in eager PyTorch, float32, on the CPU."""
    from moebius_export.network.torch_runtime import TorchBackend

    backend = TorchBackend(networks.bundle, threads=threads, device="cpu", modules=networks.modules)
    return backend.run("unet", inputs)


def _backend(record: Recorder, networks: Networks, variant: _Variant, precision: str) -> TorchBackend:
    from moebius_export.network.torch_runtime import TorchBackend

    return TorchBackend(
        networks.bundle,
        threads=record.threads,
        device=record.request.device,
        form=variant.form,
        modules=networks.copies(),
        precision=precision,  # type: ignore[arg-type]
        cuda_graphs=variant.graphs,
    )


def _macs(networks: Networks) -> dict[GraphName, int]:
    """MACs of one run of each fused graph."""
    import torch

    from moebius.network.lambda_layers import set_lambda_form
    from moebius_export.network.module_cost import module_macs
    from moebius_export.trajectories.scenes import seeded_inputs

    found: dict[GraphName, int] = {}
    for graph, module in networks.modules.items():
        set_lambda_form(module, "fast")
        inputs = seeded_inputs(graph, networks.bundle.manifest, 1)
        found[graph] = module_macs(module, [torch.from_numpy(array) for array in inputs.values()])["all"]
        set_lambda_form(module, "reference")
    return found


def _time(
    record: Recorder,
    subject: str,
    precision: str,
    work: dict[str, Any],
    seconds: float,
    most: int,
    cost: tuple[int, int] | None,
) -> None:
    """Times the variants in rounds and records seconds, shares of the bound and ratios to the baseline.

    Every variant must have run once: captures and autotuning are not to be timed.
    """
    import torch

    device = record.request.device
    rounds = 1 if record.request.quick else most
    times = interleaved(work, synchronizer(torch, device), seconds=seconds, most=rounds, warm_up=False)
    bound = None if cost is None else record.bound(*cost, precision)
    for name, values in times.items():
        record.timing(subject, name, precision, values, bound, _memory(torch, device, work[name]))
    for name in times:
        if name != BASELINE:
            record.speedup(subject, precision, BASELINE, name, (times[BASELINE], times[name]))


def _memory(torch: Any, device: str, work: Callable[[], object]) -> int | None:
    """The most device memory that PyTorch held during one more run; weights of all variants are part of it."""
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    work()
    return int(torch.cuda.max_memory_allocated())


def _pictures(
    record: Recorder,
    networks: Networks,
    backends: dict[str, TorchBackend],
    precision: str,
    preset_name: str,
    macs: dict[GraphName, int],
) -> None:
    from moebius_export.trajectories.scenes import seeded_scene
    from moebius_runtime.images.metrics import psnr
    from moebius_runtime.images.pictures import Picture
    from moebius_runtime.pipeline import InpaintPipeline

    scene = seeded_scene(networks.bundle.manifest, _QUICK_STEPS if record.request.quick else _STEPS, 1)
    pipelines = {name: InpaintPipeline(backend, memory="fast") for name, backend in backends.items()}
    picture = Picture(scene.picture, "RGB")
    subject = f"a whole picture, preset {preset_name}"
    results = {}
    for name, pipeline in pipelines.items():
        if record.left < 5:
            raise TooSlowError("there is no time for a picture of every variant")
        results[name] = pipeline.inpaint(picture, scene.mask, scene.options)
    reference = results[BASELINE].picture.to_rgb()
    for name, result in results.items():
        if name != BASELINE:
            found = psnr(reference, result.picture.to_rgb(), scene.mask)
            record.at_least(
                f"{subject}, {name}, {precision}",
                "PSNR in the masked region, dB, equal pictures count as 100",
                min(found, 100.0),
                PICTURE_LIMITS[precision],
            )
    runs = {stage: len(seconds) for stage, seconds in results[BASELINE].seconds.items()}
    record.fact(f"runs of a picture, {precision}", ", ".join(f"{stage} {count}" for stage, count in runs.items()))
    total = sum(runs.get(stage, 0) * macs[graph] for stage, graph in _STAGE_GRAPHS.items())
    moved = sum(
        runs.get(stage, 0) * _weight_bytes(networks, graph, precision) for stage, graph in _STAGE_GRAPHS.items()
    )
    work = {name: partial(pipeline.inpaint, picture, scene.mask, scene.options) for name, pipeline in pipelines.items()}
    # fp16 keeps the autoencoder in float32, so one rate for the whole picture would be wrong: no bound.
    cost = None if precision == "fp16" else (moved, total)
    _time(record, subject, precision, work, max(record.left - 3, 0), _PICTURE_ROUNDS, cost)


def _weight_bytes(networks: Networks, graph: GraphName, precision: str) -> int:
    return sum(p.numel() for p in networks.modules[graph].parameters()) * _BYTES[precision]
