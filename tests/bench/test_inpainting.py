"""Held-out evaluation: classical methods that are sane, one set for all, a sheet, refusals."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from moebius.data.scenes import KINDS, scene, scene_kind
from moebius_bench.cli import app
from moebius_bench.paper.inpainting import (
    Case,
    Method,
    autoencoder,
    classical,
    contact_sheet,
    evaluate,
    folder_cases,
    held_out_cases,
    mean_colour,
    network,
    summaries,
)
from moebius_runtime import InpaintPipeline
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
    spoils = Method("spoils", lambda picture, mask: np.where(mask[:, :, None], picture, 0).astype(np.uint8), True)
    off = Method("off", lambda picture, mask: (picture.astype(int) // 2).astype(np.uint8), True)
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
    assert {one.kind for one in first} <= {kind.__name__ for kind in KINDS}


def test_the_sheet_has_a_column_for_each(ramp):
    cases = [case(ramp)] * 3
    sheet = contact_sheet(cases, {"x": [ramp] * 3, "y": [ramp] * 3}, rows=2, tile=32)
    assert sheet.size == (4 * 36, 20 + 2 * 36)


def test_strength_and_start_reach_the_network(tmp_path, tiny_bundle):
    options = ["inpaint", str(tiny_bundle), "--data", "scenes:1", "--size", "128", "--steps", "4", "--classical", ""]
    found = []
    for further in ([], ["--strength", "0.5"], ["--start", "pixels"]):
        file = tmp_path / "s.json"
        result = CliRunner().invoke(app, [*options, "--no-vae", "--json", str(file), *further], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        (score,) = json.loads(file.read_text())["scores"]
        found.append(score["mae"])
    assert len(set(found)) == 3


def test_the_command_with_a_bundle(tmp_path, tiny_bundle):
    options = ["inpaint", str(tiny_bundle), "--data", "scenes:2", "--size", "128", "--steps", "2"]
    files = ["--json", str(tmp_path / "s.json"), "--sheet", str(tmp_path / "s.png")]
    result = CliRunner().invoke(app, [*options, *files], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "s.json").read_text())["scores"]
    assert {score["method"] for score in scores} == {"mean", "telea", "ns", "vae", "fp32"}
    assert len(scores) == 10
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.format == "PNG"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classical", "magic"], "--classical magic: expected some of mean, telea, ns"),
        (["--classical", ""], "nothing to fill with"),
        (["--holes", "huge", "--data", "scenes:1"], "--masks huge: expected training or small or painted"),
        (["--real", "x"], "--real and --mask go together"),
        (["--real", "x", "--mask", "y", "--data", "scenes:1"], "--data with --real"),
        (["--real", "x", "--mask", "y"], "x is no folder"),
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


def test_no_method_sees_the_truth_but_the_bound(tiny_bundle):
    """In mode reference the strength is under 1: the pipeline starts from the whole picture that it is given."""
    pipeline = InpaintPipeline.from_bundle(tiny_bundle)
    assert pipeline.manifest.defaults.strength < 1
    mask = np.zeros((128, 128), bool)
    mask[40:80, 40:80] = True
    truth = scene(0, 128, held_out=True)
    other = np.where(mask[:, :, None], 255 - truth, truth)
    cases = [Case("a", "drawn", truth, mask), Case("b", "drawn", other, mask)]
    methods = [
        Method("net", network(pipeline, mode="reference", steps=2)),
        Method("vae", autoencoder(pipeline), sees_truth=True),
        Method("echo", lambda picture, mask: picture),
    ]
    scores, pictures = evaluate(cases, methods)
    for name in ("net", "echo"):
        assert (pictures[name][0] == pictures[name][1]).all()
    assert (pictures["vae"][0][mask] != pictures["vae"][1][mask]).any()
    assert all(score.psnr < 60 and score.mae > 0 for score in scores)


def test_methods_are_told_apart_and_checked(ramp):
    one = [case(ramp)]
    with pytest.raises(InputError, match="two methods are called x"):
        evaluate(one, [Method("x", mean_colour)] * 2)
    with pytest.raises(InputError, match=r"x gave uint8 \[64, 64\]; expected uint8 \[64, 64, 3\]"):
        evaluate(one, [Method("x", lambda picture, mask: picture[..., 0])])


def test_the_mean_error_is_in_grey_levels(ramp):
    scores, _ = evaluate([case(np.full_like(ramp, 90))], [Method("x", lambda picture, mask: picture + np.uint8(3))])
    assert scores[0].mae == 3


def test_a_scene_has_the_kind_that_is_said(monkeypatch):
    from moebius.data import scenes

    drawn = []
    spies = []
    for kind in KINDS:

        def spy(rng, canvas, kind=kind):
            drawn.append(kind.__name__)
            return kind(rng, canvas)

        spy.__name__ = kind.__name__
        spies.append(spy)
    monkeypatch.setattr(scenes, "KINDS", tuple(spies))
    said = [scene_kind(index, 1, True) for index in range(4)]
    for index in range(4):
        scene(index, 32, seed=1, held_out=True)
    assert drawn == said


def test_folders_that_pair(tmp_path, ramp):
    real, masks = tmp_path / "real", tmp_path / "masks"
    real.mkdir()
    masks.mkdir()
    one = case(ramp)
    Image.fromarray(ramp).save(real / "a.png")
    Image.fromarray(one.mask).convert("L").save(masks / "a.png")
    (found,) = folder_cases(real, masks)
    assert (found.name, found.kind) == ("a", "real")
    assert (found.picture == ramp).all()
    assert (found.mask == one.mask).all()
    written = tmp_path / "s.json"
    files = ["--real", str(real), "--mask", str(masks), "--json", str(written)]
    result = CliRunner().invoke(app, ["inpaint", "--classical", "mean", *files], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    content = json.loads(written.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["real"] == str(real)
    assert content["summaries"][0]["method"] == "mean"
    Image.new("L", (64, 64)).save(masks / "a.png")
    with pytest.raises(InputError, match=r"no pixel|nothing"):
        folder_cases(real, masks)
    Image.fromarray(ramp).save(real / "b.png")
    with pytest.raises(InputError, match="do not pair: b"):
        folder_cases(real, masks)


def test_equal_pictures_are_null_in_json(tmp_path):
    flat = tmp_path / "real"
    flat.mkdir()
    (tmp_path / "masks").mkdir()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(flat / "a.png")
    Image.fromarray(case(np.zeros((64, 64, 3), np.uint8)).mask).convert("L").save(tmp_path / "masks" / "a.png")
    written = tmp_path / "s.json"
    options = ["--real", str(flat), "--mask", str(tmp_path / "masks"), "--classical", "mean", "--json", str(written)]
    assert CliRunner().invoke(app, ["inpaint", *options], catch_exceptions=False).exit_code == 0
    content = json.loads(written.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert content["scores"][0]["psnr"] is None
    assert content["scores"][0]["mae"] == 0
