"""JPEGs that end too early: read as browsers show them while hardly anything is missing, else refused."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.errors import InputError
from moebius_runtime.pictures import NamedBytes, load_picture


def jpeg(mode: str = "RGB", size: tuple[int, int] = (320, 240), **more: object) -> bytes:
    rng = np.random.RandomState(0)
    small = Image.fromarray(rng.randint(0, 256, (size[1] // 8, size[0] // 8, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    small.resize(size, Image.Resampling.BICUBIC).convert(mode).save(buffer, "JPEG", quality=90, **more)
    return buffer.getvalue()


KINDS = {
    "4:2:0": jpeg(subsampling=2),
    "4:4:4": jpeg(subsampling=0),
    "grey": jpeg("L"),
    "inks": jpeg("CMYK"),
    "progressive": jpeg(progressive=True),
    "odd size": jpeg(size=(333, 251)),
    "restarts": jpeg(restart_marker_rows=1),
    "thumbnail": jpeg(exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + jpeg(size=(64, 64))),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", [1, 2])
def test_without_its_end_marker(kind, cut):
    """Every pixel is there, and the picture is what the whole file gives."""
    whole = load_picture(NamedBytes("a", KINDS[kind]))
    assert whole.notes == ()
    found = load_picture(NamedBytes("a", KINDS[kind][:-cut]))
    assert np.array_equal(found.pixels, whole.pixels)
    assert found.notes == ("the file lacks its last bytes, no pixel is missing",)
    assert found.exif == whole.exif


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "grey", "odd size", "restarts"])
@pytest.mark.parametrize("share", [0.995, 0.98])
def test_a_little_is_missing(kind, share):
    data = KINDS[kind]
    whole, found = load_picture(NamedBytes("a", data)), load_picture(NamedBytes("a", data[: int(len(data) * share)]))
    stated = float(re.search(r"([\d.]+)% of the picture, at its end, is flat colour", found.notes[0])[1]) / 100
    differs = (found.pixels != whole.pixels).any(axis=2).mean()
    assert 0 < differs <= stated + 0.01
    assert stated < 0.03
    rows = int(240 * 0.9)
    assert np.array_equal(found.pixels[:rows], whole.pixels[:rows])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_real_part_is_missing(kind, share):
    data = KINDS[kind]
    with pytest.raises(
        InputError, match=r"truncated: (\d+% of the picture is|its last passes are) missing|cannot be dec"
    ):
        load_picture(NamedBytes("a", data[: int(len(data) * share)]))


def test_what_comes_after_the_end_does_not_matter():
    data = KINDS["4:2:0"]
    found = load_picture(NamedBytes("a", data + b"\0" * 100))
    assert found.notes == ()


def test_a_png_without_its_last_chunk():
    buffer = io.BytesIO()
    pixels = np.random.RandomState(0).randint(0, 256, (80, 90, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    for cut in (4, 12):
        assert np.array_equal(load_picture(NamedBytes("a", buffer.getvalue()[:-cut])).pixels, pixels)
    with pytest.raises(InputError, match="cannot be decoded"):
        load_picture(NamedBytes("a", buffer.getvalue()[:-2000]))
