"""Modes: the sets of defaults that `--mode` names. An option that is given overrides its mode's default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from moebius_runtime.manifest import Defaults
    from moebius_runtime.pipeline import InpaintOptions

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


def settings_of(options: InpaintOptions, defaults: Defaults) -> Settings:
    """The values of a run from its options and its bundle's defaults."""
    mode = MODES[options.mode]

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    return Settings(
        mode=mode,
        steps=first(options.steps, defaults.num_inference_steps),
        guidance_scale=first(options.guidance_scale, defaults.guidance_scale),
        strength=first(options.strength, mode.strength, defaults.strength),
        fit=first(options.fit, mode.fit),
        blend=first(options.blend, mode.blend),
        mask_reduce=first(options.mask_reduce, mode.mask_reduce),
        mask_dilate=first(options.mask_dilate, mode.mask_dilate),
        start=options.start or mode.start,
    )
