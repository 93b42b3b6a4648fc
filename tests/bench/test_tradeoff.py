"""Time against quality: variants by text, the front, the page and the command; the perceptual distance."""

from __future__ import annotations

import importlib.util
import json
import math
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from moebius_bench.cli import app
from moebius_bench.paper import imagenet_features
from moebius_bench.paper.imagenet_features import ImageNetDistance
from moebius_bench.tradeoff.measure import Distance, Row, Tradeoff, marked
from moebius_bench.tradeoff.page import page, scatter
from moebius_bench.tradeoff.variants import chosen_variants, parse_variant
from moebius_runtime import InpaintPipeline
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError

torch = pytest.importorskip("torch")


def row(name, seconds, error, front=False):
    distance = Distance(psnr=20.0, ssim=0.5, perceptual=error)
    stages = dict.fromkeys(("preprocess", "encode", "step", "decode", "paste"), seconds / 5)
    return Row(
        name=name, seconds=seconds, stages=stages, truth=distance, best=distance, reference=distance, brightness=0.0,
        front=front,
    )  # fmt: skip


def test_a_variant_is_its_options():
    found = parse_variant("best,steps=8,sampler=unipc,guidance-interval=200:800,strength=0.5")
    options = found.options
    assert found.name == "best,steps=8,sampler=unipc,guidance-interval=200:800,strength=0.5"
    assert (options.mode, options.steps, options.sampler, options.strength) == ("best", 8, "unipc", 0.5)
    assert options.guidance_interval == (200, 800)
    assert (options.blend, options.mask_dilate) == ("hard", 0)
    soft = parse_variant("fast,blend=soft,mask_dilate=auto").options
    assert (soft.mode, soft.blend, soft.mask_dilate) == ("fast", "soft", "auto")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("quick", "mode 'quick'"),
        ("best,steps", "'steps' is no OPTION=VALUE"),
        ("best,steps=many", "steps 'many' is no number"),
        ("best,colour=red", "unknown option colour"),
        ("best,decode=half", "decode 'half'"),
        ("best,guidance_interval=9:x", "no number"),
        ("best,guidance_interval=9:3", "guidance-interval"),
    ],
)
def test_what_is_no_variant(text, words):
    with pytest.raises(InputError, match=re.escape(f"--variant {text}") + f".*{words}"):
        parse_variant(text)


def test_the_default_variants_are_those_that_run(tiny_bundle):
    pipeline = InpaintPipeline.from_bundle(tiny_bundle, threads=1)
    variants, notes = chosen_variants([], pipeline)
    names = [variant.name for variant in variants]
    assert names[:4] == ["reference", "best", "balanced", "fast"]
    assert "best,decode=masked" not in names  # this bundle has no parts
    assert any("best,decode=masked: left out" in note for note in notes)
    assert any("best,vae_decoder=tiny: left out" in note for note in notes)
    given, _ = chosen_variants(["fast"], pipeline)
    assert [variant.name for variant in given] == ["reference", "best", "fast"]
    with pytest.raises(InputError, match="given twice"):
        chosen_variants(["fast", "fast"], pipeline)
    with pytest.raises(InputError, match="--variant best,decode=masked: decode 'masked'"):
        chosen_variants(["best,decode=masked"], pipeline)


def test_the_front_by_the_slow_definition():
    rng = np.random.RandomState(0)
    for _ in range(50):
        rows = [row(str(i), float(rng.randint(1, 6)), float(rng.randint(1, 6))) for i in range(8)]
        points = [(one.seconds, one.truth.perceptual) for one in rows]
        for one, point in zip(marked(rows), points, strict=True):
            better = [other for other in points if other[0] <= point[0] and other[1] <= point[1] and other != point]
            assert one.front == (not better)


def test_the_drawing_places_points_by_time_and_error():
    drawn = str(scatter([row("slow", 2.0, 0.1, True), row("quick & dirty", 1.0, 0.3, True), row("bad", 2.0, 0.3)]))
    places = [
        (float(x), float(y)) for x, y in re.findall(r'class="dot s\d" x1="([\d.]+)" x2="[\d.]+" y1="([\d.]+)"', drawn)
    ]
    (slow, low), (quick, high), (bad, top) = places
    assert slow == bad == 2 * quick - 20  # time from 0, in a frame that begins at 20
    assert (low, high, top) == (280.0, 20.0, 20.0)
    assert len(re.findall('class="dot s0"', drawn)) == 2
    assert "quick &amp; dirty" in drawn
    assert re.search(r'polyline class="line s0" points="490\.0,20\.0 960\.0,280\.0"', drawn)


def test_the_page_holds_every_row_and_no_script():
    rows = marked([row("best", 2.0, 0.1), row("<b>fast</b>", 1.0, 0.3)])
    result = Tradeoff(
        bundle="b", runtime={"runtime": "x"}, machine={}, data={}, pictures=1, quality="q", rows=rows, notes=["a note"]
    )
    text = page(result)
    assert "<script" not in text
    assert "&lt;b&gt;fast&lt;/b&gt;" in text
    assert "<b>fast</b>" not in text
    assert "a note" in text
    assert "1 picture<" in text
    without = [one.model_copy(update={"truth": Distance(psnr=9.0, ssim=0.1, perceptual=None)}) for one in rows]
    assert "PSNR to the truth" in page(result.model_copy(update={"rows": without}))


