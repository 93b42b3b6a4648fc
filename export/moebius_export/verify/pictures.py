"""Compares whole pictures: the runtime's pipeline with the same noise, on PyTorch and on each candidate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from moebius_export.graph.sessions import ChangedBackend
from moebius_export.network.torch_runtime import TorchBackend
from moebius_export.trajectories.scenes import Scene
from moebius_export.verify.mixed_precision import emulated_sessions
from moebius_export.verify.reference import Reference
from moebius_export.verify.results import Check, Pictures, Trajectory, at_least, at_most, verdict
from moebius_runtime.backends.base import Array, Backend
from moebius_runtime.backends.ort import OrtBackend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.errors import MoebiusError
from moebius_runtime.images.blend import feather
from moebius_runtime.images.metrics import psnr, saturated_share, ssim
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline

OnStep = Callable[[int, int], None]


@dataclass
class _Latents:
    """Records the latents that a pipeline passes to the U-Net at each step, and at the end to the decoder."""

    seen: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def note(self, graph: GraphName, inputs: Mapping[str, Array], channels: int) -> None:
        if graph in ("unet", "unet_conditional"):
            self.seen.append(inputs["sample"][:, :channels].copy())  # [B, 2c + 1, s, s] -> [B, c, s, s]
        elif graph == "vae_decoder":
            self.seen.append(inputs["latent"].copy())


class _WatchedTorch(TorchBackend):
    latents: _Latents

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> Array:
        self.latents.note(graph, inputs, self.bundle.manifest.geometry.latent_channels)
        return super().run(graph, inputs)


class _WatchedOrt(OrtBackend):
    latents: _Latents

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> Array:
        self.latents.note(graph, inputs, self.bundle.manifest.geometry.latent_channels)
        return super().run(graph, inputs)


@dataclass(frozen=True)
class Filled:
    """The result of one backend: the picture uint8 [S, S, 3], or None if the pipeline raised `refusal`."""

    picture: npt.NDArray[np.uint8] | None
    latents: list[npt.NDArray[np.float32]]
    refusal: str = ""


def fill_with_torch(bundle: Bundle, reference: Reference, scene: Scene, on_step: OnStep) -> Filled:
    """Inpaints the scene with PyTorch."""
    backend = _WatchedTorch(bundle, modules=reference.modules, device="cpu")
    backend.latents = _Latents()
    return _fill(backend, backend.latents, scene, on_step)


def fill_with_ort(bundle: Bundle, scene: Scene, on_step: OnStep) -> Filled:
    """Inpaints the scene with ONNX Runtime on the CPU."""
    backend = _WatchedOrt(bundle)
    backend.latents = _Latents()
    return _fill(backend, backend.latents, scene, on_step)


def fill_emulated(bundle: Bundle, precision: Precision, scene: Scene, on_step: OnStep) -> Filled:
    """Inpaints the scene with the mixed-precision files of a precision, emulated on the CPU."""
    latents, channels = _Latents(), bundle.manifest.geometry.latent_channels

    def watch(graph: GraphName, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        latents.note(graph, inputs, channels)

    return _fill(ChangedBackend(bundle, emulated_sessions(bundle, precision), watch), latents, scene, on_step)


def _fill(backend: Backend, latents: _Latents, scene: Scene, on_step: OnStep) -> Filled:
    backend.self_check = False  # a wrong file is to be run here, and its fault reported
    try:
        pipeline = InpaintPipeline(backend)
        result = pipeline.inpaint(Picture(scene.picture, "RGB"), scene.mask, scene.options, on_step)
    except MoebiusError as error:
        return Filled(None, latents.seen, str(error))
    finally:
        backend.release()
    return Filled(result.picture.to_rgb(), latents.seen)


def trajectory_checks(
    subject: str, timesteps: list[int], reference: Filled, candidate: Filled, budget: float
) -> tuple[list[Check], Trajectory]:
    """Measures the latent drift step by step, and checks it against the budget."""
    drift = []
    for ours, theirs in zip(candidate.latents, reference.latents, strict=False):
        norm = float(np.linalg.norm(theirs))
        drift.append(float(np.linalg.norm(ours.astype(np.float64) - theirs)) / norm)
    trajectory = Trajectory(subject, timesteps, drift)
    name = f"drift over {len(timesteps)} steps"
    if len(reference.latents) != len(timesteps) + 1:
        reason = f"PyTorch gave no trajectory: {reference.refusal}"
        return [Check("trajectory", subject, name, "not run", None, budget, reason)], trajectory
    if len(drift) != len(timesteps) + 1:
        last = f"stopped after {max(0, len(drift) - 1)} of {len(timesteps)} steps"
        detail = f"{last}: {candidate.refusal}"
        return [Check("trajectory", subject, name, "fail", None, budget, detail)], trajectory
    worst = int(np.argmax(drift))
    where = "at the start" if worst == 0 else f"largest after step {worst} (timestep {timesteps[worst - 1]})"
    return [at_most("trajectory", subject, name, drift[worst], budget, where)], trajectory


def picture_checks(
    subject: str, scene: Scene, reference: Filled, candidate: Filled, budgets: Mapping[str, float]
) -> tuple[list[Check], Pictures | None]:
    """Checks similarity in the masked region, exact pixels outside the feathered seam, and signs of broken pictures."""
    theirs, ours = reference.picture, candidate.picture
    if theirs is None:
        reason = f"PyTorch gave no picture: {reference.refusal}"
        return [Check("picture", subject, "picture", "not run", detail=reason)], None
    shown = Pictures(subject, scene.picture, scene.mask, theirs, ours)
    if ours is None:
        return [verdict("picture", subject, "picture", candidate.refusal)], shown
    inside, outside = scene.mask, feather(scene.mask) == 0
    changed = int((ours[outside] != scene.picture[outside]).any(axis=1).sum())
    torch_changed = int((theirs[outside] != scene.picture[outside]).any(axis=1).sum())
    levels = np.abs(ours.astype(int) - theirs).max(axis=2)
    place = [int(index) for index in np.unravel_index(int(levels.argmax()), levels.shape)]
    detail = f"{float((levels[inside] > 0).mean()):.2%} of the pixels differ, at most by {levels.max()} at {place}"
    flat = "all pixels of the masked region have one colour" if float(np.ptp(ours[inside])) == 0 else None
    share, theirs_share = saturated_share(ours, inside), saturated_share(theirs, inside)
    moved = f"{changed} pixels outside the seam differ from the picture ({torch_changed} with PyTorch)"
    checks = [
        at_least("picture", subject, "PSNR in the mask", psnr(theirs, ours, inside), budgets["psnr"], detail),
        at_least("picture", subject, "SSIM in the mask", ssim(theirs, ours, inside), budgets["ssim"]),
        verdict("picture", subject, "exact outside the seam", moved if changed or torch_changed else None),
        verdict("picture", subject, "not constant", flat),
        at_most(
            "picture",
            subject,
            "saturation",
            share - theirs_share,
            budgets["saturated"],
            f"{share:.2%} of the values in the mask are 0 or 255, PyTorch {theirs_share:.2%}",
        ),
        _lpips_check(subject, theirs, ours, budgets["lpips"]),
    ]
    return checks, shown


def _lpips_check(subject: str, first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8], budget: float) -> Check:
    """LPIPS (Zhang et al. 2018) of the whole pictures with AlexNet, if package and weights are on this machine."""
    name = "LPIPS"
    try:
        lpips = import_module("lpips")
    except ImportError:
        return Check("picture", subject, name, "note", detail="not computed: the package lpips is not installed")
    weights = Path(torch.hub.get_dir()) / "checkpoints"
    if not list(weights.glob("alexnet-*.pth")):
        words = f"not computed: {weights} holds no AlexNet weights, and verify downloads nothing"
        return Check("picture", subject, name, "note", detail=words)
    tensors = [torch.from_numpy(one / np.float32(127.5) - 1).permute(2, 0, 1)[None] for one in (first, second)]
    with torch.inference_mode():  # [S, S, 3] -> [1, 3, S, S] in [-1, 1]
        distance = float(lpips.LPIPS(net="alex", verbose=False).eval()(*tensors))
    return at_most("picture", subject, name, distance if math.isfinite(distance) else math.nan, budget)
