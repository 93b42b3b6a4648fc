"""Damaged manifests, pictures and masks, by the hundreds: each ends in a result or in one line, and leaves no file.

MOEBIUS_FUZZ_CASES sets how many (10,000 takes some minutes). Case N is the same on every run: a report names the
numbers, and `manifest_case(N)` or `picture_case(N)` makes one again.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms

from moebius_runtime import manifest as manifest_module
from moebius_runtime import pictures
from moebius_runtime.errors import MoebiusError
from moebius_runtime.manifest import read_manifest
from moebius_runtime.masks import load_mask
from moebius_runtime.pictures import check_can_save, load_picture, save_picture
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline

CASES = int(os.environ.get("MOEBIUS_FUZZ_CASES", "400"))
SLOWEST = 30.0  # seconds; the usual case takes milliseconds
SHAPE = (72, 80)

EVIL: list[Any] = [
    None, True, False, 0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**40, 0.0, -0.0, 0.5, 1e308, -1e308, 5e-324,
    float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "1", "..", "../x", "/etc/passwd", "\0", "\n",
    "\x1b[31m", "\ud800", "\U0001f600", "x" * 2000, "0" * 64, "f" * 64, "%s%n", "{0}", [], [[]], [None] * 50, {},
    {"": {}}, {"a": [1, {"b": None}]}, "fp32", "int64", "batch", "scaled_linear", "unet/model.onnx",
]  # fmt: skip


# --- what is tried ------------------------------------------------------------------------------------------


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        found.append((value, key))
        places(inner, found)
    return found


def mutate_value(value: Any, rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind == 0 and isinstance(value, (int, float)) and not isinstance(value, bool):
        return rng.choice([-value, value + 1, value - 1, value * 2, value / 2, float(value), str(value), value * 1e9])
    if kind == 1 and isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return (
            value[:at] + rng.choice(["", "/", "..", "\\", ":", "\0", "\n", "\u202e", "\ud800", "9"]) + value[at + 1 :]
        )
    if kind == 2 and isinstance(value, list):
        return rng.choice([value[::-1], value[:-1], value * 2, value[:1] * 100])
    if kind == 3 and isinstance(value, dict) and value:
        changed = dict(value)
        key = rng.choice(list(changed))
        changed[rng.choice(["x", "", "\n", key.upper(), key + "\0", "__class__"])] = changed.pop(key)
        return changed
    return rng.choice(EVIL)


def mutate_bytes(data: bytes, rng: random.Random, other: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 30])):
        at = rng.randrange(len(damaged) + 1) if rng.random() < 0.5 else rng.randrange(min(len(damaged), 200) + 1)
        kind = rng.randrange(8)
        if kind == 0 and at < len(damaged):
            damaged[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            damaged[at : at + 1] = bytes([rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])])
        elif kind == 2:
            size = rng.choice([2, 4])
            number = rng.choice([0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 65, 9999, 30000]) % (1 << 8 * size)
            damaged[at : at + size] = number.to_bytes(size, rng.choice(["big", "little"]))
        elif kind == 3:
            del damaged[at:]
        elif kind == 4:
            del damaged[at : at + rng.choice([1, 2, 8, 100])]
        elif kind == 5:
            damaged[at:at] = rng.randbytes(rng.choice([1, 2, 8, 100]))
        elif kind == 6:
            start = rng.randrange(len(other))
            damaged[at : at + rng.choice([0, 10, 10**9])] = other[start : start + rng.choice([10, 100, 10**9])]
        else:
            start = rng.randrange(len(damaged) + 1)
            damaged[at:at] = damaged[start : start + rng.choice([4, 20, 200])]
    return bytes(damaged)


def manifest_case(number: int, text: str, sign: Callable[[dict[str, Any]], str]) -> bytes:
    """A damaged manifest; two thirds are signed, so that more than the hash is tried."""
    rng = random.Random(number)
    if number % 3 == 0:
        return mutate_bytes(text.encode(), rng, b'{"a": [' * 40 + b"1e400, NaN, \\ud800 \xff\xfe" * 4)
    content = json.loads(text)
    del content["manifest_sha256"]
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        section = rng.choice(list(content))
        container, key = rng.choice([(content, section), *places(content[section], [])])
        if rng.random() < 0.15:
            del container[key]
        else:
            container[key] = mutate_value(container[key], rng)
        if not content:
            break
    return sign(content).encode("utf-8", "surrogatepass")


@lru_cache(maxsize=1)
def picture_seeds() -> tuple[bytes, ...]:
    """A small file of every kind that is read."""
    noise = np.random.RandomState(0)
    rgb = np.repeat(np.repeat(noise.randint(0, 256, (9, 10, 3)), 8, 0), 8, 1).astype(np.uint8)
    colour = Image.fromarray(rgb)
    grey, alpha = colour.convert("L"), Image.fromarray(rgb[:, :, 0])
    rgba = colour.copy()
    rgba.putalpha(alpha)
    palette = colour.quantize(16)
    deep = Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.Make] = "maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"comment"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    files: list[bytes] = []

    def add(image: Image.Image, form: str, **more: Any) -> None:
        buffer = io.BytesIO()
        image.save(buffer, form, **more)
        files.append(buffer.getvalue())

    for image in (colour, grey, rgba, palette, deep, grey.convert("1"), grey.convert("LA")):
        add(image, "PNG", exif=exif, icc_profile=profile if image is colour else None)
    add(palette, "PNG", transparency=3)
    for image in (colour, grey, colour.convert("CMYK")):
        add(image, "JPEG", exif=exif, icc_profile=profile)
    add(colour, "JPEG", progressive=True, quality=30)
    for image, more in ((colour, {}), (rgba, {"lossless": True}), (colour, {"exif": exif.tobytes()})):
        add(image, "WEBP", **more)
    add(colour, "WEBP", save_all=True, append_images=[rgba])
    for image, compression in (
        (colour, "raw"), (rgba, "tiff_lzw"), (grey, "packbits"), (deep, "tiff_adobe_deflate"), (palette, "raw"),
        (colour.convert("CMYK"), "tiff_lzw"), (colour, "jpeg"), (grey.convert("1"), "group4"), (rgba, "raw"),
    ):  # fmt: skip
        add(image, "TIFF", compression=compression, exif=exif)
    for image in (colour, grey, palette):
        add(image, "BMP")
        add(image, "GIF")
    add(palette, "GIF", save_all=True, append_images=[palette.rotate(180)], transparency=2)
    for channels in (3, 4):  # 16 bits, as this package writes them
        wide = (np.repeat(rgb, 2, 2)[:, :, :channels]).astype(np.uint16) * 256 + 5
        given = pictures.Picture(
            wide[:, :, :3], "RGB", wide[:, :, 3] if channels == 4 else None, exif=exif.tobytes()[6:]
        )
        files += [pictures.picture_bytes(given, name, 90)[0] for name in ("a.png", "a.tif")]
    return tuple(files)


def picture_case(number: int) -> bytes:
    """A damaged picture, of a seed of each kind in turn."""
    rng = random.Random(number)
    seeds = picture_seeds()
    return mutate_bytes(seeds[number % len(seeds)], rng, rng.choice(seeds))


# --- what must hold -----------------------------------------------------------------------------------------


class Harness:
    """Runs cases and collects what must not happen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wrong: list[str] = []
        self.outcomes = {"result": 0, "refused": 0}

    def run(self, number: int, work: Callable[[], object]) -> None:
        before = self._listing()
        started = time.perf_counter()
        try:
            work()
            self.outcomes["result"] += 1
        except MoebiusError as error:
            self.outcomes["refused"] += 1
            message = str(error)
            if not message or "\n" in message or len(message) > 2000 or "Traceback" in message:
                self.wrong.append(f"case {number}: {message!r}")
        except Exception as error:
            self.wrong.append(f"case {number}: {type(error).__name__}: {error!s:.200}")
        if (took := time.perf_counter() - started) > SLOWEST:
            self.wrong.append(f"case {number}: {took:.0f} s")
        if self._listing() != before:
            self.wrong.append(f"case {number}: left {set(self._listing()) - set(before)}")

    def _listing(self) -> list[str]:
        return sorted(name for name in os.listdir(self.folder) if name != "out.png")


