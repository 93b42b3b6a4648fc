"""The modes of `--mode`: named sets of defaults. An explicit option overrides its mode's default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

ModeName = Literal["reference", "best", "balanced", "fast"]
Fit = Literal["crop", "whole"]
Blend = Literal["soft", "hard"]
Reduce = Literal["nearest", "max"]
Dilation = int | Literal["auto"]
Start = Literal["pixels", "cells"]
Decode = Literal["full", "masked"]
VaeDecoder = Literal["full", "tiny"]
Interval = tuple[int, int]
"""The lowest and the highest timestep at which guidance applies, both included."""


@dataclass(frozen=True)
class Mode:
    """Defaults of a mode.

    Attributes:
        strength: share of the steps that are run; None takes the bundle's.
        fit: `crop` or `whole`.
        blend: `soft` or `hard`.
        mask_reduce: `nearest` or `max`.
        mask_dilate: pixels, or `auto`.
        start: what the noise is added to. `pixels`: the picture with smooth values under the mask, encoded. `cells`:
            the masked picture's latents with smooth values in the masked cells, which saves an encode. None: the
            picture itself, encoded.
        original: follow the original's procedure: start from the picture with the object in it, resample masked and
            invisible pixels with the rest, and feather across the mask's border. If False, no masked pixel can
            influence the result.
        steps: inference steps; None takes the bundle's.
        sampler: a name of `moebius_runtime.sampling.samplers.SAMPLERS`.
        guidance_interval: timesteps at which guidance applies; None is all of them.
        decode: `full` decodes the whole square, `masked` the part that is pasted.
        vae_decoder: `full` or `tiny`.
    """

    strength: float | None
    fit: Fit
    blend: Blend
    mask_reduce: Reduce
    mask_dilate: Dilation
    start: Start | None
    original: bool
    steps: int | None = None
    sampler: str = "ddim"
    guidance_interval: Interval | None = None
    decode: Decode = "full"
    vae_decoder: VaeDecoder = "full"


_BEST = Mode(
    strength=1.0, fit="crop", blend="soft", mask_reduce="max", mask_dilate="auto", start="cells", original=False
)

MODES: dict[ModeName, Mode] = {
    "reference": Mode(
        strength=None, fit="whole", blend="soft", mask_reduce="nearest", mask_dilate=0, start=None, original=True
    ),
    "best": _BEST,
    "balanced": replace(_BEST, steps=10, decode="masked"),
    "fast": replace(_BEST, steps=3, sampler="dpmpp-2m", guidance_interval=(100, 999), decode="masked"),
}
"""The built-in sets, docs/speed.md. A bundle's manifest may have its own for every mode but `reference`."""

DEFAULT_MODE: ModeName = "best"

RECORDED = ("steps", "sampler", "strength", "start", "guidance_interval", "decode", "vae_decoder")
"""Defaults of a mode that a manifest records: those that trade time for quality."""


def recorded(mode: Mode) -> dict[str, Any]:
    """Returns the defaults of a mode that a manifest records."""
    values = {name: getattr(mode, name) for name in RECORDED}
    if mode.guidance_interval is not None:
        values["guidance_interval"] = list(mode.guidance_interval)  # as JSON has it
    return values


class Settings(NamedTuple):
    """The values of a run: each is the explicit option, else the mode's default, else the bundle's."""

    mode: Mode
    steps: int
    guidance_scale: float
    strength: float
    fit: Fit
    blend: Blend
    mask_reduce: Reduce
    mask_dilate: Dilation
    start: Start | None
    sampler: str
    guidance_interval: Interval | None
    decode: Decode
    vae_decoder: VaeDecoder
