"""From the bytes and options of a request to a `Job`, by the checked readers that files go through too."""

from __future__ import annotations

import base64
import binascii
import io
import re
import secrets
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime.errors import InputError
from moebius_runtime.images.masks import mask_from_picture
from moebius_runtime.images.pictures import INPUT_FORMATS, NamedBytes, Picture, load_picture, picture_from_image
from moebius_runtime.images.saving import OUTPUT_FORMATS, check_can_save
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline, make_options
from moebius_runtime.sampling.samplers import SAMPLERS
from moebius_runtime.settings.modes import DEFAULT_MODE, ModeName
from moebius_serve.jobs import Job
from moebius_serve.limits import Limits

_NUMBER, _WHOLE = (int, float), (int,)
# What JSON may hold for each option; `InpaintOptions` and the pipeline check the values.
_TYPES: dict[str, tuple[type, ...]] = {
    "mode": (str,),
    "steps": _WHOLE,
    "guidance_scale": _NUMBER,
    "strength": _NUMBER,
    "guidance_interval": (list,),
    "sampler": (str,),
    "seed": _WHOLE,
    "fit": (str,),
    "blend": (str,),
    "mask_reduce": (str,),
    "mask_dilate": (int, str),
    "start": (str,),
    "decode": (str,),
    "vae_decoder": (str,),
    "compensate_colour": (bool,),
    "max_squares": _WHOLE,
    # Beside the fields of `InpaintOptions`: of the mask, and of the result's file.
    "invert_mask": (bool,),
    "resize_mask": (bool,),
    "mask_orientation": (str,),
    "quality": _WHOLE,
}
_MASK = {"invert_mask": "invert", "resize_mask": "resize", "mask_orientation": "orientation"}
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", list: "a list"}
MAX_SEED = (1 << 32) - 1
_DECODERS = 2  # pictures that are decoded at a time: each may take a gigabyte while it is
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,")


class TooLargeError(InputError):
    """A picture over the server's limit of pixels."""


@dataclass(frozen=True)
class Intake:
    """Makes jobs of requests.

    Attributes:
        pipeline: checks the options that a job would run with.
        limits: of this server.
        mode: taken where a request names none.
    """

    pipeline: InpaintPipeline
    limits: Limits
    mode: ModeName = DEFAULT_MODE
    _decoding: threading.BoundedSemaphore = field(default_factory=lambda: threading.BoundedSemaphore(_DECODERS))

    def read_picture(self, data: bytes, what: str) -> Picture:
        """A picture from the bytes of a file; `what` names it in errors.

        Raises:
            TooLargeError: it has more pixels than the server takes. Nothing was decoded.
            InputError: the bytes are not a whole picture of a known format.
        """
        with self._decoding:
            self._check_pixels(data, what)
            return load_picture(NamedBytes(what, data))

    def _check_pixels(self, data: bytes, what: str) -> None:
        """Refuses by the size that the file's header states."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # our own limit stands in for Pillow's bomb warning
                with Image.open(io.BytesIO(data), formats=INPUT_FORMATS) as image:
                    width, height = image.size
        except Image.DecompressionBombError:
            width, height = 0, 0
        except Exception:
            return  # load_picture explains what is wrong with it
        if width * height > self.limits.pixels or not width:
            most = f"this server takes at most {self.limits.pixels / 1e6:g} megapixels"
            size = f"{width * height / 1e6:.0f} megapixels" if width else "more pixels than any picture should have"
            raise TooLargeError(f"{what} has {size}; {most}. Resize it first.")

    def options(self, given: Mapping[str, Any]) -> InpaintOptions:
        """Checked options; `InputError` names the one that is not as expected."""
        made = make_options(**{"mode": self.mode, **given})
        self.pipeline.check(made)
        return made

    def of_other_programs(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options as clients of other programs send them, without those that this bundle's network does not have.

        Such clients always send a scale, a sampler and steps, and know nothing of distilled networks.
        """
        manifest, dropped = self.pipeline.manifest, set()
        if manifest.guidance is not None:
            dropped.add("guidance_scale")
        if manifest.defaults.sampler == "lcm":
            steps = options.get("steps")
            dropped |= {"sampler"}
            if isinstance(steps, int) and steps > manifest.defaults.num_inference_steps:
                dropped.add("steps")
        return {name: value for name, value in options.items() if name not in dropped}

    @property
    def samplers(self) -> list[str]:
        """Names of the samplers that this bundle can be run with."""
        return ["lcm"] if self.pipeline.manifest.defaults.sampler == "lcm" else list(SAMPLERS)

    def make_job(
        self,
        image: bytes,
        mask: bytes,
        options: Mapping[str, Any],
        *,
        name: str = "image",
        suffix: str | None = None,
        alpha: bool = False,
    ) -> Job:
        """A job from the bytes of a picture and of its mask, and options as JSON has them.

        Args:
            image: the file as the user has it.
            mask: white marks what to fill; with `alpha`, transparency does.
            options: fields of `InpaintOptions` but `noise`; `invert_mask`, `resize_mask`, `mask_orientation` and
                `quality`. None stands for the default, seed -1 for a random one.
            name: the picture's file name, for the result's.
            suffix: of the result, as `.png`; None for the source's own.
            alpha: the mask follows OpenAI's convention.

        Raises:
            InputError: any of them is not as expected; the message is one sentence.
            BundleError: a graph's file is missing or damaged.
        """
        given = typed({key: value for key, value in options.items() if value is not None})
        masking = {_MASK[key]: given.pop(key) for key in _MASK if key in given}
        quality = given.pop("quality", 95)
        if not 1 <= quality <= 100:
            raise InputError(f"option quality is {quality}; expected 1 to 100")
        if given.get("seed") == -1:
            given["seed"] = secrets.randbelow(MAX_SEED + 1)
        made = self.options(given)
        picture = self.read_picture(image, "the picture")
        suffix = suffix or own_suffix(picture)
        check_can_save(picture, f"the result as {suffix}")
        drawn = self.read_picture(mask, "the mask")
        if alpha:
            drawn = _drawn(alpha_area(drawn))
        area = mask_from_picture(
            drawn, picture.shape, rotation=picture.orientation, name="the mask", hints="none", **masking
        )
        name = PurePath(name.replace("\\", "/")).name or "image"
        return Job(picture, area, made, name, suffix, quality, picture.notes)


