"""The strip of before, mask and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.errors import OutputError
from moebius_runtime.images.comparison import comparison_path, save_comparison
from moebius_runtime.images.pictures import Picture


def flat(height: int, width: int, *values: int, dtype: type = np.uint8, mode: str = "RGB") -> Picture:
    return Picture(np.full((height, width, len(values)), values, dtype), mode)


def strip(tmp_path: Path, before: Picture, mask: np.ndarray, after: Picture) -> np.ndarray:
    save_comparison(before, mask, after, tmp_path / "strip.png")
    with Image.open(tmp_path / "strip.png") as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def test_its_place():
    assert comparison_path(Path("out/a.b.jpg")) == Path("out/a.b-comparison.png")


def test_three_pictures_side_by_side(tmp_path):
    mask = np.zeros((70, 100), bool)
    mask[20:50, 30:80] = True
    before = flat(70, 100, 10, 200, 90)
    pixels = strip(tmp_path, before, mask, flat(70, 100, 250, 0, 5))
    assert pixels.shape == (70, 3 * 100 + 2 * 8, 3)
    left, middle, right = pixels[:, :100], pixels[:, 108:208], pixels[:, 216:]
    assert (left == (10, 200, 90)).all()
    assert (right == (250, 0, 5)).all()
    assert (pixels[:, 100:108] == 255).all()
    assert (pixels[:, 208:216] == 255).all()
    assert (middle[~mask] == (10, 200, 90)).all()
    # 0.4 of the picture and 0.6 of red
    assert (middle[mask] == (157, 80, 36)).all()
    assert (before.pixels == (10, 200, 90)).all()


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1024, 512), (1024, 512)), ((2048, 1000), (1024, 500)), ((64, 3000), (22, 1024)), ((3, 5000), (1, 1024))],
)
def test_large_pictures_are_shrunk(tmp_path, shape, expected):
    mask = np.zeros(shape, bool)
    mask[:1, :5] = True
    pixels = strip(tmp_path, flat(*shape, 1, 2, 3), mask, flat(*shape, 4, 5, 6))
    assert pixels.shape == (expected[0], 3 * expected[1] + 16, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(("mode", "values"), [("L", [60]), ("RGB", [60, 60, 60]), ("CMYK", [0, 0, 0, 195])])
def test_every_kind_of_picture(tmp_path, mode, values, dtype):
    scale = 257 if dtype == np.uint16 else 1
    picture = flat(64, 64, *(value * scale for value in values), dtype=dtype, mode=mode)
    mask = np.zeros((64, 64), bool)
    mask[:8] = True
    assert (strip(tmp_path, picture, mask, picture)[:, :64] == 60).all()


def test_it_is_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "file").touch()
    picture, mask = flat(64, 64, 1, 2, 3), np.eye(64, dtype=bool)
    with pytest.raises(OutputError):
        save_comparison(picture, mask, picture, tmp_path / "file" / "strip.png")
    with pytest.raises(OutputError):
        save_comparison(picture, mask, picture, tmp_path / "missing" / "strip.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
