"""From the bytes and options of a request to a `Job`, by the checked readers that files go through too."""

from __future__ import annotations

import base64
import binascii
import re
import secrets
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime.errors import InputError
from moebius_runtime.masks import mask_from_picture
from moebius_runtime.pictures import Picture, picture_from_bytes
from moebius_runtime.pipeline import make_options
from moebius_serve.jobs import Job
from moebius_serve.limits import Limits

# Options of the mask and of the result's file, beside the fields of `InpaintOptions`.
_MASK_OPTIONS: dict[str, tuple[type, ...]] = {
    "invert_mask": (bool,),
    "resize_mask": (bool,),
    "mask_dilate": (int, str),
    "quality": (int,),
}
MAX_SEED = (1 << 31) - 1
_DATA_URL = re.compile(r"data:[\w.+-]+/[\w.+-]+(?:;[\w=.+-]+)*;base64,")


class TooLargeError(InputError):
    """A picture over the server's limit of pixels."""


def read_picture(data: bytes, what: str, limits: Limits) -> Picture:
    """A picture from the bytes of a file; `what` names it in errors.

    Raises:
        TooLargeError: it has more pixels than the server takes.
        InputError: the bytes are not a whole picture of a known format.
    """
    picture = picture_from_bytes(data, what)
    height, width = picture.shape
    if height * width > limits.pixels:
        raise TooLargeError(
            f"{what} has {height * width / 1e6:.0f} megapixels; this server takes at most {limits.pixels / 1e6:.0f}"
        )
    return picture


def from_base64(text: Any, what: str) -> bytes:
    """The bytes of a data URL or of bare base64; `InputError` where it is neither."""
    if not isinstance(text, str) or not text:
        raise InputError(f"{what} is missing; expected a picture as base64 or as a data URL")
    match = _DATA_URL.match(text[:200])
    try:
        return base64.b64decode(text[match.end() :] if match else text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{what} is not valid base64; expected a picture as base64 or as a data URL") from error


def alpha_mask(picture: Picture) -> npt.NDArray[np.bool_]:
    """OpenAI's convention: bool [H, W], True where alpha is 0; `InputError` for a mask without alpha."""
    if picture.alpha is None:
        raise InputError(
            "the mask has no transparency; here transparent pixels (alpha 0) mark what to fill. "
            "For white on black use POST /api/v1/jobs or /api/v1/inpaint"
        )
    return np.asarray(picture.alpha == 0)


def make_job(
    image: bytes, mask: bytes, options: Mapping[str, Any], limits: Limits, *, name: str = "image", alpha: bool = False
) -> Job:
    """A job from the bytes of a picture and of its mask, and options as JSON has them.

    Args:
        image: the file as the user has it.
        mask: white marks what to fill; with `alpha`, transparency does.
        options: fields of `InpaintOptions` but `noise`; `mask_dilate`, `invert_mask`, `resize_mask`, `quality`.
        limits: of this server.
        name: the picture's file name, for the result's.
        alpha: the mask follows OpenAI's convention.

    Raises:
        InputError: any of them is not as expected; the message is one sentence.
    """
    given = {key: value for key, value in options.items() if value is not None}
    masking = {key: given.pop(key) for key in _MASK_OPTIONS if key in given}
    for key, value in masking.items():
        if not isinstance(value, _MASK_OPTIONS[key]) or (isinstance(value, bool) and bool not in _MASK_OPTIONS[key]):
            kinds = " or ".join(kind.__name__ for kind in _MASK_OPTIONS[key])
            raise InputError(f"option {key} is {value!r:.60}; expected {kinds}")
    quality = masking.pop("quality", 95)
    if not 1 <= quality <= 100:
        raise InputError(f"option quality is {quality}; expected 1 to 100")
    if "noise" in given:
        raise InputError("option noise is not taken over HTTP; name a seed")
    if given.get("seed") == -1:
        given["seed"] = secrets.randbelow(MAX_SEED)
    made = make_options(**given)
    picture = read_picture(image, "the picture", limits)
    drawn = read_picture(mask, "the mask", limits)
    if alpha:
        area = alpha_mask(drawn)
        drawn = _as_picture(area)
    renamed = {key.removesuffix("_mask").removeprefix("mask_"): value for key, value in masking.items()}
    area = mask_from_picture(drawn, picture.shape, name="the mask", hints=False, **renamed)
    return Job(picture, area, made, PurePath(name.replace("\\", "/")).name or "image", quality, picture.notes)


def _as_picture(area: npt.NDArray[np.bool_]) -> Picture:
    from moebius_runtime.pictures import picture_from_image

    return picture_from_image(Image.fromarray(area.astype(np.uint8) * np.uint8(255)))
