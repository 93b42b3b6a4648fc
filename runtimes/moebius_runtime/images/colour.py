"""Colour conversion: 16 bits to 8, and CMYK to sRGB and back through an ICC profile."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms

_STRIP_PIXELS = 1 << 20


def to_8_bits(values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Values as uint8: uint8 unchanged, uint16 [H, W, ...] as round(v / 257), in strips to save memory."""
    if values.dtype == np.uint8:
        return values
    result = np.empty(values.shape, np.uint8)
    step = max(1, _STRIP_PIXELS // values.shape[1])
    for start in range(0, len(values), step):
        result[start : start + step] = (values[start : start + step].astype(np.uint32) + 128) // 257
    return result


def profile_problem(profile: bytes) -> str | None:
    """Why a profile cannot take CMYK to sRGB and back, or None when it can."""
    try:
        _transform(profile, "CMYK", "RGB")
        _transform(profile, "RGB", "CMYK")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return None


def convert(pixels: npt.NDArray[np.uint8], source: str, target: str, profile: bytes | None) -> npt.NDArray[np.uint8]:
    """uint8 [H, W, C] from `source` to `target`, one of them "CMYK" and the other "RGB" (meaning sRGB).

    Through `profile`, a CMYK one without `profile_problem`, relative colorimetric with black point
    compensation; without a profile by Pillow's rule, which knows no inks, and K = 0 on the way back.
    """
    height, width = pixels.shape[:2]
    image = Image.frombytes(source, (width, height), pixels.tobytes())
    if profile is None:
        return np.asarray(image.convert(target))
    converted = ImageCms.applyTransform(image, _transform(profile, source, target))
    assert converted is not None  # None only where the image is changed in place
    return np.asarray(converted)


@lru_cache(maxsize=4)
def _transform(profile: bytes, source: str, target: str) -> ImageCms.ImageCmsTransform:
    embedded = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    screen = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    first, second = (embedded, screen) if source == "CMYK" else (screen, embedded)
    return ImageCms.buildTransform(
        first,
        second,
        source,
        target,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
