"""What a checkpoint's `config.json` says about distillation for fewer evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from moebius.errors import CheckpointError
from moebius.weights.checkpoint import load_config


class Distilled(NamedTuple):
    """How a network must be sampled; None where its `config.json` names nothing.

    Attributes:
        guidance_scale: scale whose guidance is inside the network's conditional output.
        sampler: the sampler that it was made for, `lcm`.
        steps: recommended number of evaluations.
        vae_sha256: of the weights of the VAE whose latents it was trained on.
    """

    guidance_scale: float | None = None
    sampler: str | None = None
    steps: int | None = None
    vae_sha256: str | None = None


def read_distilled(source: str, progress: Callable[[str], None] | None = None) -> Distilled:
    """Reads the record beside the weights of `source`. Released weights and random test weights have none.

    Raises:
        CheckpointError: the `config.json` cannot be read, or an entry has a wrong type or value.
    """
    content = load_config(source, progress=progress) or {}
    guidance, trained = content.get("guidance"), content.get("trained")
    scale = None
    if guidance is not None:
        scale = guidance.get("distilled") if isinstance(guidance, dict) else None
        if not (isinstance(scale, int | float) and not isinstance(scale, bool) and 0 <= scale <= 100):
            raise _wrong(source, "guidance", guidance, '{"distilled": a scale from 0 to 100}')
    sampler, steps = content.get("sampler"), content.get("num_inference_steps")
    if sampler not in (None, "lcm"):
        raise _wrong(source, "sampler", sampler, '"lcm"')
    if steps is not None and not (isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= 1000):
        raise _wrong(source, "num_inference_steps", steps, "a whole number from 1 to 1000")
    if sampler is not None and (scale is None or steps is None):
        raise _wrong(source, "sampler", sampler, "it beside guidance and num_inference_steps")
    vae = trained.get("vae_sha256") if isinstance(trained, dict) else None
    return Distilled(None if scale is None else float(scale), sampler, steps, vae if isinstance(vae, str) else None)


def _wrong(source: str, name: str, found: Any, expected: str) -> CheckpointError:
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return CheckpointError(f"{source}: its config.json says {name} = {shown}; expected {expected}")
