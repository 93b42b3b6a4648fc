"""Colour at 16 bits a channel, which Pillow can neither hold nor write: PNG and TIFF, read in two passes.

Pillow unpacks 16-bit colour to its high bytes. The name of the raw mode tells it the byte order, and with the
wrong order the same unpacker yields the low bytes: two decodings give all 16 bits.
"""

from __future__ import annotations

import re
import struct
import sys
import zlib
from collections.abc import Mapping
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, TiffImagePlugin, TiffTags

from moebius_runtime.metadata_blocks import png_chunk

_DEEP = re.compile(r"(RGBA|RGBX|RGB|CMYK);16([BLN])")
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_PNG_COLOUR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}
_STRIP_BYTES = 1 << 20


def raw_mode(image: Image.Image) -> str:
    """The raw mode that Pillow will unpack the picture from, such as "RGB;16B"; "" when there is none."""
    tiles: list[Any] = getattr(image, "tile", [])
    if not tiles:
        return ""
    args = tiles[0][3]
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def can_read(name: str) -> bool:
    """Whether `read` knows this raw mode's way of holding 16-bit colour."""
    return name == "LA;16B" or _DEEP.fullmatch(name) is not None


def read(
    image: Image.Image, name: str, stream: BinaryIO, formats: tuple[str, ...]
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint16] | None]:
    """All 16 bits of a picture opened from `stream`, of raw mode `name`, not yet loaded.

    Returns pixels uint16 [H, W, C] and alpha uint16 [H, W] or None; TIFF comes turned upright (by Pillow),
    PNG as it lies.
    """
    if name == "LA;16B":
        # Four bytes a pixel, unpacked as they lie: grey high, grey low, alpha high, alpha low.
        _unpack_as(image, "RGBA")
        deep = np.asarray(image).view(">u2").astype(np.uint16)  # [H, W, 4] bytes -> [H, W, 2]
    else:
        deep = np.asarray(image).astype(np.uint16)  # [H, W, C (+ alpha)]
        deep <<= 8
        stream.seek(0)
        again = Image.open(stream, formats=formats)  # not closed: the stream is the caller's
        _unpack_as(again, name[:-1] + _OTHER_ORDER[name[-1]])
        deep |= np.asarray(again)
    if image.mode == "RGBA":
        return deep[:, :, :-1], deep[:, :, -1]
    return deep, alpha_from_key(deep, image)


def alpha_from_key(pixels: npt.NDArray[np.uint16], image: Image.Image) -> npt.NDArray[np.uint16] | None:
    """Alpha [H, W] of a 16-bit PNG in which one colour means "transparent" (chunk tRNS), or None."""
    key = image.info.get("transparency")
    if key is None:
        return None
    return np.where((pixels == np.asarray(key)).all(axis=2), 0, 65535).astype(np.uint16)


def _unpack_as(image: Image.Image, name: str) -> None:
    tiles: list[Any] = getattr(image, "tile", [])
    image.tile = [  # type: ignore[attr-defined]
        tile._replace(args=(name, *tile.args[1:]) if isinstance(tile.args, tuple) else name) for tile in tiles
    ]


def png_bytes(pixels: npt.NDArray[np.uint16], icc_profile: bytes | None, exif: bytes | None) -> bytes:
    """A 16-bit PNG of uint16 [H, W, C]: 1 grey, 2 with alpha, 3 RGB, 4 RGBA (W3C PNG, sections 5-11)."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, _PNG_COLOUR_TYPE[channels], 0, 0, 0)
    parts = [b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", header)]
    if icc_profile:
        parts.append(png_chunk(b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc_profile)))
    if exif:
        parts.append(png_chunk(b"eXIf", exif))
    packer = zlib.compressobj()
    step = _rows_per_strip(pixels)
    for start in range(0, height, step):
        rows = pixels[start : start + step].astype(">u2")
        line = rows.reshape(len(rows), -1).view(np.uint8)  # [n, W, C] -> [n, W * C * 2] bytes
        filtered = np.empty((len(rows), 1 + line.shape[1]), np.uint8)
        filtered[:, 0] = 1  # filter "Sub": each byte minus that of the pixel to its left
        filtered[:, 1:] = line
        filtered[:, 1 + 2 * channels :] -= line[:, : -2 * channels]
        if data := packer.compress(filtered.tobytes()):
            parts.append(png_chunk(b"IDAT", data))
    return b"".join([*parts, png_chunk(b"IDAT", packer.flush()), png_chunk(b"IEND", b"")])


def tiff_bytes(
    pixels: npt.NDArray[np.uint16],
    icc_profile: bytes | None,
    own_tags: Mapping[int, Any],
    *,
    cmyk: bool,
) -> bytes:
    """A 16-bit TIFF of uint16 [H, W, C]: 1 grey, 3 RGB, 4 RGBA or CMYK (TIFF 6.0; deflate, predictor 2)."""
    height, width, channels = pixels.shape
    step = _rows_per_strip(pixels)
    strips = []
    for start in range(0, height, step):
        rows = pixels[start : start + step].astype("<u2")
        rows[:, 1:] -= pixels[start : start + step, :-1]
        strips.append(zlib.compress(rows.tobytes()))
    sizes = [len(strip) for strip in strips]
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in own_tags.items():
        tags[tag] = value
    tags[TiffImagePlugin.IMAGEWIDTH] = width
    tags[TiffImagePlugin.IMAGELENGTH] = height
    tags[TiffImagePlugin.BITSPERSAMPLE] = (16,) * channels
    tags[TiffImagePlugin.COMPRESSION] = 8
    tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 5 if cmyk else 2 if channels > 1 else 1
    tags[TiffImagePlugin.SAMPLESPERPIXEL] = channels
    tags[TiffImagePlugin.ROWSPERSTRIP] = step
    tags[TiffImagePlugin.STRIPBYTECOUNTS] = tuple(sizes)
    # Counted from the end of the directory: Pillow's writer adds its place.
    tags[TiffImagePlugin.STRIPOFFSETS] = tuple(sum(sizes[:index]) for index in range(len(sizes)))
    for tag in (TiffImagePlugin.STRIPBYTECOUNTS, TiffImagePlugin.STRIPOFFSETS):
        tags.tagtype[tag] = TiffTags.LONG
    tags[TiffImagePlugin.PREDICTOR] = 2
    if channels == 4 and not cmyk:
        tags[TiffImagePlugin.EXTRASAMPLES] = 2  # unassociated alpha
    if icc_profile:
        tags[TiffImagePlugin.ICCPROFILE] = icc_profile
    file = BytesIO()
    tags.save(file)
    file.writelines(strips)
    return file.getvalue()


def _rows_per_strip(pixels: npt.NDArray[np.uint16]) -> int:
    return max(1, int(_STRIP_BYTES // pixels[0].nbytes))
