"""What `moebius-bench tradeoff` compares: the modes, and `best` with one option changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from moebius_runtime.errors import InputError
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline, make_options
from moebius_runtime.settings.modes import MODES, ModeName

MODE_NAMES: tuple[ModeName, ...] = tuple(MODES)
BASELINE = "best"

_SINGLE = (
    "best,start=pixels",
    "best,decode=masked",
    "best,vae_decoder=tiny",
    "best,guidance_interval=200:800",
    "best,steps=10",
    "best,steps=10,sampler=dpmpp-2m",
    "best,steps=10,sampler=unipc",
    "best,steps=8,sampler=dpmpp-2m",
    "best,steps=6,sampler=dpmpp-2m",
    "best,steps=4,sampler=dpmpp-2m",
)
_NUMBERS = {"steps": int, "seed": int, "mask_dilate": int, "strength": float, "guidance_scale": float}


class Variant(NamedTuple):
    """A name and the options that it stands for."""

    name: str
    options: InpaintOptions


def parse_variant(text: str) -> Variant:
    """Reads `MODE[,OPTION=VALUE...]`, such as `best,steps=8,sampler=unipc`; the text is the name.

    Masks are exact here: they are not dilated, and the blend is hard, unless the text says otherwise.

    Raises:
        InputError: an unknown mode, option or value.
    """
    mode, *parts = text.split(",")
    given: dict[str, Any] = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals:
            raise InputError(f"--variant {text}: {part!r} is no OPTION=VALUE; expected such as best,steps=8")
        name = name.strip().replace("-", "_")
        try:
            given[name] = _value(name, value.strip())
        except ValueError as error:
            raise InputError(f"--variant {text}: {name} {value!r} is no number") from error
    try:
        return Variant(text, make_options(**({"mode": mode, "blend": "hard", "mask_dilate": 0} | given)))
    except InputError as error:
        raise InputError(f"--variant {text}: {error}") from error


def _value(name: str, value: str) -> Any:
    if name == "guidance_interval":
        return [int(end) for end in value.split(":")]
    if name == "mask_dilate" and value == "auto":
        return value
    return _NUMBERS.get(name, str)(value)


def default_variants(pipeline: InpaintPipeline) -> tuple[list[Variant], list[str]]:
    """The modes and the single options that the bundle and the runtime can run, and notes on those left out."""
    found, notes = [], []
    for text in (*MODE_NAMES, *_SINGLE):
        variant = parse_variant(text)
        if variant.options.guidance_interval and pipeline.manifest.defaults.guidance_scale == 1:
            notes.append(f"{text}: left out, the bundle's guidance scale is 1, where an interval changes nothing")
            continue
        try:
            pipeline.check(variant.options)
        except InputError as error:
            notes.append(f"{text}: left out, {error}")
            continue
        found.append(variant)
    return found, notes


def chosen_variants(texts: Sequence[str], pipeline: InpaintPipeline) -> tuple[list[Variant], list[str]]:
    """The given variants, with `reference` and `best` before them, or the default ones.

    Raises:
        InputError: a variant is given twice, or cannot be run.
    """
    if not texts:
        return default_variants(pipeline)
    names = list(dict.fromkeys(["reference", BASELINE, *texts]))
    if len(texts) != len(set(texts)):
        raise InputError(f"--variant {', '.join(texts)}: one is given twice")
    variants = [parse_variant(name) for name in names]
    for variant in variants:
        try:
            pipeline.check(variant.options)
        except InputError as error:
            raise InputError(f"--variant {variant.name}: {error}") from error
    return variants, []
