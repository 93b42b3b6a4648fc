"""Held-out evaluation: classical methods that are sane, one set for all, a sheet, refusals."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moebius_bench.cli import app
from moebius_bench.inpainting import (
    Case,
    Method,
    classical,
    contact_sheet,
    evaluate,
    held_out_cases,
    mean_colour,
    summaries,
)
from moebius_runtime.errors import InputError, RuntimeUnavailableError


def case(picture, name="a", kind="drawn"):
    mask = np.zeros(picture.shape[:2], bool)
    mask[20:40, 24:44] = True
    return Case(name, kind, picture, mask)


@pytest.fixture
def ramp():
    values = np.linspace(0, 255, 64).round().astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(values[None, :, None], (64, 64, 3)))


def test_the_mean_is_the_mean(ramp):
    one = case(ramp)
    spoiled = ramp.copy()
    spoiled[one.mask] = 7  # what is in the hole must not matter
    filled = mean_colour(spoiled, one.mask)
    assert filled[30, 30, 0] == round(ramp[~one.mask][:, 0].mean())
    assert (filled[~one.mask] == ramp[~one.mask]).all()


@pytest.mark.parametrize("name", ["telea", "ns"])
def test_classical_methods_continue_what_is_around(ramp, name):
    one = case(ramp)
    spoiled = ramp.copy()
    spoiled[one.mask] = 7
    flat = np.full_like(ramp, 90)
    assert np.abs(classical(name)(flat, one.mask).astype(int) - 90).max() <= 3  # it rounds
    error = np.abs(classical(name)(spoiled, one.mask).astype(int) - ramp)[one.mask].mean()
    assert error < 12 < np.abs(mean_colour(ramp, one.mask).astype(int) - ramp)[one.mask].mean()
    red = np.zeros_like(ramp)
    red[..., 0] = 200
    assert classical(name)(red, one.mask)[30, 30, 0] > 190, "channels are not swapped"


def test_only_the_hole_counts_and_only_once(ramp):
    cases = [case(ramp, "a", "one"), case(ramp[::-1].copy(), "b", "two")]
    spoils = Method("spoils", lambda picture, mask: np.where(mask[:, :, None], picture, 0).astype(np.uint8))
    off = Method("off", lambda picture, mask: (picture.astype(int) // 2).astype(np.uint8))
    scores, pictures = evaluate(cases, [spoils, off])
    assert [score.psnr for score in scores if score.method == "spoils"] == [float("inf")] * 2
    assert (pictures["off"][0][~cases[0].mask] == ramp[~cases[0].mask]).all()
    rows = {(row.method, row.kind): row for row in summaries(scores)}
    inside = ramp[cases[0].mask].astype(float)
    expected = 10 * np.log10(255**2 / np.mean((inside - inside // 2) ** 2))
    assert rows["off", "one"].psnr == pytest.approx(expected)
    assert rows["off", "all"].pictures == 2
    against, _ = evaluate(cases, [spoils, off], reference="off")
    assert {score.method for score in against} == {"spoils"}
    assert against[0].psnr == pytest.approx(expected)
    with pytest.raises(InputError, match="--reference fp64: expected one of spoils, off"):
        evaluate(cases, [spoils, off], reference="fp64")


def test_the_same_seed_gives_the_same_set():
    first, second = (held_out_cases(["scenes:3"], 64, "small", 5) for _ in range(2))
    assert all((a.picture == b.picture).all() and (a.mask == b.mask).all() for a, b in zip(first, second, strict=True))
    other = held_out_cases(["scenes:3"], 64, "small", 6)
    assert any((a.mask != b.mask).any() for a, b in zip(first, other, strict=True))
    assert [one.name for one in first] == [one.name for one in other]


def test_the_sheet_has_a_column_for_each(ramp):
    cases = [case(ramp)] * 3
    sheet = contact_sheet(cases, {"x": [ramp] * 3, "y": [ramp] * 3}, rows=2, tile=32)
    assert sheet.size == (4 * 36, 20 + 2 * 36)


def test_the_command_with_a_bundle(tmp_path, tiny_bundle):
    options = ["inpaint", str(tiny_bundle), "--data", "scenes:2", "--size", "128", "--steps", "2"]
    files = ["--json", str(tmp_path / "s.json"), "--sheet", str(tmp_path / "s.png")]
    result = CliRunner().invoke(app, [*options, *files], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert {score["method"] for score in scores} == {"mean", "telea", "ns", "fp32"}
    assert len(scores) == 8
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.format == "PNG"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classical", "magic"], "--classical magic: expected some of mean, telea, ns"),
        (["--classical", ""], "nothing to fill with"),
        (["--holes", "huge", "--data", "scenes:1"], "--holes huge: expected training or small"),
        (["--json", "no/such/folder/x.json"], "cannot write"),
    ],
)
def test_refusals(options, words):
    result = CliRunner().invoke(app, ["inpaint", *options])
    assert words in str(result.exception)


def test_without_opencv_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(RuntimeUnavailableError, match="install the extra `quality`"):
        classical("telea")
