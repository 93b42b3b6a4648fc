"""Decodes untrusted pictures for training (upright RGB, or refused with a reason), and crops and flips them."""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from moebius.data.masks import Mask, Rng
from moebius.errors import DataError, one_line

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
MAX_BYTES = 256 << 20
MAX_PIXELS = 100_000_000
MIN_SIDE = 32
_CROPS = 20


class BrokenPicture(Exception):  # noqa: N818
    """A picture that cannot be used. The message gives the reason in one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(one_line(reason))


def read_file(path: Path, root: Path) -> bytes:
    """Reads a plain file that lies in `root` after links are resolved.

    Raises:
        BrokenPicture: no such file, not a plain one, outside `root`, over 256 MiB, or not readable.
    """
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root.resolve()):
            raise BrokenPicture("it lies outside its folder")
        handle = os.open(real, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(handle, "rb") as stream:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise BrokenPicture("it is not a plain file")
            if status.st_size > MAX_BYTES:
                raise BrokenPicture(f"its {status.st_size} bytes are over {MAX_BYTES}")
            return stream.read(MAX_BYTES + 1)
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise BrokenPicture(getattr(error, "strerror", None) or str(error)) from error


def decode(data: bytes) -> Image.Image:
    """Decodes a picture to upright 8-bit RGB. Alpha is dropped, 16-bit grey is scaled.

    Raises:
        BrokenPicture: not a whole JPEG, PNG, WebP, TIFF or BMP, a side under 32 pixels, or over 100 megapixels.
    """
    return _decode(data, "RGB")


def decode_mask(data: bytes, size: tuple[int, int]) -> Image.Image:
    """Decodes a mask to an upright image, mode L, of `size` (width, height): 255 where it is 128 or more, else 0.

    Raises:
        BrokenPicture: as `decode`, or the mask has another size.
    """
    mask = _decode(data, "L")
    if mask.size != size:
        raise BrokenPicture(f"its mask is of {mask.width} x {mask.height} pixels, the picture of {size[0]} x {size[1]}")
    return mask.point([0] * 128 + [255] * 128)


def _decode(data: bytes, mode: str) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about odd metadata and about size, which is checked here
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if min(image.size) < MIN_SIDE or image.width * image.height > MAX_PIXELS:
                raise BrokenPicture(
                    f"{image.width} x {image.height} pixels: expected sides of {MIN_SIDE} or more "
                    f"and at most {MAX_PIXELS} pixels"
                )
            image.load()
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
            elif image.mode in ("I", "F", "LAB", "HSV"):
                raise BrokenPicture(f"mode {image.mode}: expected colours or grey of 8 or 16 bits")
            return image.convert(mode)
    except BrokenPicture:
        raise
    except Exception as error:  # decoders raise almost anything on bytes made to break them
        raise BrokenPicture(f"not a whole picture of {', '.join(FORMATS)} ({error or type(error).__name__})") from error


@dataclass(frozen=True)
class CropSettings:
    """How a square is cropped from a picture.

    Attributes:
        least: smallest side of the square, as a share of the picture's shorter side, in (0, 1].
        most: greatest, in [least, 1]. Both 1 with `shift` off give the middle of the whole picture.
        shift: whether the square lies anywhere or in the middle.
        flip: whether half of the squares are mirrored left to right.
    """

    least: float = 0.6
    most: float = 1.0
    shift: bool = True
    flip: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1:
            raise DataError(f"crops of least={self.least}, most={self.most}: expected 0 < least <= most <= 1")


PLAIN_CROP = CropSettings(1.0, 1.0, shift=False, flip=False)  # for evaluation


def crop(
    rng: Rng, image: Image.Image, mask: Image.Image | None, size: int, settings: CropSettings
) -> tuple[Image.Image, Mask | None]:
    """Crops a random square from a picture and its mask, and scales it to `size` pixels.

    Up to twenty squares are tried until one shows both masked and known pixels. A pixel of the scaled mask is set if
    any of its source pixels is.

    Raises:
        BrokenPicture: no square shows both.
    """
    for _ in range(_CROPS):
        box = _square(rng, image.size, settings)
        flip = settings.flip and rng.random() < 0.5
        masked = None
        if mask is not None:
            small = mask.resize((size, size), Image.Resampling.BOX, box)
            masked = np.asarray(ImageOps.mirror(small) if flip else small) > 0
            if not masked.any() or masked.all():
                continue
        picture = image.resize((size, size), Image.Resampling.LANCZOS, box, reducing_gap=3.0)
        return (ImageOps.mirror(picture) if flip else picture), masked
    raise BrokenPicture(f"its mask is empty or full in each of {_CROPS} crops")


def _square(rng: Rng, extent: tuple[int, int], settings: CropSettings) -> tuple[int, int, int, int]:
    """Left, upper, right, lower in pixels."""
    side = round(min(extent) * (settings.least + (settings.most - settings.least) * rng.random()))
    side = min(max(side, 1), *extent)
    room = extent[0] - side, extent[1] - side
    x, y = (int(rng.integers(space + 1)) for space in room) if settings.shift else (space // 2 for space in room)
    return x, y, x + side, y + side
