"""The options that `moebius-inpaint` and `moebius-batch` share: their declarations, and their values as keywords."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moebius_runtime.errors import InputError
from moebius_runtime.settings.modes import DEFAULT_MODE


class ModeName(str, Enum):
    """--mode."""

    best = "best"
    balanced = "balanced"
    fast = "fast"
    reference = "reference"


DEFAULT = ModeName(DEFAULT_MODE)
DEFAULT_BUNDLE = Path("moebius-bundle")


class MaskOrientation(str, Enum):
    """--mask-orientation."""

    upright = "upright"
    stored = "stored"


class Fit(str, Enum):
    """--fit."""

    crop = "crop"
    whole = "whole"


class Blend(str, Enum):
    """--blend."""

    soft = "soft"
    hard = "hard"


class Reduce(str, Enum):
    """--mask-reduce."""

    nearest = "nearest"
    max = "max"


class SamplerName(str, Enum):
    """--sampler."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp-2m"
    unipc = "unipc"
    lcm = "lcm"


class StartName(str, Enum):
    """--start."""

    pixels = "pixels"
    cells = "cells"


class DecodeName(str, Enum):
    """--decode."""

    full = "full"
    masked = "masked"


class VaeDecoderName(str, Enum):
    """--vae-decoder."""

    full = "full"
    tiny = "tiny"


class PrecisionName(str, Enum):
    """--precision."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int8_cpu = "int8_cpu"
    fp8 = "fp8"


ModeOption = Annotated[
    ModeName,
    typer.Option(
        help="best: no masked pixel influences the result. balanced: also, in fewer steps. fast: fewer still, may "
        "lose some detail. reference: the original's procedure, for comparisons."
    ),
]
StepsOption = Annotated[int | None, typer.Option(help="Inference steps. Default: the mode's, else the bundle's (20).")]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        help="Scale of the classifier-free guidance. Default: the bundle's (2.5 for scenes, 2.0 for portraits). "
        "1 runs one branch of the network and halves the cost."
    ),
]
GuidanceInterval = Annotated[
    str | None,
    typer.Option(
        metavar="LOW:HIGH",
        help="Timesteps (0 to 999) with guidance; the others run one branch, at half the cost. Default: all.",
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        help="Above 0, at most 1. Below 1 the filling is smoother. Default: 1 (mode reference: the bundle's)."
    ),
]
SamplerOption = Annotated[
    SamplerName | None,
    typer.Option(
        help="ddim (default); dpmpp-2m (mode fast) and unipc are made for few steps, 4 to 12; lcm is for bundles "
        "that were distilled for it, which have no other."
    ),
]
FitOption = Annotated[
    Fit | None,
    typer.Option(
        help="crop (default of mode best): fill squares near the network's size. whole (reference): shrink the "
        "picture to one square."
    ),
]
BlendOption = Annotated[
    Blend | None,
    typer.Option(help="soft (default): a feathered seam. hard: pixels outside the grown mask stay bit-exact."),
]
MaskReduce = Annotated[
    Reduce | None,
    typer.Option(help="How the mask is reduced to latent size: max (mode best) or nearest (mode reference)."),
]
StartOption = Annotated[
    StartName | None,
    typer.Option(
        help="What the noise is added to, except in mode reference. cells (default): the masked picture's latents, "
        "smoothed under the mask. pixels: the picture with smooth colours under the mask, encoded once more."
    ),
]
DecodeOption = Annotated[
    DecodeName | None,
    typer.Option(
        help="masked (modes balanced and fast): decode only the part that is pasted. full: decode the whole square."
    ),
]
VaeDecoderOption = Annotated[
    VaeDecoderName | None,
    typer.Option(
        help="tiny: a small decoder that loses fine detail, for bundles exported with --tiny-decoder. full: the "
        "autoencoder's own."
    ),
]
MaskDilate = Annotated[
    str | None,
    typer.Option(
        metavar="PIXELS|auto",
        help="Grow the mask by so many pixels. auto (mode best): a few, more in large pictures. Mode reference: 0.",
    ),
]
MaskOrientationOption = Annotated[
    MaskOrientation,
    typer.Option(help="stored: the mask was drawn on the photograph's pixels without its EXIF rotation."),
]
InvertMask = Annotated[bool, typer.Option("--invert-mask", help="Fill black pixels, not white ones.")]
ResizeMask = Annotated[bool, typer.Option("--resize-mask", help="Resize a mask of another size to the picture's.")]
CompensateColour = Annotated[
    bool, typer.Option("--compensate-colour", help="Shift the filling towards the colours around it.")
]
MaxSquares = Annotated[int, typer.Option(min=1, help="The most squares that one picture may take; see --fit crop.")]
Quality = Annotated[int, typer.Option(min=1, max=100, help="Quality of a JPEG or AVIF result.")]
RuntimeOption = Annotated[
    str,
    typer.Option(
        help="ort-cpu, ort-cuda, ort-tensorrt, ort-webgpu, ort-openvino, openvino, tensorrt, tensorrt-rtx or "
        "torch. If it is unavailable, the command fails; it never falls back silently. auto takes the best that "
        "runs here and prints why."
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Device of ort-webgpu, ort-openvino or openvino: its number, its name or a part of it. Default: the "
        "first (openvino: CPU). `--device list` fails with the list of devices."
    ),
]
PrecisionOption = Annotated[
    PrecisionName | None,
    typer.Option(
        help="Precision of the U-Net. Default: fp32 on a CPU; on a GPU the first of fp16, bf16, fp32 in the bundle."
    ),
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Run engines whose passport (what they were built from, and for which device) is missing or does not "
        "match. Engines are programs: use this only for engines whose maker you know.",
    ),
]


def parse_interval(text: str) -> list[int]:
    """Parses the value of `--guidance-interval`."""
    low, _, high = text.partition(":")
    if not all(end.isascii() and end.isdigit() and len(end) <= 12 for end in (low, high)):
        raise InputError(f"--guidance-interval {text}: expected LOW:HIGH in timesteps, such as 200:800")
    return [int(low), int(high)]


def parse_dilation(text: str) -> int | str:
    """Parses the value of `--mask-dilate`."""
    if text == "auto":
        return text
    if not text.isascii() or not text.isdigit():
        raise InputError(f"--mask-dilate {text}: expected auto or a whole number of pixels, 0 or more")
    return int(text[:12])


def given_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `make_options` for options as the command got them; those that are None are left out.

    Args:
        values: by the keywords' names. Enums give their values; the texts of `--guidance-interval` and `--mask-dilate`
            are parsed.

    Raises:
        InputError: one of these texts is not as its option describes.
    """
    parse = {"guidance_interval": parse_interval, "mask_dilate": parse_dilation}
    found = {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}
    return {name: parse.get(name, lambda same: same)(value) for name, value in found.items() if value is not None}
