"""What an export writes into the manifest."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, get_args

import numpy as np

from moebius import Preset
from moebius.weights.checkpoint import Checkpoint
from moebius.weights.sampling_record import SamplingRecord
from moebius_export.network.declared import geometry_of, schedule_of
from moebius_export.onnx_export.convert import GraphSpec
from moebius_runtime.backends.ort import import_onnxruntime
from moebius_runtime.bundle.manifest import (
    DecoderName,
    Defaults,
    FileInfo,
    GraphCheck,
    GraphFile,
    GraphInfo,
    GraphName,
    GuidanceInfo,
    Manifest,
    ModeDefaults,
    ModelInfo,
    Parity,
    Rewrite,
    TensorInfo,
    WeightsInfo,
)
from moebius_runtime.files import sha256_file
from moebius_runtime.settings.modes import MODES, ModeName, recorded
from moebius_runtime.version import own_version

_TOOLS = ("torch", "diffusers", "onnx", "onnxscript", "onnxsim", "numpy")


@dataclass(frozen=True)
class Written:
    """A graph of the bundle under construction."""

    info: GraphInfo
    parity: Parity
    rewrites: list[Rewrite]
    check: GraphCheck


def graph_info(spec: GraphSpec, output: np.ndarray, file: GraphFile) -> GraphInfo:
    """The graph's files, inputs and outputs; `output` is PyTorch's on the example inputs."""

    def info(name: str, array: np.ndarray, open_batch: bool, sizes: Mapping[int, str] | None) -> TensorInfo:
        shape: list[int | str] = list(array.shape)
        if open_batch:
            shape[0] = "batch"
        for axis, size in (sizes or {}).items():
            shape[axis] = size
        return TensorInfo(name=name, dtype=str(array.dtype), shape=shape)  # type: ignore[arg-type]

    return GraphInfo(
        files={"fp32": file},
        inputs=[
            info(name, tensor.numpy(), name in spec.dynamic, (spec.sizes or {}).get(name))
            for name, tensor in spec.inputs.items()
        ],
        outputs=[info(spec.output, output, bool(spec.dynamic), spec.output_sizes)],
    )


def make_manifest(
    folder: Path,
    model: ModelInfo,
    sizes: Preset,
    guidance_scale: float,
    graphs: dict[GraphName, Written],
    known: SamplingRecord,
) -> Manifest:
    """The manifest of the graphs and of every file in `folder`, which it hashes."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
    return Manifest(
        schema_version=1,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        model=model,
        geometry=geometry_of(sizes),
        schedule=schedule_of(sizes),
        defaults=Defaults(
            num_inference_steps=known.steps or 20,
            guidance_scale=guidance_scale,
            strength=0.99,
            noise_offset=0.0357,
            sampler="lcm" if known.sampler == "lcm" else "ddim",
        ),
        guidance=None if known.guidance_scale is None else GuidanceInfo(distilled=known.guidance_scale),
        graphs={name: graph.info for name, graph in graphs.items() if name not in get_args(DecoderName)},
        decoders={name: graphs[name].info for name in get_args(DecoderName) if name in graphs},
        modes=mode_defaults(known.modes, tiny="vae_decoder_tiny" in graphs),
        files=files,
        rewrites=[rewrite for graph in graphs.values() for rewrite in graph.rewrites],
        parity={name: graph.parity for name, graph in graphs.items()},
        checks={name: graph.check for name, graph in graphs.items()},
        tools={"moebius-edge": own_version() or "from a checkout"}
        | {name: metadata.version(name) for name in _TOOLS}
        | {"python": platform.python_version(), "onnxruntime": import_onnxruntime().__version__},
    )


def mode_defaults(own: Mapping[ModeName, ModeDefaults], *, tiny: bool) -> dict[Any, ModeDefaults]:
    """The defaults of the modes that a bundle may change: the built-in ones with the network's `own` over them.

    With a tiny decoder, mode `fast` takes it.
    """
    modes = {name: recorded(mode) for name, mode in MODES.items() if not mode.original}
    for name, values in own.items():
        modes[name].update({key: value for key, value in values.model_dump().items() if value is not None})
    if tiny:
        modes["fast"]["vae_decoder"] = "tiny"
    return {name: ModeDefaults(**values) for name, values in modes.items()}


def weights_info(checkpoint: Checkpoint) -> WeightsInfo:
    """The origin and hash of weights."""
    return WeightsInfo(origin=checkpoint.origin, sha256=checkpoint.sha256, stand_in=checkpoint.stand_in)
