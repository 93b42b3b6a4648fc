"""Metadata of Pillow images in memory: what `Image.info` holds of it, read and given back.

Pillow keeps in `info` the text, gamma and primaries of a PNG, and Photoshop's resources with IPTC of a JPEG. It drops
the other colour chunks of a PNG (`cICP`, `mDCV`, `cLLI`) when it loads the pixels.
"""

from __future__ import annotations

import re
import struct
from typing import Any

from moebius_runtime.images.metadata import IPTC, Metadata, Parsed, international_text

Chunk = tuple[bytes, bytes]

# Entries of `info` that are text and no text of a PNG, with their sources.
_NOT_TEXT = {"compression"}  # TIFF
_KEYWORD = re.compile(r"[\x20-\x7e\xa1-\xff]{1,79}")  # W3C PNG, section 11.3.3.2
_FIXED_POINT = 100_000  # gAMA and cHRM hold values times this


def _chunks(info: dict[Any, Any]) -> list[Chunk]:
    """Text, `gAMA`, `cHRM` and `sRGB` as PNG chunks, (type, data)."""
    chunks = [
        _text_chunk(key, value)
        for key, value in info.items()
        if isinstance(value, str) and isinstance(key, str) and key not in _NOT_TEXT and _KEYWORD.fullmatch(key)
    ]
    if isinstance(intent := info.get("srgb"), int) and 0 <= intent <= 3:
        chunks.append((b"sRGB", bytes([intent])))
    if gamma := _fixed_points((info.get("gamma"),), 1):
        chunks.append((b"gAMA", gamma))
    if primaries := _fixed_points(info.get("chromaticity"), 8):
        chunks.append((b"cHRM", primaries))
    return chunks


def parsed_info(info: dict[Any, Any]) -> Parsed:
    """What an image's `info` holds of its file's chunks and resources."""
    return Parsed(tuple(_chunks(info)), _resources(info))


def _resources(info: dict[Any, Any]) -> dict[int, bytes]:
    """Photoshop's image resources, {number: data}, which Pillow reads from a JPEG."""
    found = info.get("photoshop")
    if not isinstance(found, dict):
        return {}
    return {
        code: data
        for code, data in found.items()
        if isinstance(code, int) and 0 <= code < 1 << 16 and isinstance(data, bytes)
    }


def as_info(metadata: Metadata) -> tuple[dict[str, Any], list[str]]:
    """Metadata as entries of a Pillow image's `info`, and the names of what it has no entry for.

    `picture_from_image` reads all entries back. Of Pillow's own writers each takes only a part of them.
    """
    info: dict[str, Any] = {
        name: value for name in ("dpi", "aspect", "xmp", "comment") if (value := getattr(metadata, name))
    }
    lost = list(metadata.dropped)
    resources = {**metadata.photoshop, **({IPTC: metadata.iptc} if metadata.iptc else {})}
    if resources:
        info["photoshop"] = resources
    for name, data in metadata.texts:
        keyword, text = data.split(b"\0", 1)[0].decode("latin-1"), _text_of(name, data)
        if text is None:
            lost.append(f"PNG text ({keyword[:40]})")
        else:
            info[keyword] = text
    for name, data in metadata.colour:
        if name == b"sRGB" and len(data) == 1:
            info["srgb"] = data[0]
        elif name == b"gAMA" and len(data) == 4:
            info["gamma"] = struct.unpack(">I", data)[0] / _FIXED_POINT
        elif name == b"cHRM" and len(data) == 32:
            info["chromaticity"] = tuple(value / _FIXED_POINT for value in struct.unpack(">8I", data))
        else:
            lost.append(f"colour space ({name.decode()})")
    return info, lost


def lost_in_pillow(metadata: Metadata) -> tuple[str, ...]:
    """A note on metadata that a Pillow image cannot hold, or nothing."""
    lost = as_info(metadata)[1]
    return (f"metadata that was not kept: {', '.join(dict.fromkeys(lost))}",) if lost else ()


def _text_chunk(keyword: str, text: str) -> Chunk:
    """A PNG's text as `tEXt` where Latin-1 holds it, else as `iTXt`, with the language that Pillow read."""
    start = keyword.encode("latin-1") + b"\0"
    language, translated = getattr(text, "lang", None), getattr(text, "tkey", None)
    if language is None:
        try:
            return b"tEXt", start + text.encode("latin-1")
        except UnicodeEncodeError:
            pass
    parts = (part.encode() if isinstance(part, str) else b"" for part in (language, translated))
    return b"iTXt", start + b"\0\0" + b"\0".join((*parts, text.encode("utf-8", "replace")))


def _text_of(name: bytes, data: bytes) -> str | None:
    """The text of a chunk without its keyword; None where it is damaged or too large."""
    if name == b"tEXt":
        return data.partition(b"\0")[2].decode("latin-1")
    packed = data
    if name == b"zTXt":  # keyword, compression method, text in Latin-1: as iTXt, but for flag, language and translation
        keyword, _, rest = data.partition(b"\0")
        packed = keyword + b"\0\1\0\0\0" + rest[1:]
    text = international_text(packed)
    return None if text is None else text.decode("latin-1" if name == b"zTXt" else "utf-8", "replace")


def _fixed_points(values: Any, count: int) -> bytes | None:
    """Values as the big-endian integers of a PNG's chunk; None where they are no `count` numbers in range."""
    try:
        numbers = [round(float(value) * _FIXED_POINT) for value in values]
        return struct.pack(f">{count}I", *numbers)
    except (TypeError, ValueError, OverflowError, struct.error):
        return None
