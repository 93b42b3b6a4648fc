"""EXIF blocks, as bytes: the orientation read and set to upright, the old thumbnail taken out."""

from __future__ import annotations

import struct

from PIL import ExifTags, Image

_PREFIX = b"Exif\0\0"
_THUMBNAIL_START, _THUMBNAIL_LENGTH = 0x0201, 0x0202
# Tags that say something about the photograph. The rest of a TIFF's first directory says how its file is laid
# out, and would break another file that it is copied into.
_DESCRIBING = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.XResolution,
    ExifTags.Base.YResolution,
    ExifTags.Base.ResolutionUnit,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.HostComputer,
    ExifTags.Base.Copyright,
)


def upright_exif(block: bytes) -> tuple[bytes, int]:
    """An EXIF block with orientation 1 and without its thumbnail, and the orientation that it had (1 to 8).

    All other bytes stay as they are, so that maker notes, which hold offsets, survive. The thumbnail goes
    because it shows the picture before inpainting.

    Raises:
        ValueError: the block is damaged.
    """
    data = bytearray(block.removeprefix(_PREFIX))
    order = {b"II": "<", b"MM": ">"}.get(bytes(data[:2]))
    if order is None:
        raise ValueError("no TIFF header")
    try:
        entries, following = _directory(data, order, struct.unpack_from(f"{order}I", data, 4)[0])
        orientation = 1
        if ExifTags.Base.Orientation in entries:
            position, kind = entries[ExifTags.Base.Orientation]
            form = f"{order}I" if kind == 4 else f"{order}H"
            (orientation,) = struct.unpack_from(form, data, position)
            struct.pack_into(form, data, position, 1)
        (thumbnail,) = struct.unpack_from(f"{order}I", data, following)
        if thumbnail:
            inner, _ = _directory(data, order, thumbnail)
            if _THUMBNAIL_START in inner and _THUMBNAIL_LENGTH in inner:
                (start,) = struct.unpack_from(f"{order}I", data, inner[_THUMBNAIL_START][0])
                (length,) = struct.unpack_from(f"{order}I", data, inner[_THUMBNAIL_LENGTH][0])
                kept = data[start : start + length]
                data[start : start + length] = bytes(len(kept))
            struct.pack_into(f"{order}I", data, following, 0)
    except struct.error as error:
        raise ValueError("an entry lies beyond its end") from error
    return bytes(data), orientation if 1 <= orientation <= 8 else 1


def _directory(data: bytearray, order: str, start: int) -> tuple[dict[int, tuple[int, int]], int]:
    """Where a TIFF directory keeps each value, {tag: (position, type)}, and where it names the next one."""
    (count,) = struct.unpack_from(f"{order}H", data, start)
    entries = {}
    for place in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind = struct.unpack_from(f"{order}HH", data, place)
        entries[tag] = (place + 8, kind)
    return entries, start + 2 + 12 * count


def describing_exif(exif: Image.Exif) -> Image.Exif:
    """The tags that describe the photograph: camera, author, time, resolution; EXIF and GPS directories."""
    kept = Image.Exif()
    for tag in _DESCRIBING:
        if tag in exif:
            kept[tag] = exif[tag]
    for group in (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo):
        directory = dict(exif.get_ifd(group))
        if directory:
            kept[group] = directory
    return kept


def exif_bytes(exif: Image.Exif) -> bytes | None:
    """The block of an `Image.Exif` without its prefix, or None when it holds nothing."""
    return exif.tobytes().removeprefix(_PREFIX) if len(exif) else None
