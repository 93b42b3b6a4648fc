"""What a picture file says beside its pixels, profile and EXIF: resolution, XMP, IPTC, comments, PNG text and colour.

It is read from every format, kept where the format that is written has a place for it, and named where it has none.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

from moebius_runtime.metadata_blocks import (
    MAX_BYTES,
    packed_resources,
    photoshop_resources,
    png_chunk,
    png_chunks,
    upright_xmp,
)

_XMP_KEYWORD = b"XML:com.adobe.xmp"
_COMMENT_KEYWORD = b"Comment"  # PNG's keyword for what JPEG and GIF call a comment
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
_COLOUR = (b"cICP", b"mDCV", b"mDCv", b"cLLI", b"cLLi", b"sRGB", b"gAMA", b"cHRM")
# Read elsewhere, part of the coding, or untrue of a changed picture.
_UNSAID = {b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"iCCP", b"eXIf", b"pHYs", b"tIME"}
_UNSAID |= {b"acTL", b"fcTL", b"fdAT", b"bKGD", b"hIST", b"sBIT", b"sPLT"}
_SRGB_CHROMA = struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
_IPTC, _THUMBNAILS = 0x0404, {0x0409, 0x040C}  # Photoshop's resources, of which the others are kept as they are
_ELSEWHERE = {0x040F, 0x0422, 0x0424}  # ICC profile, EXIF and XMP: their own segments count
_TIFF_XMP, _TIFF_IPTC, _TIFF_PHOTOSHOP, _TIFF_LAYERS = 700, 33723, 34377, 37724
_MAX_JPEG = 65_533  # bytes of a segment, less its length field
_INCH = 0.0254  # metres


@dataclass(frozen=True)
class Metadata:
    """Blocks of metadata, valid for the upright picture, without pictures of what it showed before.

    Attributes:
        dpi: pixels an inch, horizontally and vertically.
        aspect: a pixel's (x, y) density without unit, where no `dpi` is known and the two differ.
        xmp: the XMP packet, UTF-8.
        iptc: the IPTC-IIM records.
        photoshop: other image resources of Photoshop, {number: data}.
        comment: the comment of a JPEG or GIF.
        texts: PNG text chunks, (type, data) as they are in the file.
        colour: PNG chunks that say what the numbers mean, (type, data).
        dropped: what was read and could not be kept.
    """

    dpi: tuple[float, float] | None = None
    aspect: tuple[int, int] | None = None
    xmp: bytes | None = None
    iptc: bytes | None = None
    photoshop: dict[int, bytes] = field(default_factory=dict)
    comment: bytes | None = None
    texts: tuple[tuple[bytes, bytes], ...] = ()
    colour: tuple[tuple[bytes, bytes], ...] = ()
    dropped: tuple[str, ...] = ()

    def turned(self) -> Metadata:
        """For a picture whose sides are exchanged."""
        return replace(
            self,
            dpi=self.dpi and (self.dpi[1], self.dpi[0]),
            aspect=self.aspect and (self.aspect[1], self.aspect[0]),
        )


def read_metadata(image: Any, stream: BinaryIO | None) -> Metadata:
    """The metadata of a Pillow image.

    Args:
        image: as it was opened; loading may have taken things out of its `info`, so it is asked before.
        stream: its file, whose position is put back; None for an image in memory.
    """
    dropped: list[str] = []
    info, tags = image.info, getattr(image, "tag_v2", {})
    chunks: list[tuple[bytes, bytes]] = []
    if stream is not None and image.format == "PNG":
        chunks = _bounded(png_chunks(stream), dropped)
    texts, xmp = _texts(chunks, dropped)
    resources = photoshop_resources(_photoshop_block(image, tags))
    if _THUMBNAILS & resources.keys():
        dropped.append("the old Photoshop thumbnail")
    if tags.get(_TIFF_LAYERS):
        dropped.append("Photoshop layers")
    if any(data.startswith(b"http://ns.adobe.com/xmp/extension/") for _, data in getattr(image, "applist", ())):
        dropped.append("extended XMP")
    found = xmp or _as_bytes(info.get("xmp")) or _as_bytes(tags.get(_TIFF_XMP))
    if found:
        xmp, notes = upright_xmp(found)
        dropped += notes
    comment = _as_bytes(info.get("comment"))
    iptc = _as_bytes(tags.get(_TIFF_IPTC)) or resources.get(_IPTC)
    if unknown := sorted(
        {name.decode("latin-1") for name, _ in chunks} - {name.decode() for name in (*_TEXT, *_COLOUR, *_UNSAID)}
    ):
        dropped.append(f"PNG chunks {', '.join(unknown)}")
    return Metadata(
        dpi=_density(info.get("dpi"), 1e-2, 1e6),
        aspect=_aspect(info),
        xmp=xmp,
        iptc=iptc,
        photoshop={
            code: data for code, data in resources.items() if code not in _THUMBNAILS | _ELSEWHERE and code != _IPTC
        },
        comment=comment,
        texts=tuple(texts),
        colour=tuple(entry for entry in chunks if entry[0] in _COLOUR),
        dropped=tuple(dropped),
    )


def _bounded(chunks: Iterator[tuple[bytes, bytes | None]], dropped: list[str]) -> list[tuple[bytes, bytes]]:
    """Chunks of at most `MAX_BYTES` in all."""
    found, room = [], MAX_BYTES
    for name, data in chunks:
        if data is None or len(data) > room:
            dropped.append(f"a {name.decode('latin-1')} chunk that is too large")
            continue
        room -= len(data)
        found.append((name, data))
    return found


def _texts(chunks: list[tuple[bytes, bytes]], dropped: list[str]) -> tuple[list[tuple[bytes, bytes]], bytes | None]:
    """The text chunks to carry on, and the XMP packet, which is one of them in the file."""
    texts, xmp = [], None
    for name, data in chunks:
        keyword = data.split(b"\0", 1)[0]
        if name not in _TEXT or keyword == b"Raw profile type exif" or keyword == b"Raw profile type APP1":
            continue  # ImageMagick's way to keep EXIF, which is read as such
        if keyword == _XMP_KEYWORD:
            xmp = _international_text(data)
            if xmp is None:
                dropped.append("XMP that is damaged or too large")
        elif keyword.startswith(b"Raw profile type ") and keyword != b"Raw profile type iptc":
            dropped.append(_shown(keyword))  # it may hold a thumbnail or an orientation
        else:
            texts.append((name, data))
    return texts, xmp


def _international_text(data: bytes) -> bytes | None:
    """The text of an iTXt chunk, at most `MAX_BYTES` long (W3C PNG, section 11.3.3.4)."""
    _keyword, _, rest = data.partition(b"\0")
    parts = rest[2:].split(b"\0", 2)  # after compression flag and method: language, translated keyword, text
    if len(parts) != 3:
        return None
    if rest[:1] != b"\x01":
        return parts[2]
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(parts[2], MAX_BYTES)
    except zlib.error:
        return None
    return text if unpacker.eof else None


def _photoshop_block(image: Any, tags: Any) -> bytes:
    start = b"Photoshop 3.0\0"
    segments = [data[len(start) :] for _, data in getattr(image, "applist", ()) if data.startswith(start)]
    return b"".join(segments) or _as_bytes(tags.get(_TIFF_PHOTOSHOP)) or b""


def _as_bytes(value: Any) -> bytes | None:
    if isinstance(value, tuple) and len(value) == 1:
        value = value[0]
    elif isinstance(value, tuple) and all(isinstance(item, int) and 0 <= item < 256 for item in value):
        value = bytes(value)  # a TIFF may have them as a list of bytes
    if isinstance(value, str):
        value = value.encode()
    return value if isinstance(value, bytes) and 0 < len(value) <= MAX_BYTES else None


def _density(value: Any, least: float, most: float) -> tuple[float, float] | None:
    try:
        x, y = (float(part) for part in value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return (x, y) if all(math.isfinite(part) and least <= part <= most for part in (x, y)) else None


def _aspect(info: dict[str, Any]) -> tuple[int, int] | None:
    value = info.get("aspect") or (info.get("jfif_density") if info.get("jfif_unit") == 0 else None)
    found = _density(value, 1, 65_535)
    return (int(found[0]), int(found[1])) if found and found[0] != found[1] else None


# --- writing ------------------------------------------------------------------------------------------------


def fit(metadata: Metadata, name: str) -> tuple[Metadata, list[str]]:
    """What of the metadata a format holds, and what it does not, in words.

    Args:
        metadata: of the picture to write.
        name: PNG, JPEG, TIFF, WEBP or AVIF.
    """
    kept, lost = metadata, list(metadata.dropped)
    if name == "JPEG":
        if kept.xmp and len(kept.xmp) > _MAX_JPEG - 29:
            kept = replace(kept, xmp=None)
            lost.append("XMP (longer than JPEG allows)")
        kept, comment = replace(kept, comment=_comment(kept)), _comment(kept)
        if comment and len(comment) > _MAX_JPEG:
            kept = replace(kept, comment=None)
            lost.append("comment (longer than JPEG allows)")
        if len(resources_of(kept)) > _MAX_JPEG - 14:
            kept = replace(kept, iptc=None, photoshop={})
            lost.append("IPTC and Photoshop data (longer than JPEG allows)")
        if kept.dpi and max(kept.dpi) > 65_535:
            kept = replace(kept, dpi=None)
            lost.append("resolution (higher than JPEG allows)")
    elif name == "PNG":
        if kept.comment and not _comment_text(kept):
            if b"\0" in kept.comment:
                lost.append("comment")
            else:
                kept = replace(kept, texts=(*kept.texts, (b"tEXt", _COMMENT_KEYWORD + b"\0" + kept.comment)))
    elif kept.comment:
        lost.append("comment")
    if name not in ("JPEG", "TIFF"):
        lost += ["IPTC"] * bool(kept.iptc) + ["Photoshop data"] * bool(kept.photoshop)
    if name not in ("JPEG", "PNG") and kept.aspect:
        lost.append("pixel aspect ratio")
    if name != "PNG":
        texts = [entry for entry in kept.texts if not (name == "JPEG" and entry == _comment_text(kept))]
        if texts:
            keywords = dict.fromkeys(_shown(data.split(b"\0", 1)[0]) for _, data in texts)
            lost.append(f"PNG text ({', '.join([*keywords][:5])}{', ...' * (len(keywords) > 5)})")
        if colour := _special_colour(kept):
            lost.append(f"colour space ({', '.join(colour)}), so that it may look different")
    return kept, lost


def _comment_text(metadata: Metadata) -> tuple[bytes, bytes] | None:
    plain = _COMMENT_KEYWORD + b"\0"
    return next((entry for entry in metadata.texts if entry[0] == b"tEXt" and entry[1].startswith(plain)), None)


def _comment(metadata: Metadata) -> bytes | None:
    entry = _comment_text(metadata)
    return metadata.comment or (entry[1].split(b"\0", 1)[1] if entry else None)


def _special_colour(metadata: Metadata) -> list[str]:
    """The colour chunks of a PNG whose colours are not sRGB, which other formats take them for."""
    chunks = dict(metadata.colour)
    if b"cICP" not in chunks:
        gamma = chunks.get(b"gAMA", struct.pack(">I", 45455))
        usual = b"sRGB" in chunks or (len(gamma) == 4 and abs(struct.unpack(">I", gamma)[0] - 45455) < 100)
        if usual and chunks.get(b"cHRM", _SRGB_CHROMA) == _SRGB_CHROMA:
            return []
    return [name.decode() for name in chunks if name != b"sRGB"]


def png_head(metadata: Metadata) -> bytes:
    """The chunks of a PNG that come right after its header."""
    parts = [png_chunk(name, data) for name, data in metadata.colour]
    if metadata.dpi:
        parts.append(png_chunk(b"pHYs", struct.pack(">IIB", *(round(value / _INCH) for value in metadata.dpi), 1)))
    elif metadata.aspect:
        parts.append(png_chunk(b"pHYs", struct.pack(">IIB", *metadata.aspect, 0)))
    if metadata.xmp:
        parts.append(png_chunk(b"iTXt", _XMP_KEYWORD + b"\0\0\0\0\0" + metadata.xmp))
    parts += [png_chunk(name, data) for name, data in metadata.texts]
    return b"".join(parts)


def resources_of(metadata: Metadata) -> bytes:
    """IPTC and the other image resources, as Photoshop's block."""
    own = {_IPTC: metadata.iptc} if metadata.iptc else {}
    return packed_resources({**own, **metadata.photoshop})


