"""Pictures: every format and mode there and back, orientation, metadata, refusals, hostile bytes."""

from __future__ import annotations

import io
import random
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin

from moebius_runtime import pictures
from moebius_runtime.errors import InputError, MoebiusError, OutputError
from moebius_runtime.pictures import Picture, check_can_save, load_picture, picture_from_image, save_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def noise(*shape: int, dtype: type = np.uint8) -> np.ndarray:
    top = np.iinfo(dtype).max
    return np.random.default_rng(sum(shape)).integers(0, top, shape, dtype=dtype, endpoint=True)


def picture(mode: str, dtype: type = np.uint8, alpha: bool = False, **more: object) -> Picture:
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    return Picture(
        noise(70, 65, channels, dtype=dtype),
        mode,  # type: ignore[arg-type]
        noise(70, 65, dtype=dtype) if alpha else None,
        **more,  # type: ignore[arg-type]
    )


def equal(one: Picture, other: Picture) -> bool:
    alphas = (one.alpha is None) == (other.alpha is None) and (
        one.alpha is None or np.array_equal(one.alpha, other.alpha)
    )
    same_type = one.pixels.dtype == other.pixels.dtype and one.mode == other.mode
    return same_type and alphas and np.array_equal(one.pixels, other.pixels)


def exif_block(orientation: int = 1, order: str = "<", thumbnail: bytes = b"") -> bytes:
    """IFD0: Make, Orientation, and an unknown tag whose value is out of line; IFD1 with a thumbnail."""
    make, secret = b"Moebius\0", b"maker note, byte for byte"
    after = 8 + 2 + 3 * 12 + 4
    pack = struct.pack
    entries = pack(f"{order}HHII", 0x010F, 2, len(make), after)
    entries += pack(f"{order}HHIHH", 0x0112, 3, 1, orientation, 0)
    entries += pack(f"{order}HHII", 0xC000, 7, len(secret), after + len(make))
    values = make + secret
    if len(values) % 2:
        values += b"\0"
    following = after + len(values)
    block = (b"II" if order == "<" else b"MM") + pack(f"{order}HI", 42, 8) + pack(f"{order}H", 3) + entries
    block += pack(f"{order}I", following if thumbnail else 0) + values
    if thumbnail:
        start = following + 2 + 2 * 12 + 4
        block += pack(f"{order}H", 2) + pack(f"{order}HHII", 0x0201, 4, 1, start)
        block += pack(f"{order}HHII", 0x0202, 4, 1, len(thumbnail)) + pack(f"{order}I", 0) + thumbnail
    return block


# --- there and back -----------------------------------------------------------------------------------------

LOSSLESS = [
    (".png", "L", np.uint8, False),
    (".png", "L", np.uint8, True),
    (".png", "L", np.uint16, False),
    (".png", "L", np.uint16, True),
    (".png", "RGB", np.uint8, False),
    (".png", "RGB", np.uint8, True),
    (".png", "RGB", np.uint16, False),
    (".png", "RGB", np.uint16, True),
    (".webp", "RGB", np.uint8, False),
    (".webp", "RGB", np.uint8, True),
    (".tif", "L", np.uint8, False),
    (".tif", "L", np.uint8, True),
    (".tif", "L", np.uint16, False),
    (".tif", "RGB", np.uint8, False),
    (".tif", "RGB", np.uint8, True),
    (".tif", "RGB", np.uint16, False),
    (".tif", "RGB", np.uint16, True),
    (".TIFF", "CMYK", np.uint8, False),
    (".tif", "CMYK", np.uint16, False),
]


@pytest.mark.parametrize(("suffix", "mode", "dtype", "alpha"), LOSSLESS)
def test_every_pixel_profile_and_exif_come_back(tmp_path, suffix, mode, dtype, alpha):
    first = picture(mode, dtype, alpha, icc_profile=SRGB, exif=exif_block())
    path = tmp_path / f"a{suffix}"
    assert save_picture(first, path) == ()
    second = load_picture(path)
    assert equal(first, second)
    assert second.bits == np.iinfo(dtype).bits
    assert second.icc_profile == SRGB
    if suffix.lower().startswith(".tif"):  # tags of the file itself: only those that describe the photograph
        exif = Image.Exif()
        exif.load(second.exif)
        assert dict(exif) == {0x010F: "Moebius"}
    else:
        assert second.exif == exif_block()
    # Only CMYK looks into the profile, and an sRGB one cannot convert it.
    assert len(second.notes) == (mode == "CMYK")