def test_the_command(tmp_path, fused_bundle):
    files = [tmp_path / name for name in ("t.json", "t.html", "t.png")]
    options = ["--data", "scenes:1", "--size", "128", "--no-perceptual", "--variant", "fast", "--threads", "1"]
    outputs = ["--json", str(files[0]), "--html", str(files[1]), "--sheet", str(files[2])]
    done = CliRunner().invoke(app, ["tradeoff", str(fused_bundle), *options, *outputs], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result = Tradeoff.model_validate(json.loads(files[0].read_text()))
    assert [one.name for one in result.rows] == ["reference", "best", "fast"]
    assert result.rows[1].best.psnr == 99
    assert all(math.isfinite(one.truth.psnr) and one.seconds > 0 for one in result.rows)
    assert any("random test weights" in note for note in result.notes)
    assert files[1].read_text().startswith("<!doctype html>")
    assert files[2].stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--real", "x"], "--real and --mask go together"),
        (["--real", "x", "--mask", "y", "--data", "scenes:1"], "--data with --real"),
        (["--json", "no/such/folder/x.json"], "cannot write"),
        (["--no-perceptual", "--variant", "slow"], "mode 'slow'"),
    ],
)
def test_wrong_usage(tiny_bundle, options, words):
    done = CliRunner().invoke(app, ["tradeoff", str(tiny_bundle), *options])
    assert isinstance(done.exception, MoebiusError), done.output
    assert words in str(done.exception)


# --- the perceptual distance --------------------------------------------------------------------------------


def _weights():
    """Random weights of EfficientNet-Lite0's geometry."""
    rng = torch.Generator().manual_seed(0)
    blocks = [  # expansion, kernel, inputs, outputs
        (1, 3, 32, 16), (6, 3, 16, 24), (6, 3, 24, 24), (6, 5, 24, 40), (6, 5, 40, 40), (6, 3, 40, 80),
        (6, 3, 80, 80), (6, 3, 80, 80), (6, 5, 80, 112), (6, 5, 112, 112), (6, 5, 112, 112), (6, 5, 112, 192),
        (6, 5, 192, 192), (6, 5, 192, 192), (6, 5, 192, 192), (6, 3, 192, 320),
    ]  # fmt: skip
    found = {}

    def conv(name, *shape):
        found[f"{name}.weight"] = torch.randn(shape, generator=rng) / math.prod(shape[1:]) ** 0.5

    def norm(name, channels):
        for part, low, high in (("weight", 0.5, 2), ("bias", -1, 1), ("running_mean", -1, 1), ("running_var", 0.5, 2)):
            found[f"{name}.{part}"] = torch.empty(channels).uniform_(low, high, generator=rng)

    conv("_conv_stem", 32, 3, 3, 3)
    norm("_bn0", 32)
    for index, (expansion, kernel, inputs, outputs) in enumerate(blocks):
        name, wide = f"_blocks.{index}", expansion * inputs
        if expansion > 1:
            conv(f"{name}._expand_conv", wide, inputs, 1, 1)
            norm(f"{name}._bn0", wide)
        conv(f"{name}._depthwise_conv", wide, 1, kernel, kernel)
        norm(f"{name}._bn1", wide)
        conv(f"{name}._project_conv", outputs, wide, 1, 1)
        norm(f"{name}._bn2", outputs)
    return found


@pytest.fixture(scope="module")
def distance():
    return ImageNetDistance(_weights())


def noise(seed, height=64, width=96):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def test_features_halve_five_times(distance):
    shapes = [tuple(one.shape) for one in distance.features(noise(0, 65, 97))]
    assert shapes == [(1, 16, 33, 49), (1, 24, 17, 25), (1, 40, 9, 13), (1, 112, 5, 7), (1, 320, 3, 4)]


def test_same_padding_is_tensorflows(distance):
    """An even side at stride 2 is padded at the end alone: 3 taps see pixels 0, 1, 2 first."""
    x = torch.arange(36.0).reshape(1, 1, 6, 6)
    distance._weights["probe.weight"] = torch.tensor([[[[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]]])  # the window's corner
    assert distance._convolved(x, "probe", 2)[0, 0].tolist() == x[0, 0, ::2, ::2].tolist()


def test_the_distance_counts_inside_the_mask_only(distance):
    first, second = noise(1), noise(1)
    mask = np.zeros((64, 96), bool)
    mask[:, :16] = True
    assert distance(first, second, mask) == 0
    second[20:40, 4:12] = 255 - second[20:40, 4:12]
    inside = distance(first, second, mask)
    assert inside > 0.01
    assert distance(second, first, mask) == pytest.approx(inside)
    assert distance(first, second, ~mask) < inside / 3
    halfway = first.copy()
    halfway[20:40, 4:12] = (first[20:40, 4:12].astype(int) + second[20:40, 4:12]) // 2
    assert 0 < distance(first, halfway, mask) < inside
    with pytest.raises(InputError, match="expected one size"):
        distance(first, second[:32], mask)
    with pytest.raises(InputError, match="marks no pixel"):
        distance(first, second, np.zeros_like(mask))


def test_without_the_package_the_message_names_it(monkeypatch):
    monkeypatch.setattr(imagenet_features, "PACKAGE", "no_such_package")
    with pytest.raises(RuntimeUnavailableError, match=r"no-such-package; install it with .*quality.*--no-perceptual"):
        imagenet_features.weights_path()


@pytest.mark.skipif(not importlib.util.find_spec(imagenet_features.PACKAGE), reason="extra quality")
def test_the_packages_weights_fit():
    real = ImageNetDistance()
    assert {name: tuple(one.shape) for name, one in _weights().items()}.items() <= {
        name: tuple(one.shape) for name, one in real._weights.items()
    }.items()
    assert real(noise(1), noise(2), np.ones((64, 96), bool)) > 0.1
