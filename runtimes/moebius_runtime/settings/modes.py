"""The modes of `--mode`: named sets of defaults. An explicit option overrides its mode's default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

ModeName = Literal["reference", "best"]
Fit = Literal["crop", "whole"]
Blend = Literal["soft", "hard"]
Reduce = Literal["nearest", "max"]
Dilation = int | Literal["auto"]
Start = Literal["pixels", "cells"]


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
        sampler: a name of `moebius_runtime.sampling.samplers.SAMPLERS`.
    """

    strength: float | None
    fit: Fit
    blend: Blend
    mask_reduce: Reduce
    mask_dilate: Dilation
    start: Start | None
    original: bool
    sampler: str = "ddim"


MODES: dict[ModeName, Mode] = {
    "reference": Mode(
        strength=None, fit="whole", blend="soft", mask_reduce="nearest", mask_dilate=0, start=None, original=True
    ),
    "best": Mode(
        strength=1.0, fit="crop", blend="soft", mask_reduce="max", mask_dilate="auto", start="pixels", original=False
    ),
}


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