def test_sixteen_bits_larger_than_a_strip(tmp_path):
    # 1 MiB strips: 600 x 700 x 4 x 2 bytes are more than three of them.
    deep = Picture(noise(700, 600, 3, dtype=np.uint16), "RGB", noise(700, 600, dtype=np.uint16))
    for suffix in (".png", ".tif"):
        save_picture(deep, tmp_path / f"a{suffix}")
        assert equal(load_picture(tmp_path / f"a{suffix}"), deep)


def test_webp_grey_becomes_equal_rgb(tmp_path):
    grey = picture("L", alpha=True)
    save_picture(grey, tmp_path / "a.webp")
    back = load_picture(tmp_path / "a.webp")
    assert back.mode == "RGB"
    assert np.array_equal(back.pixels, grey.to_rgb())
    assert np.array_equal(back.alpha, grey.alpha)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpeg(tmp_path, mode):
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[mode]
    ramp = np.linspace(0, 255, 70, dtype=np.uint8)[:, None, None]
    smooth = Picture(np.broadcast_to(ramp, (70, 65, channels)).copy(), mode, icc_profile=SRGB, exif=exif_block())
    save_picture(smooth, tmp_path / "a.jpg")
    back = load_picture(tmp_path / "a.jpg")
    assert back.mode == mode
    # Quality 95 quantises by steps of 1 to 12: a smooth ramp moves by a level or two.
    assert np.abs(back.pixels.astype(int) - smooth.pixels).max() <= 3
    assert back.icc_profile == SRGB
    assert back.exif == exif_block()


def test_jpeg_keeps_colour_at_full_resolution_and_quality(tmp_path):
    save_picture(picture("RGB"), tmp_path / "a.jpg")
    with Image.open(tmp_path / "a.jpg") as image:
        assert [layer[1:3] for layer in image.layer] == [(1, 1)] * 3  # 4:4:4
        # libjpeg's luminance table scaled for 95: its first entry, 16, becomes 2.
        assert image.quantization[0][0] == 2
    save_picture(picture("RGB"), tmp_path / "b.jpg", quality=50)
    assert (tmp_path / "b.jpg").stat().st_size < (tmp_path / "a.jpg").stat().st_size / 2


# --- modes that Pillow knows --------------------------------------------------------------------------------


def saved(image: Image.Image, path: Path, **options: object) -> Picture:
    image.save(path, **options)
    return load_picture(path)


def test_palette_with_and_without_transparency(tmp_path):
    palette = Image.fromarray(noise(70, 65, 3)).quantize(16)
    assert np.array_equal(saved(palette, tmp_path / "a.png").pixels, np.asarray(palette.convert("RGB")))
    clear = saved(palette, tmp_path / "b.png", transparency=3)
    assert clear.mode == "RGB"
    assert np.array_equal(clear.alpha, np.where(np.asarray(palette) == 3, 0, 255))
    gif = saved(palette, tmp_path / "c.gif")
    assert np.array_equal(gif.pixels, np.asarray(palette.convert("RGB")))


def test_one_bit_is_grey(tmp_path):
    bits = Image.fromarray(noise(70, 65) > 127)
    for suffix in (".png", ".tif", ".bmp"):
        read = saved(bits, tmp_path / f"a{suffix}")
        assert np.array_equal(read.pixels[:, :, 0], np.asarray(bits) * np.uint8(255))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_with_one_transparent_colour(tmp_path, dtype):
    first = picture("RGB", dtype)
    save_picture(first, tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    key = first.pixels[5, 6]
    chunk = b"tRNS" + struct.pack(">3H", *key.tolist())
    at = data.index(b"IDAT") - 4
    data = data[:at] + struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]
    (tmp_path / "a.png").write_bytes(data)
    read = load_picture(tmp_path / "a.png")
    assert np.array_equal(read.pixels, first.pixels)
    assert read.alpha[5, 6] == 0
    assert np.array_equal(read.alpha != 0, (first.pixels != key).any(axis=2))
    assert read.alpha.max() == np.iinfo(dtype).max


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compressed", [False, True])
def test_sixteen_bit_tiffs_of_others(tmp_path, order, compressed):
    """Written here by hand, both byte orders, raw and deflated, to be independent of our own writer."""
    pixels = noise(70, 65, 3, dtype=np.uint16)
    data = pixels.astype(f"{order}u2").tobytes()
    data = zlib.compress(data) if compressed else data
    entries = [
        (256, 3, 1, 65),
        (257, 3, 1, 70),
        (258, 3, 3, None),
        (259, 3, 1, 8 if compressed else 1),
        (262, 3, 1, 2),
        (273, 4, 1, None),
        (277, 3, 1, 3),
        (278, 3, 1, 70),
        (279, 4, 1, len(data)),
    ]
    after = 8 + 2 + 12 * len(entries) + 4
    file = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    for tag, kind, count, value in entries:
        value = {258: after, 273: after + 6}.get(tag, value)
        form = "HHIHxx" if kind == 3 and count == 1 else "HHII"
        file += struct.pack(f"{order}{form}", tag, kind, count, value)
    file += struct.pack(f"{order}I", 0) + struct.pack(f"{order}3H", 16, 16, 16) + data
    (tmp_path / "a.tif").write_bytes(file)
    read = load_picture(tmp_path / "a.tif")
    assert np.array_equal(read.pixels, pixels)
    assert read.notes == ()


