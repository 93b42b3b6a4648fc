"""What a checkpoint's `config.json` says about how its network should be sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from moebius.errors import CheckpointError
from moebius.weights.checkpoint import load_config
from moebius_runtime.bundle.checked import SchemaError
from moebius_runtime.bundle.manifest import ModeDefaults
from moebius_runtime.sampling.choice import SAMPLER_NAMES
from moebius_runtime.settings.modes import MODES, ModeName


class SamplingRecord(NamedTuple):
    """How a network must be sampled; None where its `config.json` names nothing.

    Attributes:
        guidance_scale: scale whose guidance is inside the network's conditional output.
        sampler: the sampler that it was made for, `lcm`.
        steps: recommended number of evaluations.
        vae_sha256: of the weights of the VAE whose latents it was trained on.
        modes: recommended defaults of the runtime's modes; a mode that is not there keeps the built-in ones.
    """

    guidance_scale: float | None = None
    sampler: str | None = None
    steps: int | None = None
    vae_sha256: str | None = None
    modes: Mapping[ModeName, ModeDefaults] = MappingProxyType({})


def read_sampling_record(source: str, progress: Callable[[str], None] | None = None) -> SamplingRecord:
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
    return SamplingRecord(
        None if scale is None else float(scale),
        sampler,
        steps,
        vae if isinstance(vae, str) else None,
        _modes(source, content.get("modes", {})),
    )


def _modes(source: str, content: Any) -> Mapping[ModeName, ModeDefaults]:
    """The record `modes`: {"best": {"steps": 10, ...}, ...}, with the manifest's fields."""
    names = [name for name, mode in MODES.items() if not mode.original]
    if not isinstance(content, dict) or not set(content) <= set(names):
        raise _wrong(source, "modes", content, f"defaults by mode, of {', '.join(names)}")
    modes = {}
    for name, values in content.items():
        try:
            modes[name] = ModeDefaults.model_validate(values)
        except SchemaError as error:
            raise CheckpointError(f"{source}: its config.json has wrong defaults of mode {name}: {error}") from None
        if modes[name].sampler not in (None, *SAMPLER_NAMES):
            raise _wrong(source, f"modes.{name}.sampler", modes[name].sampler, ", ".join(SAMPLER_NAMES))
    return modes


def _wrong(source: str, name: str, found: Any, expected: str) -> CheckpointError:
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return CheckpointError(f"{source}: its config.json says {name} = {shown}; expected {expected}")
