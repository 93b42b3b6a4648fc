"""The weights at the end of a run, as the other commands read them."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moebius.distill.settings import Settings
from moebius.errors import TrainingError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_weights(settings: Settings, state: Mapping[str, Tensor], step: int) -> Path:
    """Writes `diffusion_pytorch_model.safetensors` and `config.json` to `settings.out`; each whole or not at all.

    The folder is a weights source of `moebius-export onnx` and of a next run's `init`, `teacher` and `vae`.

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
    if settings.train == "vae":
        content |= sizes.vae.to_diffusers()
    else:
        content |= asdict(getattr(sizes, settings.train)) | {"prediction_type": sizes.prediction_type}
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        target = settings.out / WEIGHTS
        _placed(target, lambda part: save_file(tensors, part))
        text = json.dumps(content, indent=1) + "\n"
        _placed(settings.out / "config.json", lambda part: part.write_text(text, "utf-8"))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(f"cannot write the weights to {settings.out}: {reason}; free some space") from error
    return target


def _placed(target: Path, write: Any) -> None:
    for left in target.parent.glob(f".{target.name}.*.part"):  # by a run that was killed; one run writes to a folder
        left.unlink(missing_ok=True)
    part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        write(part)
        with open(part, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(part, target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)