def test_white_is_zero_tiff(tmp_path):
    grey = noise(70, 65, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.tif")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    at = data.index(struct.pack("<HHI", 262, 3, 1)) + 8
    data[at] = 0
    (tmp_path / "a.tif").write_bytes(data)
    assert np.array_equal(load_picture(tmp_path / "a.tif").pixels[:, :, 0], 65535 - grey)


@pytest.mark.parametrize("mode", ["I", "F", "LAB"])
def test_modes_without_white_are_refused(tmp_path, mode):
    image = Image.new(mode, (65, 70))
    with pytest.raises(InputError, match=f"colour mode is {mode}.*Convert it"):
        picture_from_image(image)
    image.save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: its colour mode"):
        load_picture(tmp_path / "a.tif")


def test_first_frame_with_a_note(tmp_path):
    frames = [Image.fromarray(noise(70, 65, 3) // number) for number in (1, 2)]
    for suffix, exact in ((".gif", False), (".webp", True), (".tif", True), (".png", True)):
        more = {"lossless": True} if suffix == ".webp" else {}
        read = saved(frames[0], tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **more)
        assert any("only the first" in note for note in read.notes)
        if exact:
            assert np.array_equal(read.pixels, np.asarray(frames[0]))
    # What phones write beside depth or exposure variants: several JPEGs in one file.
    phone = saved(frames[0], tmp_path / "a.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert any("only the first" in note for note in phone.notes)


def test_from_and_to_pillow():
    image = Image.fromarray(noise(70, 65, 4))
    image.info["exif"] = b"Exif\0\0" + exif_block(6)
    image.info["icc_profile"] = SRGB
    read = picture_from_image(image)
    turned = ImageOps.exif_transpose(image)
    assert np.array_equal(read.pixels, np.asarray(turned)[:, :, :3])
    assert np.array_equal(read.alpha, np.asarray(turned)[:, :, 3])
    back = read.to_image()
    assert (back.mode, back.size) == ("RGBA", (70, 65))
    assert np.array_equal(np.asarray(back), np.asarray(turned))
    assert back.info == {"icc_profile": SRGB, "exif": b"Exif\0\0" + exif_block(1)}
    deep = noise(70, 65, dtype=np.uint16)
    assert np.array_equal(np.asarray(picture_from_image(Image.fromarray(deep)).to_image()), deep)


def test_sixteen_bit_colour_through_pillow_is_said_aloud(tmp_path):
    save_picture(picture("RGB", np.uint16), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        read = picture_from_image(image)
    assert read.bits == 8
    assert read.notes == ("its 16 bits a channel were read as 8",)


# --- orientation and metadata -------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
def test_orientation(tmp_path, orientation, suffix):
    image = Image.fromarray(noise(70, 80, 3))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Moebius"
    path = tmp_path / f"a{suffix}"
    image.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {}))
    with Image.open(path) as again:
        expected = ImageOps.exif_transpose(again)
    read = load_picture(path)
    assert np.array_equal(read.pixels, np.asarray(expected))
    carried = Image.Exif()
    carried.load(read.exif)
    assert carried[ExifTags.Base.Make] == "Moebius"
    assert carried.get(ExifTags.Base.Orientation, 1) == 1
    # And once more: what is written is upright and stays so.
    for output in (".png", ".tif"):
        save_picture(read, tmp_path / f"b{output}")
        assert equal(load_picture(tmp_path / f"b{output}"), read)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_sixteen_bit_colour(tmp_path, orientation):
    deep = picture("RGB", np.uint16)
    save_picture(replace(deep, exif=exif_block(orientation)), tmp_path / "a.png")
    save_picture(deep, tmp_path / "a.tif")
    # A TIFF of ours has no orientation of its own; another program's has.
    data = (tmp_path / "a.tif").read_bytes()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    with Image.open(io.BytesIO(data)) as image:
        for tag in (256, 257, 258, 259, 262, 277, 278, 317):
            tags[tag] = image.tag_v2[tag]
        strips = [data[start : start + size] for start, size in zip(image.tag_v2[273], image.tag_v2[279], strict=True)]
    tags[0x0112], tags[273], tags[279] = orientation, 0, len(strips[0])
    assert len(strips) == 1
    stream = io.BytesIO()
    tags.save(stream)
    (tmp_path / "a.tif").write_bytes(stream.getvalue() + strips[0])
    planes = [Image.fromarray(deep.pixels[:, :, band]) for band in range(3)]
    exif = Image.Exif()
    exif[0x0112] = orientation
    expected = []
    for plane in planes:
        plane.info["exif"] = exif.tobytes()
        expected.append(np.asarray(ImageOps.exif_transpose(plane)))
    for suffix in (".png", ".tif"):
        assert np.array_equal(load_picture(tmp_path / f"a{suffix}").pixels, np.stack(expected, axis=2)), suffix


@pytest.mark.parametrize("order", ["<", ">"])
def test_exif_bytes_stay_except_orientation_and_thumbnail(tmp_path, order):
    thumbnail = b"\xff\xd8 what was there before \xff\xd9"
    Image.fromarray(noise(70, 65, 3)).save(tmp_path / "a.jpg", exif=b"Exif\0\0" + exif_block(6, order, thumbnail))
    read = load_picture(tmp_path / "a.jpg")
    assert thumbnail not in read.exif
    expected = bytearray(exif_block(1, order, bytes(len(thumbnail))))
    place = 8 + 2 + 3 * 12
    expected[place : place + 4] = bytes(4)  # no second directory any more
    assert read.exif == expected


def test_orientation_out_of_range_and_damaged_exif(tmp_path):
    image = Image.fromarray(noise(70, 65, 3))
    image.save(tmp_path / "a.png", exif=b"Exif\0\0" + exif_block(9))
    read = load_picture(tmp_path / "a.png")
    assert np.array_equal(read.pixels, np.asarray(image))
    assert read.exif == exif_block(1)
    for block in (b"nonsense", exif_block()[:20], b"II*\0\xff\xff\xff\xff"):
        image.save(tmp_path / "b.png", exif=b"Exif\0\0" + block)
        read = load_picture(tmp_path / "b.png")
        assert read.exif is None
        assert "EXIF block is damaged" in read.notes[0]
        assert np.array_equal(read.pixels, np.asarray(image))


def test_exif_too_long_for_jpeg_or_damaged_for_tiff(tmp_path):
    first = picture("RGB", exif=exif_block() + bytes(70_000))
    assert "longer than JPEG allows" in save_picture(first, tmp_path / "a.jpg")[0]
    assert load_picture(tmp_path / "a.jpg").exif is None
    assert save_picture(first, tmp_path / "a.png") == ()
    longest = replace(first, exif=exif_block().ljust(65_527, b"\0"))
    assert save_picture(longest, tmp_path / "b.jpg") == ()
    assert load_picture(tmp_path / "b.jpg").exif == longest.exif
    assert save_picture(replace(longest, exif=longest.exif + b"\0"), tmp_path / "b.jpg") != ()
    damaged = replace(first, exif=b"II*\0\x08\0\0\0")
    for dtype in (np.uint8, np.uint16):
        target = replace(damaged, pixels=noise(70, 65, 3, dtype=dtype))
        save_picture(target, tmp_path / "a.tif")
        assert equal(load_picture(tmp_path / "a.tif"), target)


def test_exif_with_the_size_of_another_picture_does_not_break_a_tiff(tmp_path):
    exif = Image.Exif()
    exif[256], exif[257], exif[0x010F] = 4000, 3000, "Moebius"
    first = picture("RGB", exif=exif.tobytes()[6:])
    save_picture(first, tmp_path / "a.tif")
    assert equal(load_picture(tmp_path / "a.tif"), first)


# --- colour -------------------------------------------------------------------------------------------------


def test_to_rgb_and_back():
    grey = picture("L")
    assert np.array_equal(grey.to_rgb(), np.repeat(grey.pixels, 3, axis=2))
    # The luma weights sum to 1: a grey comes back, but for float32 rounding of a few 1e-5.
    np.testing.assert_allclose(grey.native_from_rgb(grey.to_rgb()), grey.pixels, atol=1e-4)
    primaries = np.eye(3, dtype=np.float32)[None] * 255
    np.testing.assert_allclose(
        grey.native_from_rgb(primaries).ravel(), [76.245, 149.685, 29.07], atol=1e-3
    )  # 255 times 0.299, 0.587, 0.114
    colour = picture("RGB")
    assert np.array_equal(colour.to_rgb(), colour.pixels)
    region = np.full((2, 3, 3), 17.5, np.float32)
    assert colour.native_from_rgb(region) is region
    steps = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    deep = Picture(steps, "L")
    assert np.array_equal(deep.to_rgb()[:, :, 0], np.floor(steps[:, :, 0] / 257 + 0.5))
    assert (Picture(np.repeat(steps, 3, axis=2), "RGB").native_from_rgb(region) == 17.5 * 257).all()


def test_cmyk_without_profile():
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255], [0, 100, 200, 0]]], np.uint8)
    cmyk = Picture(np.repeat(inks, 64, axis=0), "CMYK")
    expected = [[255, 255, 255], [0, 255, 255], [0, 0, 0], [255, 155, 55]]
    assert np.array_equal(cmyk.to_rgb()[0], expected)
    region = np.array([[[255, 155.4, 54.6]]], np.float32)
    assert np.array_equal(cmyk.native_from_rgb(region)[0, 0], [0, 100, 200, 0])
    deep = replace(cmyk, pixels=cmyk.pixels.astype(np.uint16) * 257)
    assert np.array_equal(deep.to_rgb(), cmyk.to_rgb())
    assert np.array_equal(deep.native_from_rgb(region)[0, 0], [0, 25700, 51400, 0])