def jpeg_options(metadata: Metadata) -> dict[str, Any]:
    """Options of Pillow's JPEG writer."""
    options: dict[str, Any] = {"comment": metadata.comment}
    if metadata.dpi:
        options["dpi"] = tuple(max(1, round(value)) for value in metadata.dpi)
    if metadata.xmp:
        options["xmp"] = metadata.xmp
    if block := resources_of(metadata):
        data = b"Photoshop 3.0\0" + block
        options["extra"] = b"\xff\xed" + struct.pack(">H", len(data) + 2) + data
    return options


def jpeg_with_aspect(data: bytes, aspect: tuple[int, int]) -> bytes:
    """A JPEG file whose JFIF header has a pixel's aspect in place of a resolution (JFIF 1.02, page 5)."""
    if data[6:11] != b"JFIF\0":
        return data
    return data[:13] + struct.pack(">BHH", 0, *aspect) + data[18:]


def tiff_tags(metadata: Metadata) -> dict[int, Any]:
    """Tags of a TIFF's first directory, {number: value}; bytes are of type BYTE, or UNDEFINED for IPTC."""
    tags: dict[int, Any] = {}
    if metadata.dpi:
        tags |= {282: metadata.dpi[0], 283: metadata.dpi[1], 296: 2}
    if metadata.xmp:
        tags[_TIFF_XMP] = metadata.xmp
    if metadata.iptc:
        tags[_TIFF_IPTC] = metadata.iptc
    if metadata.photoshop:
        tags[_TIFF_PHOTOSHOP] = packed_resources(metadata.photoshop)
    return tags


def _shown(keyword: bytes) -> str:
    return keyword[:40].decode("latin-1")
