"""`moebius-inpaint`: what it writes and what it says."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_runtime import cli, console
from moebius_runtime.errors import MoebiusError
from moebius_runtime.pictures import load_picture, picture_from_image
from moebius_runtime.pipeline import InpaintPipeline


def pixels(height: int = 128, width: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


ONE = ["a.png", "--mask", "m.png", "--out", "b.png", "--threads", "1", "--steps", "3"]


ALL = ["in", "--mask", "m.png", "--out", "out/deep", "--threads", "1", "--steps", "2"]


def with_option(name: str, value: object) -> list[object]:
    """`ONE` with an option changed."""
    arguments: list[object] = list(ONE)
    if name in arguments:
        arguments[arguments.index(name) + 1] = value
        return arguments
    return [*arguments, name, value]


def test_one_picture(run, here):
    code, out, err = run(*ONE)
    assert code == 0
    assert re.fullmatch(r"1 picture filled in \d+\.\d s: b\.png\n", out)
    assert all("error" not in line for line in err)
    pipeline = InpaintPipeline.from_bundle(here / "moebius-bundle", threads=1)
    with Image.open("a.png") as image, Image.open("m.png") as mask:
        expected = pipeline(image, mask, steps=3)
    assert np.array_equal(load_picture("b.png").pixels, np.asarray(expected))
    assert sorted(os.listdir(here)) == ["a.png", "b.png", "m.png", "moebius-bundle"]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--steps", 4, "--guidance-scale", 1, "--strength", 0.6], {"steps": 4, "guidance_scale": 1, "strength": 0.6}),
        (["--mode", "reference"], {"mode": "reference"}),
        (["--mask-dilate", "auto", "--seed", 1], {"mask_dilate": "auto", "seed": 1}),
        (["--mask-dilate", 0, "--start", "cells"], {"mask_dilate": 0, "start": "cells"}),
        (["--seed", 7, "--sampler", "unipc"], {"seed": 7, "sampler": "unipc"}),
        (["--blend", "hard", "--fit", "whole"], {"blend": "hard", "fit": "whole"}),
        (["--mask-reduce", "nearest", "--compensate-colour"], {"mask_reduce": "nearest", "compensate_colour": True}),
        (["--noise", "noise.npy"], {"noise": np.full((1, 4, 16, 16), 0.5, np.float32)}),
    ],
)
def test_options_reach_the_pipeline(run, here, arguments, options):
    np.save("noise.npy", np.full((1, 4, 16, 16), 0.5, np.float32))
    picture, mask = Image.open("a.png").resize((200, 160)), Image.open("m.png").resize((200, 160))
    picture.save("a.png")
    mask.save("m.png")
    assert run("a.png", "--mask", "m.png", "--out", "b.png", "--threads", 1, *arguments)[0] == 0
    pipeline = InpaintPipeline.from_bundle(here / "moebius-bundle", threads=1)
    expected = np.asarray(pipeline(picture, mask, **options))
    assert np.array_equal(load_picture("b.png").pixels, expected)
    assert not np.array_equal(expected, np.asarray(pipeline(picture, mask)))  # the options mattered


def test_options_of_the_mask(run, here):
    before = load_picture("a.png").pixels
    mask = np.asarray(Image.open("m.png")) > 0
    run(*ONE, "--blend", "hard", "--invert-mask", "--mask-dilate", 0)
    changed = (load_picture("b.png").pixels != before).any(axis=2)
    assert not changed[mask].any()
    assert changed[~mask].mean() > 0.9
    run(*ONE, "--blend", "hard", "--mask-dilate", 5, "--overwrite")
    changed = (load_picture("b.png").pixels != before).any(axis=2)
    assert changed[35:85, 43:85].mean() > 0.9
    assert not changed[:35].any()
    Image.open("m.png").resize((64, 64), Image.Resampling.NEAREST).save("m.png")
    run(*ONE, "--blend", "hard", "--resize-mask", "--mask-dilate", "0", "--overwrite")
    changed = (load_picture("b.png").pixels != before).any(axis=2)
    assert changed[mask].mean() > 0.9
    assert not changed[~mask].any()


def test_a_note_on_the_options_is_printed_once(run, folder):
    code, out, err = run(*ALL, "--mode", "reference", "--strength", 0.9)
    assert code == 0
    assert "3 pictures filled" in out
    assert sum("starts from the picture with what is to be removed" in line for line in err) == 1


def test_the_default_removes_what_few_steps_and_a_start_from_the_picture_bring_back(run, here):
    """Two pictures that differ under the mask alone become one."""
    results = []
    for value in (0, 255):
        picture = pixels()
        picture[40:80, 48:80] = value
        Image.fromarray(picture).save("a.png")
        assert run("a.png", "--mask", "m.png", "--out", "b.png", "--threads", 1, "--steps", 2, "--overwrite")[0] == 0
        results.append(Path("b.png").read_bytes())
    assert results[0] == results[1]


def test_a_mask_of_stored_pixels(run, here):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = pixels(128, 160)
    Image.fromarray(stored).save("a.png", exif=exif)
    mask = np.zeros((128, 160), np.uint8)
    mask[20:50, 100:140] = 255
    Image.fromarray(mask).save("m.png")
    code, _, err = run(*ONE)
    assert code == 2
    assert "the photograph is rotated (EXIF orientation 6)" in err[-1]
    assert "--mask-orientation stored" in err[-1]
    assert run(*ONE, "--mask-orientation", "stored", "--blend", "hard", "--mask-dilate", 0)[0] == 0  # as advised
    changed = (load_picture("b.png").pixels != np.rot90(stored, -1)).any(axis=2)
    turned = np.rot90(mask > 0, -1)
    assert changed[turned].mean() > 0.9
    assert not changed[~turned].any()


def test_quality_of_a_jpeg(run):
    sizes = []
    for quality in (20, 90):
        assert run("a.png", "--mask", "m.png", "--out", f"{quality}.jpg", "--quality", quality)[0] == 0
        sizes.append(os.path.getsize(f"{quality}.jpg"))
    assert sizes[1] > 2 * sizes[0]


def test_another_bundle(run, here):
    (here / "moebius-bundle").rename(here / "other")
    assert run(*ONE, "--bundle", "other")[0] == 0


def test_a_comparison(run, here):
    assert run(*ONE, "--save-comparison")[0] == 0
    with Image.open("b-comparison.png") as strip:
        assert strip.size == (3 * 128 + 16, 128)


def test_existing_results_are_kept_or_replaced(run, here):
    Path("b.png").write_bytes(b"precious")
    code, out, err = run(*ONE)
    assert code == 0
    assert "0 pictures filled, 1 skipped" in out
    assert err == ["note: b.png exists and is kept; --overwrite replaces it"]
    assert Path("b.png").read_bytes() == b"precious"
    assert run(*ONE, "--overwrite")[0] == 0
    assert load_picture("b.png").shape == (128, 128)
    Path("b.png").unlink()
    Path("b-comparison.png").write_bytes(b"precious")
    code, out, err = run(*ONE, "--save-comparison")
    assert "0 pictures filled, 1 skipped" in out
    assert Path("b-comparison.png").read_bytes() == b"precious"
    assert not Path("b.png").exists()


def test_stand_in_weights_are_said_aloud(run, here, make_toy, toy_bundle):
    model = InpaintPipeline.from_bundle(toy_bundle.path).manifest.model
    weights = model.unet.model_copy(update={"stand_in": True})
    make_toy(here / "random", model=model.model_copy(update={"unet": weights}))
    _, _, err = run(*ONE, "--bundle", "random")
    assert any("stand-in weights (random numbers)" in line for line in err)


# --- folders ------------------------------------------------------------------------------------------------


def test_a_folder_with_one_mask_for_all(run, folder):
    code, out, _ = run(*ALL)
    assert code == 0
    assert re.fullmatch(r"3 pictures filled in \d+\.\d s: out/deep\n", out)
    assert sorted(os.listdir("out/deep")) == ["a.png", "b.jpg", "c.png"]
    assert not np.array_equal(load_picture("out/deep/a.png").pixels, load_picture("in/a.png").pixels)


def test_a_folder_with_masks_by_stem(run, folder, here):
    (here / "masks").mkdir()
    for index, stem in enumerate("abc"):
        mask = np.zeros((128, 128), np.uint8)
        mask[20 * index : 20 * index + 20, :30] = 255
        Image.fromarray(mask).save(here / "masks" / f"{stem}.png")
    assert run("in", "--mask", "masks", "--out", "out", "--blend", "hard", "--steps", 2, "--mask-dilate", 0)[0] == 0
    changed = (load_picture("out/c.png").pixels != load_picture("in/c.bmp").pixels).any(axis=2)
    assert changed[40:60, :30].mean() > 0.9
    assert changed.sum() <= 20 * 30


@pytest.mark.parametrize("name", ["b.jpg", "a.png", "c.bmp"])
def test_a_broken_picture_in_a_folder_is_reported_and_the_rest_goes_on(run, folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:300])
    code, out, err = run(*ALL)
    assert code == 1
    assert re.fullmatch(r"2 pictures filled, 1 failed in \d+\.\d s: out/deep\n", out)
    (report,) = [line for line in err if "not done" in line]
    assert f"in/{name}" in report
    assert len(os.listdir("out/deep")) == 2
    (folder / name).unlink()
    Image.fromarray(pixels()).save(folder / name)
    code, out, _ = run(*ALL)  # what is done is not done again
    assert code == 0
    assert "1 picture filled, 2 skipped" in out


def test_a_folder_of_one_broken_picture_is_still_a_folder(run, folder):
    for name in ("a.png", "c.bmp"):
        (folder / name).unlink()
    (folder / "b.jpg").write_bytes(b"no picture")
    code, out, err = run(*ALL)
    assert code == 1
    assert "0 pictures filled, 1 failed" in out
    assert any("not done" in line for line in err)


def test_a_mask_that_fits_some_pictures(run, folder):
    Image.fromarray(pixels(100, 100)).save(folder / "b.jpg")
    code, out, err = run(*ALL)
    assert code == 1
    assert "2 pictures filled, 1 failed" in out
    assert any("in/b.jpg" in line and "100x100" in line for line in err)


def test_a_damaged_bundle_ends_a_folder_at_once(folder, refused, toy_copy):
    with open(toy_copy.path / "vae_decoder/model.onnx.data", "r+b") as stream:
        stream.write(b"damage")
    refused([*ALL, "--bundle", toy_copy.path], "vae_decoder/model.onnx.data", "SHA-256")


@pytest.mark.usefixtures("folder")
def test_a_graph_that_cannot_be_loaded_ends_a_folder_at_once(run, toy_copy, reseal):
    """Its hash is right, so this comes out only as the first picture is filled; every other would fail alike."""
    path = toy_copy.path / "unet/model.onnx"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"Tanh", b"Tonh"))
    reseal(toy_copy.path)
    code, out, err = run(*ALL, "--bundle", toy_copy.path)
    assert (code, out) == (2, "")
    assert sum("Tonh" in line for line in err) == len(err) == 1


# --- names, streams, signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["[bold]x.png", "a  b.png", "a{0}b.png", "\u03bb\u732b.png", "-x.png", "%s.png"])
def test_odd_names_come_through_and_are_shown(run, here, name):
    (here / "in").mkdir()
    shutil.copy("a.png", here / "in" / name)
    code, _, err = run("in", "--mask", "m.png", "--out", "out", "--steps", 2)
    assert code == 0, err
    assert os.listdir("out") == [name]
    _, _, err = run("in", "--mask", "m.png", "--out", "out", "--steps", 2)
    assert err == [f"note: out/{name} exists and is kept; --overwrite replaces it"]


@pytest.mark.parametrize("folder", ["out[/x]", "out[bold]"])
def test_brackets_in_the_summary_are_no_markup(run, folder):
    code, out, _ = run("a.png", "--mask", "m.png", "--out", f"{folder}.png".replace("/", "-"), "--steps", 2)
    assert code == 0
    assert folder.replace("/", "-") in out


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes are Linux's")
@pytest.mark.parametrize("name", [b"a\x1b[31mb.png", b"a\nb.png", b"a\xffb.png", b"a\rb.png"])
def test_names_that_a_terminal_would_obey(here, name, run_process):
    (here / "in").mkdir()
    (here / os.fsdecode(b"in/" + name)).write_bytes(b"no picture")
    code, out, err = run_process("in", "--mask", "m.png", "--out", "out", "--steps", 2)
    assert code == 1
    assert out.count("\n") == 1
    (line,) = [line for line in err if "not done" in line]
    assert line.isprintable()
    (here / os.fsdecode(b"in/" + name)).write_bytes((here / "a.png").read_bytes())
    code, out, err = run_process(os.fsdecode(b"in/" + name), "--mask", "m.png", "--out", os.fsdecode(name))
    assert (code, out.count("\n")) == (0, 1)


def test_in_a_process_of_its_own(here, run_process):
    code, out, err = run_process(*ONE)
    assert code == 0
    assert out.endswith(": b.png\n")
    code, out, err = run_process(*with_option("--bundle", "nowhere"))
    assert (code, out, len(err)) == (2, "", 1)
    code, out, err = run_process(*with_option("--steps", "0"))
    assert (code, out, len(err)) == (2, "", 1)


def test_an_interruption(run, here, monkeypatch, files_here):
    def interrupt(*_args, **_more):
        raise KeyboardInterrupt

    before = files_here()
    monkeypatch.setattr(InpaintPipeline, "inpaint", interrupt)
    code, out, _ = run(*ONE)
    assert (code, out) == (130, "")
    assert files_here() == before


def test_a_bug_keeps_its_traceback(here, monkeypatch):
    def bug(*_args, **_more):
        raise ZeroDivisionError

    monkeypatch.setattr(InpaintPipeline, "inpaint", bug)
    monkeypatch.setattr(sys, "argv", ["moebius-inpaint", *ONE])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_errors_are_one_printable_line(capsys):
    def fail():
        raise MoebiusError("first\nsecond\t\x1b[31m \udcff \u732b")

    assert console._exit_code(fail, (MoebiusError,)) == 2
    assert capsys.readouterr().err == "error: first second\\t\\x1b[31m \\udcff \u732b\n"


def test_pictures_in_memory_and_on_disk_are_one(run):
    """16-bit grey with alpha, through the command line: alpha as it was, depth as it was."""
    grey = np.random.RandomState(0).randint(0, 65536, (128, 128)).astype(np.uint16)
    Image.fromarray(grey).save("a.png")
    assert run(*ONE, "--blend", "hard", "--mask-dilate", 0)[0] == 0
    after = load_picture("b.png")
    mask = np.asarray(Image.open("m.png")) > 0
    assert after.bits == 16
    assert np.array_equal(after.pixels[:, :, 0][~mask], grey[~mask])
    assert picture_from_image(Image.open("b.png")).bits == 16