def cmyk_profile(black: float = 0) -> bytes:
    """A small ICC v2 printer profile: neutral, L* = 100 (1 - K)(1 - mean of CMY), `black` or more; back by K."""

    def lut(inputs: int, outputs: int, grid: int, table: bytes) -> bytes:
        identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
        ramp = bytes(range(256))
        head = b"mft1\0\0\0\0" + bytes([inputs, outputs, grid, 0]) + identity
        return head + ramp * inputs + table + ramp * outputs

    nodes = np.stack(np.meshgrid(*[np.arange(2)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)
    share = (1 - nodes[:, 3]) * (1 - nodes[:, :3].mean(axis=1))
    light = np.round(2.55 * np.maximum(100 * share, black)).astype(np.uint8)
    to_lab = np.stack([light, np.full(16, 128, np.uint8), np.full(16, 128, np.uint8)], axis=1)
    lab = np.stack(np.meshgrid(*[np.arange(2)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    to_ink = np.zeros((8, 4), np.uint8)
    to_ink[:, 3] = 255 * (1 - lab[:, 0])
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061),
        b"A2B0": lut(4, 3, 2, to_lab.tobytes()),
        b"B2A0": lut(3, 4, 2, to_ink.tobytes()),
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2024, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def test_cmyk_through_its_profile(tmp_path):
    inks = np.zeros((64, 64, 4), np.uint8)
    inks[:, :, 3] = np.arange(0, 256, 4)
    first = Picture(inks, "CMYK", icc_profile=cmyk_profile())
    save_picture(first, tmp_path / "a.tif")
    read = load_picture(tmp_path / "a.tif")
    assert read.notes == ()
    rgb = read.to_rgb()[0].astype(float)
    assert rgb[0].min() >= 254  # paper white is sRGB white
    # L* falls linearly with K; sRGB of a neutral L*, by CIE 15 and IEC 61966-2-1.
    lightness = 100 * (1 - inks[0, :, 3] / 255)
    linear = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    srgb = 255 * np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)
    # Within 3 levels: the profile's tables have 8 bits, and so has the picture.
    assert np.abs(rgb - srgb[:, None]).max() <= 3
    back = read.native_from_rgb(read.to_rgb().astype(np.float32))
    assert np.abs(back - inks).max() <= 3
    # Black point compensation: the darkest ink, of L* 10 (sRGB 27), is as black as the screen goes.
    greyish = replace(read, icc_profile=cmyk_profile(black=10))
    assert greyish.to_rgb()[0, -1].max() <= 5


def test_cmyk_with_a_useless_profile_says_so(tmp_path):
    for profile in (SRGB, b"not a profile"):
        save_picture(picture("CMYK", icc_profile=profile), tmp_path / "a.tif")
        read = load_picture(tmp_path / "a.tif")
        assert "cannot convert CMYK" in read.notes[0]
        assert "\n" not in read.notes[0]
        assert np.array_equal(read.to_rgb(), replace(read, icc_profile=None).to_rgb())
        assert read.icc_profile == profile


# --- refusals -----------------------------------------------------------------------------------------------


def refusal(path: Path | str) -> str:
    with pytest.raises(InputError) as caught:
        load_picture(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_refused_files(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.png")
    assert "is a folder" in refusal(tmp_path)
    (tmp_path / "empty.png").touch()
    assert "is empty" in refusal(tmp_path / "empty.png")
    (tmp_path / "text.png").write_text("hello\nworld")
    assert "is not a picture that can be read" in refusal(tmp_path / "text.png")
    assert "null" in refusal("a\0b.png")
    assert "not a plain file" in refusal("/dev/zero")
    # A format that Pillow reads and we do not: PostScript would start another program.
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n")
    assert "is not a picture" in refusal(tmp_path / "a.eps")


def test_sizes(tmp_path):
    Image.new("L", (64, 64)).save(tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png").shape == (64, 64)
    Image.new("L", (63, 64)).save(tmp_path / "a.png")
    assert "63x64 pixels; expected a shortest side of 64" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (20_000, 20_000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_on_their_header(tmp_path, width, height):
    """The header alone is there: a reader that went on to the pixels would complain of their absence."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "a.png").write_bytes(data + struct.pack(">I", 9) + b"IDAT" + bytes(13))
    message = refusal(tmp_path / "a.png")
    assert "megapixels" in message or "decompression bomb" in message
    assert Image.MAX_IMAGE_PIXELS == 89_478_485  # Pillow's own, untouched


def test_ninety_nine_megapixels_pass_without_a_warning(tmp_path, recwarn):
    """Above Pillow's warning limit of 89, below ours."""
    Image.new("1", (9_900, 10_000)).save(tmp_path / "a.tif", compression="group4")
    assert load_picture(tmp_path / "a.tif").shape == (10_000, 9_900)
    assert not recwarn.list


def test_save_refusals(tmp_path):
    def message(*args: object, **more: object) -> str:
        with pytest.raises(InputError) as caught:
            save_picture(*args, **more)  # type: ignore[arg-type]
        return str(caught.value)

    rgb = picture("RGB")
    assert "unknown suffix '.gif'; expected one of .jpg, .jpeg, .jpe, .jfif, .png, .webp" in message(
        rgb, tmp_path / "a.gif"
    )
    assert "unknown suffix ''" in message(rgb, tmp_path / "a")
    assert "alpha. Choose .png" in message(picture("RGB", alpha=True), tmp_path / "a.jpg")
    deep = picture("RGB", np.uint16)
    assert "16 bits a channel. Choose .png" in message(deep, tmp_path / "a.jpg")
    assert "16 bits a channel. Choose .png" in message(deep, tmp_path / "a.webp")
    assert "CMYK. Choose .tif or .jpg" in message(picture("CMYK"), tmp_path / "a.png")
    assert "CMYK. Choose .tif." in message(picture("CMYK", np.uint16), tmp_path / "a.webp")
    assert "16 bits a channel. Choose .tif" in message(picture("CMYK", np.uint16), tmp_path / "a.jpg")
    assert "Choose .png" in message(picture("L", np.uint16, alpha=True), tmp_path / "a.tif")
    long = Picture(np.zeros((64, 16_384, 3), np.uint8), "RGB")
    assert "WEBP cannot hold 16384x64" in message(long, tmp_path / "a.webp")
    assert "quality is 0" in message(rgb, tmp_path / "a.jpg", quality=0)
    assert list(tmp_path.iterdir()) == []
    assert check_can_save(long, "a.JPEG") == "JPEG"


def test_a_failed_encoding_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(b"old")

    def fail(*args: object, **more: object) -> None:
        raise OSError("encoder error -2\nsecond line")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OutputError, match=r"PNG encoding failed \(encoder error -2 second line\)"):
        save_picture(picture("RGB"), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(OutputError, match="cannot write"):
        save_picture(picture("RGB", np.uint16), tmp_path / "none" / "a.png")


# --- hostile bytes ------------------------------------------------------------------------------------------


def samples() -> dict[str, bytes]:
    image = Image.fromarray(noise(70, 65, 3) // 64 * 64)
    exif = b"Exif\0\0" + exif_block(6, thumbnail=b"thumbnail")
    files = {}
    for name, shown, options in [
        ("JPEG", image, {"exif": exif, "icc_profile": SRGB, "progressive": True}),
        ("PNG", image.convert("RGBA"), {"exif": exif, "icc_profile": SRGB}),
        ("WEBP", image, {"exif": exif, "icc_profile": SRGB, "lossless": True}),
        ("TIFF", image, {"exif": exif, "icc_profile": SRGB, "compression": "tiff_lzw"}),
        ("BMP", image, {}),
        ("GIF", image.quantize(8), {}),
    ]:
        stream = io.BytesIO()
        shown.save(stream, name, **options)
        files[name] = stream.getvalue()
    stream = io.BytesIO()
    image.convert("CMYK").save(stream, "JPEG", icc_profile=cmyk_profile())
    files["CMYK"] = stream.getvalue()
    stream = io.BytesIO()
    image.convert("L").save(stream, "TIFF", exif=exif)
    files["raw TIFF"] = stream.getvalue()
    deep = picture("RGB", np.uint16, exif=exif_block(6), icc_profile=SRGB)
    files["deep PNG"] = pictures.picture_bytes(deep, "deep.png")[0]
    files["deep TIFF"] = pictures.picture_bytes(deep, "deep.tif")[0]
    return files


FILES = samples()


@pytest.mark.parametrize("name", FILES)
def test_hostile_bytes_never_leave_a_traceback(tmp_path, name):
    """Truncated, flipped, overwritten and spliced files are read or refused in one line."""
    whole, random_source = FILES[name], random.Random(name)
    path = tmp_path / "a"
    messages = []
    for case in range(120):
        data = bytearray(whole)
        # Half of the damage falls on the first 700 bytes, where the headers, EXIF and directories are.
        reach = len(data) if case % 2 else min(700, len(data))
        if case % 4 == 0:
            del data[random_source.randrange(1, len(data)) :]
        elif case % 4 == 1:
            for _ in range(random_source.choice((1, 3, 20))):
                data[random_source.randrange(reach)] ^= 1 << random_source.randrange(8)
        elif case % 4 == 2:
            for _ in range(random_source.choice((1, 2, 8))):
                at = random_source.randrange(reach)
                data[at : at + 4] = random_source.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\x80"))
        else:
            at, source = random_source.randrange(reach), random_source.randrange(len(data))
            data[at : at + 16] = data[source : source + random_source.randrange(40)]
        path.write_bytes(data)
        try:
            load_picture(path).to_rgb()
        except MoebiusError as error:
            messages.append(str(error))
    # Most truncations are refused (some files are whole without their last bytes): the readers were reached.
    assert len(messages) >= 15
    assert not any("\n" in message for message in messages)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", FILES)
def test_truncated_in_the_middle_is_refused(tmp_path, name):
    (tmp_path / "a").write_bytes(FILES[name][: len(FILES[name]) * 3 // 4])
    refusal(tmp_path / "a")
    (tmp_path / "a").write_bytes(FILES[name])
    assert load_picture(tmp_path / "a").shape in {(70, 65), (65, 70)}


def test_a_flipped_pixel_byte_of_a_png_is_refused(tmp_path):
    """PNG carries checksums: a picture other than the saved one is not passed on as if it were whole."""
    data = bytearray(FILES["PNG"])
    start = data.index(b"IDAT") + 4
    wrong = 0
    for offset in range(200, 1200, 50):
        damaged = bytearray(data)
        damaged[start + offset] ^= 0x10
        (tmp_path / "a.png").write_bytes(damaged)
        try:
            load_picture(tmp_path / "a.png")
            wrong += 1
        except InputError:
            pass
    assert wrong == 0
