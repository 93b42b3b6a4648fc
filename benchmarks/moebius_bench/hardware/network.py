"""The networks of the stages, with random test weights, and a manifest without files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moebius_bench.hardware.recorder import NotRunError, Recorder
from moebius_bench.hardware.timing import TooSlowError
from moebius_export.network.declared import geometry_of, schedule_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import (
    Defaults,
    GraphInfo,
    GraphName,
    Manifest,
    ModelInfo,
    TensorInfo,
    WeightsInfo,
)

if TYPE_CHECKING:
    from moebius.network.config import Preset

SMALLER = {"full": "small", "small": "tiny"}
WEIGHTS = "stand-in:0"
_NONE = "0" * 64


@dataclass(frozen=True)
class Networks:
    """The graphs' modules in float32 on the CPU, in eval mode, and a bundle that states their sizes.

    Without an autoencoder (diffusers is not installed) its graphs are missing from `modules`.
    """

    sizes: Preset
    bundle: Bundle
    modules: dict[GraphName, Any]

    def copies(self) -> dict[GraphName, Any]:
        """Copies of the modules; graphs of one network still share it."""
        return copy.deepcopy(self.modules)


def reduced(record: Recorder, work: Callable[[str], None]) -> None:
    """Runs `work` with the requested preset, or with a smaller one where memory or time is short.

    Every reduction is noted. `work` starts again; the results of the larger network stay in the report under its name.

    Raises:
        NotRunError: not even the smallest fits.
    """
    import torch

    name = record.request.preset
    while True:
        try:
            return work(name)
        except torch.OutOfMemoryError:
            problem = "it does not fit into the device's memory"
        except TooSlowError as error:
            problem = str(error)
        if name not in SMALLER:
            raise NotRunError(f"preset {name}: {problem}, and there is no smaller one")
        record.note(f"reduced from preset {name} to {SMALLER[name]}: {problem}")
        name = SMALLER[name]
        if record.request.device == "cuda":
            torch.cuda.empty_cache()


def build_networks(preset_name: str, *, autoencoder: bool) -> Networks:
    """Student and, if asked, autoencoder of a preset with random test weights."""
    from moebius import preset
    from moebius.weights.load import load_student, load_vae
    from moebius_export.network.torch_runtime import unet_modules, vae_modules

    sizes = preset(preset_name)
    student, checkpoint = load_student(WEIGHTS, sizes.student)
    modules = unet_modules(student)
    if autoencoder:
        modules |= vae_modules(load_vae(WEIGHTS, sizes.vae)[0])
    parameters = sum(parameter.numel() for parameter in student.parameters())
    bundle = manifest_only(preset_name, sizes, parameters, checkpoint.sha256)
    named = {graph: module for graph, module in modules.items() if graph in bundle.manifest.graphs}
    return Networks(sizes, bundle, named)


def manifest_only(preset_name: str, sizes: Preset, parameters: int, sha256: str) -> Bundle:
    """A bundle without files, for `TorchBackend`, which reads only the manifest."""
    side, channels, down = sizes.student.sample_size, sizes.vae.latent_channels, sizes.vae.downscale
    latent, image = [1, channels, side, side], [1, 3, side * down, side * down]
    sample = TensorInfo(name="sample", dtype="float32", shape=[1, sizes.student.in_channels, side, side])
    timestep = TensorInfo(name="timestep", dtype="int64", shape=[1])
    guidance = TensorInfo(name="guidance_scale", dtype="float32", shape=[1])
    noise = TensorInfo(name="noise_pred", dtype="float32", shape=list(latent))
    small = TensorInfo(name="latent", dtype="float32", shape=list(latent))
    large = TensorInfo(name="image", dtype="float32", shape=list(image))
    graphs: dict[GraphName, GraphInfo] = {
        "unet": _graph([sample, timestep, guidance], noise),
        "unet_conditional": _graph([sample, timestep], noise),
        "vae_encoder": _graph([large], small),
        "vae_decoder": _graph([small], large),
    }
    weights = WeightsInfo(origin=WEIGHTS, sha256=sha256, stand_in=True)
    manifest = Manifest(
        schema_version=1,
        created="",
        model=ModelInfo(
            preset=preset_name,
            parameters=parameters,
            unet=weights,
            vae=WeightsInfo(origin=WEIGHTS, sha256=_NONE, stand_in=True),
        ),
        geometry=geometry_of(sizes),
        schedule=schedule_of(sizes),
        defaults=Defaults(num_inference_steps=20, guidance_scale=2.5, strength=0.99, noise_offset=0.0357),
        graphs=graphs,
        files={},
        rewrites=[],
        parity={},
        tools={},
    )
    return Bundle(Path("random-test-weights"), manifest)


def _graph(inputs: list[TensorInfo], output: TensorInfo) -> GraphInfo:
    # Without the check that there are files: a manifest in memory has none.
    return GraphInfo.model_construct(files={}, inputs=inputs, outputs=[output])
