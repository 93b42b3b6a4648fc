"""What a file says beside its pixels: every kind in every format is kept, or named in one note."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from moebius_runtime.metadata_blocks import (
    MAX_BYTES,
    packed_resources,
    photoshop_resources,
    png_chunk,
    png_chunks,
    upright_xmp,
)
from moebius_runtime.pictures import NamedBytes, load_picture, picture_bytes

XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" dc:title="a"/></rdf:RDF></x:xmpmeta>'
)
IPTC = b"\x1c\x02\x50\0\x03Ann"
RESOURCES = packed_resources({0x0404: IPTC, 0x040A: b"\x01", 0x040C: b"old thumbnail!", 0x0409: b"older"})
AVIF = pytest.param("avif", marks=pytest.mark.skipif(not features.check_module("avif"), reason="no AVIF here"))
TARGETS = ["png", "jpg", "tif", "webp", AVIF]


def pixels() -> np.ndarray:
    return np.random.RandomState(0).randint(90, 160, (64, 72, 3)).astype(np.uint8)


def encoded(form: str, **more: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels()).save(buffer, form, **more)
    return buffer.getvalue()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    data = encoded("PNG")
    return data[:33] + b"".join(png_chunk(*chunk) for chunk in chunks) + data[33:]


def international(keyword: bytes, text: bytes, packed: bool = False) -> tuple[bytes, bytes]:
    return b"iTXt", keyword + b"\0" + (b"\1\0" if packed else b"\0\0") + b"\0\0" + (
        zlib.compress(text) if packed else text
    )


def segment(data: bytes) -> bytes:
    return b"\xff\xed" + struct.pack(">H", len(data) + 2) + data


def full(form: str) -> bytes:
    """A file of a format with everything that it can say."""
    if form == "png":
        return png(
            (b"gAMA", struct.pack(">I", 100000)),
            (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)),
            (b"pHYs", struct.pack(">IIB", 11811, 5906, 1)),
            (b"tEXt", b"parameters\0a cat, Seed: 1"),
            (b"tEXt", b"Comment\0roll 7"),
            international(b"XML:com.adobe.xmp", XMP, packed=True),
        )
    if form == "jpg":
        extra = segment(b"Photoshop 3.0\0" + RESOURCES)
        return encoded("JPEG", dpi=(300, 150), xmp=XMP, comment=b"roll 7", extra=extra)
    if form == "tif":
        return encoded("TIFF", dpi=(300, 150), tiffinfo={700: XMP, 33723: IPTC, 34377: RESOURCES})
    if form == "webp":
        return encoded("WEBP", xmp=XMP, lossless=True)
    if form == "bmp":
        return encoded("BMP", dpi=(300, 150))
    return encoded("AVIF", xmp=XMP)


def said(data: bytes) -> dict[str, object]:
    """What a file says, by Pillow."""
    with Image.open(io.BytesIO(data)) as image:
        tags, info = getattr(image, "tag_v2", {}), image.info
        blocks = dict(getattr(image, "applist", []))
        resources = photoshop_resources(blocks.get("APP13", b"")[14:] or tags.get(34377, b""))
        dpi = info.get("dpi") or [image.getexif().get(tag, 0) for tag in (282, 283)]
        image.load()
        texts = dict(getattr(image, "text", {}))
    texts.pop("XML:com.adobe.xmp", None)
    names = [name for name, _ in png_chunks(io.BytesIO(data))] if data[1:4] == b"PNG" else []
    found = {
        "resolution": tuple(round(float(value)) for value in dpi) == (300, 150),
        "XMP": (info.get("xmp") or tags.get(700)) == XMP,
        "IPTC": (resources.get(0x0404) or tags.get(33723)) == IPTC,
        "Photoshop data": resources.get(0x040A) == b"\x01",
        "comment": info.get("comment") == b"roll 7" or texts.get("Comment") == "roll 7",
        "PNG text": "parameters" in texts,
        "colour space": b"gAMA" in names and b"cHRM" in names,
    }
    assert not {0x0409, 0x040C} & resources.keys()  # they show what was removed
    return {kind for kind, there in found.items() if there}


KINDS = {"resolution", "XMP", "IPTC", "Photoshop data", "comment", "PNG text", "colour space"}
HOLDS = {  # docs/pictures.md has this table
    "png": KINDS - {"IPTC", "Photoshop data"},
    "jpg": KINDS - {"PNG text", "colour space"},
    "tif": {"resolution", "XMP", "IPTC", "Photoshop data"},
    "webp": {"resolution", "XMP"},
    "avif": {"resolution", "XMP"},
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", [*TARGETS, "bmp"])
def test_every_kind_is_kept_or_named(source, target):
    before = full(source)
    has = {
        "png": KINDS - {"IPTC", "Photoshop data"},
        "jpg": KINDS - {"PNG text", "colour space"},
        "tif": HOLDS["tif"],
        "bmp": {"resolution"},
    }.get(source, {"XMP"})
    picture = load_picture(NamedBytes("a", before))
    data, notes = picture_bytes(picture, f"b.{target}")
    assert said(data) == has & HOLDS[target]
    for kind in has - HOLDS[target]:
        assert kind.lower() in notes[0].lower()  # "comment" as a keyword of PNG text
    for kind in has & HOLDS[target]:
        assert not notes or kind not in notes[0]
    assert len(notes) <= 1
    if source in ("jpg", "tif"):
        assert "the old Photoshop thumbnail" in notes[0]
        assert b"old thumbnail!" not in data
    again, _ = picture_bytes(load_picture(NamedBytes("b", data)), f"c.{target}")
    assert said(again) == said(data)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_too(suffix):
    picture = load_picture(NamedBytes("a", full("tif")))
    deep = type(picture)(picture.pixels.astype(np.uint16) * 257, "RGB", metadata=picture.metadata)
    data, _ = picture_bytes(deep, f"a.{suffix}")
    assert said(data) == {"png": {"resolution", "XMP"}, "tif": HOLDS["tif"]}[suffix]
    assert np.array_equal(load_picture(NamedBytes("b", data)).pixels, deep.pixels)


@pytest.mark.parametrize("name", [b"cICP", b"mDCV", b"cLLI", b"sRGB", b"gAMA", b"cHRM"])
def test_colour_chunks_of_a_png(name):
    content = {b"cICP": bytes([9, 16, 0, 1]), b"sRGB": b"\1", b"gAMA": struct.pack(">I", 45455)}
    content |= {b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)}
    data = content.get(name, b"\0" * 24)
    picture = load_picture(NamedBytes("a", png((name, data))))
    written, notes = picture_bytes(picture, "b.png")
    assert (name, data) in list(png_chunks(io.BytesIO(written)))
    assert notes == ()
    _, notes = picture_bytes(picture, "b.jpg")
    if name in (b"sRGB", b"gAMA", b"cHRM"):  # what they say here is what a JPEG is taken for
        assert notes == ()
    elif name == b"cICP":
        assert "colour space (cICP)" in notes[0]


def test_chunks_that_are_not_kept_are_named():
    picture = load_picture(NamedBytes("a", png((b"oFFs", b"\0" * 9), (b"caBX", b"signed"), (b"tIME", b"\0" * 7))))
    assert picture_bytes(picture, "b.png")[1] == ("metadata that was not kept: PNG chunks caBX, oFFs",)


def test_a_density_turns_with_the_picture():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = load_picture(NamedBytes("a", encoded("JPEG", dpi=(300, 150), exif=exif)))
    assert picture.shape == (72, 64)
    assert picture.metadata.dpi == (150, 300)


@pytest.mark.parametrize("unit", ["jpg", "png"])
def test_the_shape_of_a_pixel(unit):
    data = png((b"pHYs", struct.pack(">IIB", 2, 1, 0))) if unit == "png" else encoded("JPEG")
    if unit == "jpg":
        data = data[:13] + struct.pack(">BHH", 0, 2, 1) + data[18:]  # JFIF's density
    picture = load_picture(NamedBytes("a", data))
    assert picture.metadata.aspect == (2, 1)
    for suffix in ("png", "jpg"):
        data, notes = picture_bytes(picture, f"b.{suffix}")
        assert load_picture(NamedBytes("b", data)).metadata.aspect == (2, 1)
        assert notes == ()
    assert "pixel aspect ratio" in picture_bytes(picture, "b.tif")[1][0]


def test_the_resolution_of_inks():
    """A CMYK JPEG has no JFIF header: EXIF holds it."""
    buffer = io.BytesIO()
    Image.fromarray(pixels()).convert("CMYK").save(buffer, "TIFF", dpi=(300, 150))
    written, notes = picture_bytes(load_picture(NamedBytes("a", buffer.getvalue())), "b.jpg")
    assert notes == ()
    with Image.open(io.BytesIO(written)) as image:
        assert [image.getexif()[tag] for tag in (282, 283, 296)] == [300, 150, 2]


# --- XMP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (b'<a tiff:Orientation="6"/>', b'<a tiff:Orientation="1"/>'),
        (b"<a tiff:Orientation = '8' b='6'/>", b"<a tiff:Orientation = '1' b='6'/>"),
        (b"<tiff:Orientation> 3 </tiff:Orientation>", b"<tiff:Orientation>1</tiff:Orientation>"),
        (
            b'<a xmlns:t="http://ns.adobe.com/tiff/1.0/" t:Orientation="6"/>',
            b'<a xmlns:t="http://ns.adobe.com/tiff/1.0/" t:Orientation="1"/>',
        ),
        (b'<a exif:SceneOrientation="6" my:Orientation="6"/>', b'<a exif:SceneOrientation="6" my:Orientation="6"/>'),
    ],
)
def test_orientation_in_xmp(packet, expected):
    assert upright_xmp(packet) == (expected, [])


@pytest.mark.parametrize(
    "packet",
    [
        b"<a><xmp:Thumbnails><rdf:Alt><rdf:li><xmpGImg:image>T0xE</xmpGImg:image></rdf:li></rdf:Alt></xmp:Thumbnails></a>",
        b'<a><xap:Thumbnails x="1">T0xE</xap:Thumbnails ><b xmlns:xap="http://ns.adobe.com/xap/1.0/"/></a>',
        b'<a><rdf:li xmpGImg:image="T0xE" xmpGImg:width="9"/></a>',
        b'<a xmlns:g="http://ns.adobe.com/xap/1.0/g/img/"><g:image>T0xE</g:image></a>',
    ],
)
def test_thumbnails_in_xmp(packet):
    found, lost = upright_xmp(packet)
    assert b"T0xE" not in found
    assert found.startswith(b"<a")
    assert found.endswith(b"</a>")
    assert lost == ["the old XMP thumbnail"]


def test_xmp_that_cannot_be_kept():
    assert upright_xmp(b"<xmp:Thumbnails>T0xE") == (None, ["XMP that is damaged"])
    assert upright_xmp("<x/>".encode("utf-16")) == (None, ["XMP that is not UTF-8"])
    long = XMP + b" " * 70_000
    picture = load_picture(NamedBytes("a", png(international(b"XML:com.adobe.xmp", long))))
    assert "XMP (longer than JPEG allows)" in picture_bytes(picture, "b.jpg")[1][0]
    assert picture_bytes(picture, "b.png")[1] == ()


# --- hostile ------------------------------------------------------------------------------------------------


def test_xmp_made_to_be_slow():
    """In quadratic time this would take minutes."""
    for piece in (
        b"<xmp:Thumbnails ",
        b"<xmp:Thumbnails>",
        b"xmpGImg:image=",
        b"</xmp:Thumbnails>",
        b'tiff:Orientation="',
    ):
        upright_xmp(piece * (1 << 16))


def test_a_bomb_of_xmp_is_not_unpacked(monkeypatch):
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 30)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_MEMORY", 1 << 30)
    bomb = international(b"XML:com.adobe.xmp", b" " * (MAX_BYTES + 1), packed=True)
    picture = load_picture(NamedBytes("a", png(bomb)))
    assert picture.metadata.xmp is None
    assert "XMP that is damaged or too large" in picture_bytes(picture, "b.png")[1][0]


@pytest.mark.parametrize("cut", range(0, len(RESOURCES), 3))
def test_resources_cut_anywhere(cut):
    found = photoshop_resources(RESOURCES[:cut])
    whole = photoshop_resources(RESOURCES)
    assert all(whole[code] == data for code, data in found.items())


def test_chunks_of_any_length():
    head = b"\x89PNG\r\n\x1a\n"
    assert list(png_chunks(io.BytesIO(head + struct.pack(">I4s", 2**32 - 1, b"tEXt")))) == [(b"tEXt", None)]
    assert list(png_chunks(io.BytesIO(head + png_chunk(b"tEXt", b"a\0b")[:-1] + b"\0"))) == []  # a wrong checksum
    many = [(b"tEXt", b"k%d\0" % index + bytes(1 << 20)) for index in range(20)]
    picture = load_picture(NamedBytes("a", png(*many)))
    assert sum(len(data) for _, data in picture.metadata.texts) <= MAX_BYTES
    assert "a tEXt chunk that is too large" in picture_bytes(picture, "b.png")[1][0]


@pytest.mark.parametrize("dpi", [(0, 0), (float("inf"), 72), (-5, 5)])
def test_densities_that_are_none(dpi):
    image = Image.fromarray(pixels())
    image.info["dpi"] = dpi
    from moebius_runtime.pictures import picture_from_image

    assert picture_from_image(image).metadata.dpi is None
