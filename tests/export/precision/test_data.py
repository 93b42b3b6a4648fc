"""`--data`: real picture files of any size, and what is refused before anything is measured."""

import sys

import numpy as np
import pytest
from PIL import Image

from moebius_export.commands import app as cli
from moebius_export.precision import planning
from moebius_export.precision.planning import Planner, PlanOptions
from moebius_export.trajectories.scenes import scenes_of
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import read_manifest


def add(folder, stem, size, hole, suffix=".jpg"):
    """A picture of `size` (width, height) and its mask, white in `hole` (left, top, right, bottom)."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    picture.save(folder / "images" / f"{stem}{suffix}")
    mask = Image.new("L", size)
    mask.paste(255, hole)
    mask.save(folder / "masks" / f"{stem}.png")


@pytest.fixture
def data(tmp_path):
    """Two pictures: one larger than the network's 128x128 and wide, one smaller and tall."""
    add(tmp_path / "data", "a", (400, 300), (100, 60, 300, 240))
    add(tmp_path / "data", "b", (70, 90), (10, 20, 60, 70), ".png")
    return tmp_path / "data"


def test_pictures_of_other_sizes_are_brought_to_the_network_s(data, fused_bundle):
    scenes = scenes_of(read_manifest(fused_bundle), 3, 5, 7, data)
    assert len(scenes) == 2
    for scene in scenes:
        assert (scene.picture.shape, scene.picture.dtype) == ((128, 128, 3), np.uint8)
        assert (scene.mask.shape, scene.mask.dtype) == ((128, 128), np.bool_)
        assert scene.options.steps == 3
    rows, columns = np.nonzero(scenes[0].mask)  # 400x300 in a square of 400: 128/400 of it, 50 pixels lower
    assert (columns.min(), columns.max()) == (32, 95)
    assert abs(rows.min() - (60 + 50) * 0.32) <= 1
    assert abs(rows.max() - (240 + 50) * 0.32) <= 1
    drawn = scenes_of(read_manifest(fused_bundle), 3, 2, 7)
    assert not np.array_equal(drawn[0].picture, scenes[0].picture)
    assert np.array_equal(drawn[1].options.noise, scenes[1].options.noise)


@pytest.mark.slow
def test_a_plan_from_picture_files_says_so(data, fused_bundle):
    options = PlanOptions(pictures=3, steps=2, evaluations=1, samples=1, error=1.0, data=data)
    plans = Planner(Bundle.open(fused_bundle), options, lambda what, done, total: None).run()
    measured = plans["unet"].measured
    assert (measured.data, measured.pictures, measured.steps) == ("given pictures", 2, 2)


def no_masks(folder):
    (folder / "masks" / "a.png").rename(folder / "masks" / "c.png")


def other_size(folder):
    Image.new("L", (400, 301), 255).save(folder / "masks" / "a.png")


def one_colour(value):
    return lambda folder: Image.new("L", (400, 300), value).save(folder / "masks" / "a.png")


def no_picture(folder):
    (folder / "images" / "a.jpg").write_bytes(b"not a picture at all")


def cut_off(folder):
    path = folder / "images" / "a.jpg"
    path.write_bytes(path.read_bytes()[:-900])


def two_of_a_stem(folder):
    (folder / "images" / "a.png").write_bytes((folder / "images" / "a.jpg").read_bytes())


def emptied(folder):
    for path in (folder / "images").iterdir():
        path.unlink()


def no_folder(folder):
    (folder / "masks").rename(folder / "holes")


def nearly_full(folder):
    mask = Image.new("L", (400, 300), 255)
    mask.putpixel((7, 7), 0)
    mask.save(folder / "masks" / "a.png")


def thin(folder):
    add(folder, "a", (9000, 64), (100, 10, 300, 40))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_masks, "no mask in {data}/masks for a.jpg; a mask has its picture's name"),
        (other_size, "{data}/masks/a.png is 400x301 pixels and the picture 400x300; they must agree."),
        (one_colour(0), "{data}/masks/a.png marks no pixel; white marks what to fill."),
        (one_colour(255), "{data}/masks/a.png marks every pixel, which leaves nothing to fill from"),
        (nearly_full, "{data}/masks/a.png marks every pixel once it has the network's 128x128"),
        (no_picture, "{data}/images/a.jpg"),
        (cut_off, "{data}/images/a.jpg"),
        (two_of_a_stem, "{data}/images/a.jpg and a.png have one stem"),
        (emptied, "no picture in {data}/images; expected files that end in"),
        (no_folder, "--data {data}: expected a folder with two folders, images and masks"),
        (thin, "{data}/images/a.jpg: use a picture that is less long"),
    ],
)
def test_bad_data_is_one_line_before_any_measuring(data, fused_bundle, monkeypatch, capsys, damage, words):
    damage(data)
    monkeypatch.setattr(planning, "follow", lambda *_: pytest.fail("it began to measure"))
    monkeypatch.setattr(sys, "argv", ["moebius-export", "precision", str(fused_bundle), "--data", str(data)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert words.format(data=data) in lines[0]
    assert "--resize-mask" not in lines[0]  # which is an option of another command
    assert "--invert-mask" not in lines[0]