def try_manifest(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    read_manifest(folder)
    pipeline = InpaintPipeline.from_bundle(folder, threads=1)  # a manifest that is read is also one that works
    size = pipeline.manifest.geometry.image_size
    pixels = np.random.RandomState(0).randint(0, 256, (size, size, 3)).astype(np.uint8)
    mask = np.zeros((size, size), bool)
    mask[: size // 2] = True
    options = InpaintOptions(steps=1, strength=1.0)
    pipeline.check(options)
    pipeline.inpaint(pictures.Picture(pixels, "RGB"), mask, options)


def try_picture(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    problem = None
    try:
        load_mask(path, SHAPE, resize=True)
    except MoebiusError as error:
        problem = error
    try:
        picture = load_picture(path)
        assert all("\n" not in note for note in picture.notes)
        out = path.with_name("out.png" if picture.mode != "CMYK" else "out.tif")
        check_can_save(picture, out)
        save_picture(picture, out)
        again = load_picture(out)
        out.unlink()
        assert np.array_equal(again.pixels, picture.pixels)
    except MoebiusError:
        raise
    if problem:
        raise problem


@pytest.fixture
def signed(toy_copy, edit_manifest) -> Callable[[dict[str, Any]], str]:
    def sign(content: dict[str, Any]) -> str:
        def replace(current: dict[str, Any]) -> None:
            current.clear()
            current.update(content)

        scratch = toy_copy.path.parent / "scratch"
        scratch.mkdir(exist_ok=True)
        shutil.copy(toy_copy.path / "original", scratch / "manifest.json")
        edit_manifest(scratch, replace)
        return (scratch / "manifest.json").read_text()

    (toy_copy.path / "original").write_bytes((toy_copy.path / "manifest.json").read_bytes())
    return sign


def fuzz_manifests(toy_copy, signed, numbers: range) -> Harness:
    text = (toy_copy.path / "original").read_text()
    harness = Harness(toy_copy.path)
    for number in numbers:
        data = manifest_case(number, text, signed)
        harness.run(number, lambda data=data: try_manifest(toy_copy.path, data))
    return harness


def fuzz_pictures(folder: Path, numbers: range) -> Harness:
    harness = Harness(folder)
    path = folder / "picture"
    path.touch()
    for number in numbers:
        data = picture_case(number)
        harness.run(number, lambda data=data: try_picture(path, data))
    return harness


def test_manifests(toy_copy, signed, capfd):
    harness = fuzz_manifests(toy_copy, signed, range(CASES // 2))
    assert harness.wrong == []
    assert harness.outcomes["refused"] > 0.5 * (CASES // 2)
    assert capfd.readouterr() == ("", "")


def test_pictures(tmp_path, capfd):
    harness = fuzz_pictures(tmp_path, range(CASES - CASES // 2))
    assert harness.wrong == []
    assert harness.outcomes["refused"] > 0.2 * (CASES // 2)
    assert harness.outcomes["result"] > 0.05 * (CASES // 2)
    assert capfd.readouterr().out == ""  # libtiff writes to the error stream; the command keeps that off it


def test_every_seed_is_sound(tmp_path):
    for data in picture_seeds():
        (tmp_path / "picture").write_bytes(data)
        picture = load_picture(tmp_path / "picture")
        assert picture.shape in (SHAPE, SHAPE[::-1])  # some are turned by their EXIF


# --- planted bugs are found ---------------------------------------------------------------------------------


def test_a_manifest_reader_that_forgets_a_check_is_found(toy_copy, signed, monkeypatch):
    monkeypatch.setattr(manifest_module, "first_problem", str)  # pydantic's own message has several lines
    assert fuzz_manifests(toy_copy, signed, range(100)).wrong


@pytest.mark.filterwarnings("ignore")  # of Pillow, which the check also keeps quiet
def test_a_picture_reader_that_forgets_a_check_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_one_line_refusals", lambda _name: nullcontext())
    assert fuzz_pictures(tmp_path, range(100)).wrong


def test_a_file_left_behind_is_found(tmp_path, monkeypatch):
    real = pictures._check_size

    def leaky(image):
        Path(tmp_path / f"left {time.perf_counter_ns()}").touch()
        real(image)

    monkeypatch.setattr(pictures, "_check_size", leaky)
    assert any("left" in problem for problem in fuzz_pictures(tmp_path, range(50)).wrong)
