"""Modes: the sets of defaults that `--mode` names. An option that is given overrides its mode's default."""

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
    """What a mode sets.

    Attributes:
        strength: of the start; None takes the bundle's.
        fit: `crop` or `whole`.
        blend: `soft` or `hard`.
        mask_reduce: `nearest` or `max`.
        mask_dilate: pixels, or `auto`.
        start: what the noise is laid on: `pixels`, the picture with smooth values under the mask, encoded; `cells`,
            the masked picture's latents with smooth values in the masked cells, which saves an encode; None, the
            picture itself.
        original: the original's procedure. It starts from the picture with the object in it, shows masked and
            invisible pixels to the resampling, and feathers across the mask's border. Without it, nothing that
            lies under the mask can influence the result.
    """

    strength: float | None
    fit: Fit
    blend: Blend
    mask_reduce: Reduce
    mask_dilate: Dilation
    start: Start | None
    original: bool


MODES: dict[ModeName, Mode] = {
    "reference": Mode(
        strength=None, fit="whole", blend="soft", mask_reduce="nearest", mask_dilate=0, start=None, original=True
    ),
    "best": Mode(
        strength=1.0, fit="crop", blend="soft", mask_reduce="max", mask_dilate="auto", start="pixels", original=False
    ),
}


class Settings(NamedTuple):
    """The values that a run uses: each option as given, else the mode's, else the bundle's."""

    mode: Mode
    steps: int
    guidance_scale: float
    strength: float
    fit: Fit
    blend: Blend
    mask_reduce: Reduce
    mask_dilate: Dilation
    start: Start | None
