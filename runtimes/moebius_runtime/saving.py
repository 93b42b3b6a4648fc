"""Pictures written whole or not at all, with what each format holds of their metadata."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, TiffTags, features

from moebius_runtime import deep_colour
from moebius_runtime import metadata as blocks
from moebius_runtime.errors import InputError, OutputError
from moebius_runtime.exif import describing_exif, exif_bytes
from moebius_runtime.files import atomic_write

if TYPE_CHECKING:
    from moebius_runtime.pictures import Picture

OUTPUT_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
} | ({".avif": "AVIF"} if features.check_module("avif") else {})
_LONGEST_SIDE = {"JPEG": 65_535, "WEBP": 16_383, "AVIF": 65_535}  # what the formats' size fields hold
_MAX_JPEG_EXIF = 65_533 - 6  # a marker's length field, less the length itself and "Exif\0\0"
_PNG_HEAD = 33  # bytes of signature and header chunk


def check_can_save(picture: Picture, path: str | Path) -> str:
    """The format that a path's suffix names, if it can hold the picture; to be asked before the work begins.

    Raises:
        InputError: an unknown suffix, or a format that would lose alpha, CMYK, 16 bits or size.
    """
    suffix = Path(path).suffix.lower()
    name = OUTPUT_FORMATS.get(suffix)
    if name is None:
        known = ", ".join(OUTPUT_FORMATS)
        raise InputError(f"cannot write {path}: unknown suffix '{suffix}'; expected one of {known}.")
    height, width = picture.shape
    deep, alpha = picture.bits == 16, picture.alpha is not None
    refusal = None
    if max(height, width) > _LONGEST_SIDE.get(name, 2**31 - 1):
        refusal = f"{name} cannot hold {width}x{height} pixels. Choose .png or .tif"
    elif picture.mode == "CMYK" and name in ("PNG", "WEBP", "AVIF"):
        refusal = f"{name} cannot hold CMYK. Choose {'.tif' if deep else '.tif or .jpg'}"
    elif deep and name in ("JPEG", "WEBP", "AVIF"):
        refusal = f"{name} cannot hold 16 bits a channel. Choose {'.tif' if picture.mode == 'CMYK' else '.png'}"
    elif alpha and name == "JPEG":
        refusal = "JPEG cannot hold alpha. Choose .png, .webp or .tif"
    elif alpha and deep and picture.mode == "L" and name == "TIFF":
        refusal = "16-bit grey with alpha is not written as TIFF. Choose .png"
    if refusal:
        raise InputError(f"cannot write {path}: {refusal}.")
    return name


def save_picture(picture: Picture, path: str | Path, quality: int = 95) -> tuple[str, ...]:
    """Writes a picture whole or not at all, as its suffix says; returns a note on metadata that was dropped, if any.

    A link at `path` is followed. Formats and errors as `picture_bytes`.

    Raises:
        OutputError: the file could not be written.
    """
    data, notes = picture_bytes(picture, path, quality)
    with atomic_write(path, follow_links=True) as stream:
        stream.write(data)
    return notes


def picture_bytes(picture: Picture, path: str | Path, quality: int = 95) -> tuple[bytes, tuple[str, ...]]:
    """The file that `path`'s suffix asks for, and a note on metadata that was dropped, if any.

    PNG, TIFF (deflate) and WebP (always its lossless kind) keep every pixel; JPEG and AVIF are 4:4:4 at `quality`.

    Raises:
        InputError: as `check_can_save`, or a quality outside 1..100.
        OutputError: the picture could not be encoded.
    """
    name = check_can_save(picture, path)
    if not 1 <= quality <= 100:
        raise InputError(f"the JPEG quality is {quality}; expected 1 to 100.")
    kept, lost = blocks.fit(picture.metadata, name)
    picture = replace(picture, metadata=kept)
    if name == "JPEG" and picture.exif and len(picture.exif) > _MAX_JPEG_EXIF:
        picture = replace(picture, exif=None)
        lost.append("the EXIF block (longer than JPEG allows)")
    tags: dict[int, Any] = {}
    if name == "TIFF":
        # A TIFF holds EXIF as tags of its own: what cannot be read as such cannot be carried.
        try:
            tags = _tiff_tags(picture)
        except Exception as error:
            picture = replace(picture, exif=None)
            lost.append(f"the EXIF block (damaged: {type(error).__name__})")
            tags = _tiff_tags(picture)
    elif name == "JPEG" and picture.mode == "CMYK" and kept.aspect:  # which has no JFIF header
        lost.append("pixel aspect ratio")
    elif kept.dpi and (name in ("WEBP", "AVIF") or (name == "JPEG" and picture.mode == "CMYK")):  # no field of its own
        if not picture.exif:
            picture = replace(picture, exif=_resolution_exif(kept.dpi))
        elif ExifTags.Base.XResolution not in _loaded(picture.exif):
            lost.append("resolution")
    try:
        data = _encode(picture, name, quality, tags)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OutputError(f"cannot write {path}: {name} encoding failed ({reason}).") from error
    return data, (f"metadata that was not kept: {', '.join(dict.fromkeys(lost))}",) if lost else ()


def _encode(picture: Picture, name: str, quality: int, tags: Mapping[int, Any]) -> bytes:
    kept = picture.metadata
    if picture.bits == 16:
        deep = picture.pixels
        if picture.alpha is not None:
            deep = np.concatenate([deep, picture.alpha[:, :, None]], axis=2)
        if name == "PNG":
            return _with_head(deep_colour.png_bytes(deep, picture.icc_profile, picture.exif), kept)
        return deep_colour.tiff_bytes(deep, picture.icc_profile, tags, cmyk=picture.mode == "CMYK")
    options: dict[str, Any] = {}
    if name == "JPEG":
        options = {"quality": quality, "subsampling": 0, **blocks.jpeg_options(kept)}
    elif name == "AVIF":
        options = {"quality": quality, "subsampling": "4:4:4", "xmp": kept.xmp or b""}
    elif name == "WEBP":
        # exact: colours under transparent pixels too
        options = {"lossless": True, "exact": True, "xmp": kept.xmp or b""}
    elif name == "TIFF":
        options = {"compression": "tiff_adobe_deflate", "tiffinfo": _directory(tags)}
    if picture.exif and name != "TIFF":
        options["exif"] = b"Exif\0\0" + picture.exif
    buffer = io.BytesIO()
    bare = replace(picture, exif=None, metadata=blocks.Metadata())
    bare.to_image().save(buffer, name, icc_profile=picture.icc_profile, **options)
    data = buffer.getvalue()
    if name == "JPEG" and kept.aspect and not kept.dpi:
        return blocks.jpeg_with_aspect(data, kept.aspect)
    return _with_head(data, kept) if name == "PNG" else data


def _with_head(data: bytes, kept: blocks.Metadata) -> bytes:
    head = blocks.png_head(kept)
    return data[:_PNG_HEAD] + head + data[_PNG_HEAD:] if head else data


def _tiff_tags(picture: Picture) -> dict[int, Any]:
    """The tags of a TIFF's first directory about the picture, not its file; raises where they cannot be written."""
    tags: dict[int, Any] = {}
    if picture.exif:
        described = describing_exif(_loaded(picture.exif))
        described.tobytes()
        tags |= dict(described)
    tags |= blocks.tiff_tags(picture.metadata)
    return tags


def _directory(tags: Mapping[int, Any]) -> TiffImagePlugin.ImageFileDirectory_v2:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        directory[tag] = value
        if isinstance(value, bytes):
            directory.tagtype[tag] = TiffTags.UNDEFINED if tag == 33723 else TiffTags.BYTE
    return directory


def _resolution_exif(dpi: tuple[float, float]) -> bytes | None:
    found = Image.Exif()
    found[ExifTags.Base.XResolution], found[ExifTags.Base.YResolution] = dpi
    found[ExifTags.Base.ResolutionUnit] = 2  # inches
    return exif_bytes(found)


def _loaded(block: bytes) -> Image.Exif:
    source = Image.Exif()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damaged entries, which are left out
        source.load(block)
        return source