def typed(options: dict[str, Any]) -> dict[str, Any]:
    """The options, if each is one that is taken over HTTP and of its type; else `InputError`."""
    for key, value in options.items():
        if key not in _TYPES:
            raise InputError(f"unknown option {key[:60]!r}; expected some of {', '.join(_TYPES)}")
        types = _TYPES[key]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            kinds = " or ".join(_KINDS[kind] for kind in types if kind is not int or float not in types)
            raise InputError(f"option {key} is {short(value)}; expected {kinds}")
    return options


def short(value: object) -> str:
    """A value as a message can hold it."""
    text = "null" if value is None else ascii(value) if not isinstance(value, int) or abs(value) < 10**30 else "huge"
    return text if len(text) <= 60 else f"{text[:60]}..."


def own_suffix(picture: Picture) -> str:
    """The suffix of the format that a picture came in; `.png` where that is read but not written."""
    name = "JPEG" if picture.format == "MPO" else picture.format
    return next((suffix for suffix, written in OUTPUT_FORMATS.items() if written == name), ".png")


def from_base64(text: Any, what: str) -> bytes:
    """The bytes of a data URL or of bare base64; `InputError` where it is neither."""
    if not isinstance(text, str) or not text:
        raise InputError(f"{what} is missing; expected a picture as base64 or as a data URL")
    match = _DATA_URL.match(text[:200])
    try:
        return base64.b64decode(text[match.end() :] if match else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{what} is not valid base64; expected a picture as base64 or as a data URL") from error


def alpha_area(picture: Picture) -> npt.NDArray[np.bool_]:
    """OpenAI's convention: bool [H, W], True where alpha is 0; `InputError` for a mask without alpha."""
    if picture.alpha is None:
        raise InputError(
            "the mask has no transparency; here transparent pixels (alpha 0) mark what to fill. "
            "For white on black use POST /api/v1/jobs or /api/v1/inpaint"
        )
    area: npt.NDArray[np.bool_] = picture.alpha == 0
    return area


def _drawn(area: npt.NDArray[np.bool_]) -> Picture:
    """An area as a white on black picture."""
    return picture_from_image(Image.fromarray(area.astype(np.uint8) * np.uint8(255)))
