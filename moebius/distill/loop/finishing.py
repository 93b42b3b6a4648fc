"""Writes the weights at the end of a run in the format that the other commands read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moebius.distill.few_step_settings import distilled_fields
from moebius.distill.settings import Settings
from moebius.errors import TrainingError
from moebius_runtime.errors import OutputError
from moebius_runtime.files import atomic_write

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_weights(settings: Settings, state: Mapping[str, Tensor], step: int, vae_sha256: str | None = None) -> Path:
    """Writes `diffusion_pytorch_model.safetensors` and `config.json` to `settings.out`; each whole or not at all.

    The folder is a weights source of `moebius-export onnx` and of a next run's `init`, `teacher` and `vae`.
    `vae_sha256` is the SHA-256 of the weights of the VAE whose latents the network was trained on.

    Raises:
        TrainingError: the folder is not writable, or the disk is full.
    """
    dtype = {"float32": torch.float32, "float16": torch.float16}[settings.weights_dtype]
    tensors = {
        name: value.detach().cpu().to(dtype if value.is_floating_point() else value.dtype).contiguous().clone()
        for name, value in state.items()
    }
    sizes = settings.network.build()
    content: dict[str, Any] = {"trained": {"kind": settings.train, "steps": step, "settings": settings.identity()}}
    if vae_sha256 is not None:
        content["trained"]["vae_sha256"] = vae_sha256
    if settings.train == "vae":
        content |= sizes.vae.to_diffusers()
    else:
        content |= asdict(getattr(sizes, settings.train)) | {"prediction_type": sizes.prediction_type}
        content |= distilled_fields(settings)
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        target, config = settings.out / WEIGHTS, settings.out / "config.json"
        for name in (target.name, config.name):
            for leftover in settings.out.glob(f".{name}.*.part"):  # of a run that was killed
                leftover.unlink(missing_ok=True)
        with atomic_write(target) as stream:
            save_file(tensors, stream.name)
        with atomic_write(config) as stream:
            stream.write(json.dumps(content, indent=1).encode() + b"\n")
    except (OSError, OutputError, SafetensorError) as error:
        cause = error.__cause__ if isinstance(error, OutputError) else error
        reason = getattr(cause, "strerror", None) or error
        raise TrainingError(f"cannot write the weights to {settings.out}: {reason}; free some space") from error
    return target
