"""Masks of several squares through the pipeline: what each sees, what it fills, and what is reported beforehand."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.errors import InputError
from moebius_runtime.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline, make_options
from moebius_runtime.plan import Plan
from moebius_runtime.regions import Crop, find_squares, whole_square, window


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 255, (height, width, 3)).astype(np.uint8)


def wire(height: int, width: int, thick: int = 5) -> np.ndarray:
    """From edge to edge, slightly sloping."""
    mask = np.zeros((height, width), bool)
    for x in range(width):
        y = height // 3 + x * height // (8 * width)
        mask[y : y + thick, x] = True
    return mask


@pytest.fixture
def pipeline(toy_bundle) -> InpaintPipeline:
    return InpaintPipeline.from_bundle(toy_bundle.path, threads=1)


def test_every_square_sees_what_was_filled_and_nothing_that_was_not(pipeline):
    pixels, mask = photo(400, 600), wire(400, 600)
    seen, real = [], pipeline.backend.run

    def run(graph, inputs):
        if graph == "vae_encoder":
            seen.append(inputs["image"][0].transpose(1, 2, 0).copy())
        return real(graph, inputs)

    pipeline.backend.run = run
    plans = []
    options = make_options(steps=2, strength=1, blend="hard")
    result = pipeline.inpaint(Picture(pixels, "RGB"), mask, options, on_plan=plans.append).picture.pixels
    squares = plans[0].squares
    assert len(plans) == 1
    assert len(squares) == len(seen) == 6  # ceil((600 - 2 * 16) / 96)
    now, unknown = pixels.copy(), mask.copy()
    for square, image in zip(squares, seen, strict=True):
        view, own = window(square.crop, mask.shape), square.own(mask)
        expected = (now[view].astype(np.float32) / 127.5 - 1) * ~unknown[view][:, :, None]
        assert np.array_equal(image, expected)
        now[view][own] = result[view][own]
        unknown[view] &= ~own
    assert np.array_equal(now, result)
    assert (result != pixels).any(axis=2)[mask].mean() > 0.95


@pytest.mark.parametrize("colour", [False, True])
def test_what_is_removed_does_not_reach_what_other_squares_fill(pipeline, colour):
    """Also not through the colours around, where a part of the mask that is not filled yet may lie.

    All squares have the network's size here, so that no resampling mixes pixels.
    """
    mask = wire(400, 600)
    mask[200:226, 300:380] = True
    dark, bright = photo(400, 600), photo(400, 600)
    dark[mask], bright[mask] = 0, 255
    options = make_options(steps=2, strength=1, blend="hard", compensate_colour=colour)
    filled = [pipeline.inpaint(Picture(pixels, "RGB"), mask, options).picture.pixels for pixels in (dark, bright)]
    assert np.array_equal(*filled)


@pytest.mark.parametrize("shape", [(8, 700), (700, 8), (24, 1500), (3, 300)])
def test_pictures_of_extreme_shapes(pipeline, shape):
    pixels = photo(*shape)
    mask = wire(*shape, thick=2) if shape[1] > shape[0] else wire(shape[1], shape[0], thick=2).T
    options = make_options(steps=1, strength=1, blend="hard")
    result = pipeline.inpaint(Picture(pixels, "RGB"), mask, options).picture.pixels
    assert np.array_equal(result[~mask], pixels[~mask])
    assert (result != pixels).any(axis=2)[mask].mean() > 0.95


def test_the_plan_is_known_before_any_work(pipeline):
    mask, calls = wire(400, 600), []
    real = pipeline.backend.run
    pipeline.backend.run = lambda graph, inputs: (calls.append(graph), real(graph, inputs))[1]
    options = make_options(steps=4)
    plan = pipeline.plan(mask, options)
    assert [square.crop for square in plan.squares] == [square.crop for square in find_squares(mask, 128)]
    assert plan.steps == 3  # strength 0.99 leaves the first of 4 out
    assert plan.total_steps == 3 * len(plan.squares)
    assert plan.scales == (1, 1)
    assert calls == []
    steps = []
    pipeline.inpaint(
        Picture(photo(400, 600), "RGB"),
        mask,
        options,
        lambda *step: steps.append(step),
        lambda seen: calls.append((seen.total_steps, len(steps))),
    )
    assert calls[0] == (plan.total_steps, 0)
    assert steps == [(n, plan.total_steps) for n in range(1, plan.total_steps + 1)]
    whole = pipeline.plan(mask, make_options(fit="whole"))
    assert [square.crop for square in whole.squares] == [Crop(0, -100, 600)]
    assert np.array_equal(whole.squares[0].own(mask), mask)


def test_the_number_of_squares_is_bounded(pipeline):
    mask = np.zeros((900, 900), bool)
    mask[::100, ::100] = True
    pipeline.backend.run = None  # nothing is run
    with pytest.raises(InputError, match=r"needs \d+ squares .* limit of 3;"):
        pipeline.inpaint(Picture(photo(900, 900), "RGB"), mask, make_options(max_squares=3))
    assert len(pipeline.plan(mask, make_options(max_squares=3, fit="whole")).squares) == 1
    few = pipeline.plan(mask, make_options(max_squares=50))
    assert len(few.squares) <= 50 < len(pipeline.plan(mask, make_options(max_squares=10_000)).squares)
    assert few.scales[1] <= 2


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "many", None, float("nan")])
def test_other_bounds_are_refused(value):
    with pytest.raises(InputError, match=r"max-squares .*: expected a whole number, 1 or more"):
        make_options(max_squares=value)


def test_words_of_a_plan():
    def plan(*sides, steps=20):
        squares = tuple(whole_square(Crop(0, 0, side), (9000, 9000)) for side in sides)
        return Plan(squares, (9000, 9000), 512, steps)

    assert plan(512).describe() == "1 square of 512 pixels, 20 steps each"
    assert plan(1500, 512, 512, steps=1).describe() == "3 squares of 512 to 1500 pixels, 1 step each"
    assert plan(512, 1024).scales == (1, 2)
    assert plan(512).estimate(0.001) == "about 1 second"
    assert plan(512, 512).estimate(1.5) == "about 60 seconds"
    assert plan(512, 512).estimate(3) == "about 2 minutes"
    assert plan(*[512] * 60).estimate(9) == "about 3.0 hours"


def test_the_command_reports_squares_and_time(run, here):
    Image.fromarray(photo(400, 600)).save("a.png")
    Image.fromarray(wire(400, 600)).convert("L").point(lambda value: 255 * (value > 0)).save("m.png")
    command = ("a.png", "--mask", "m.png", "--out", "b.png", "--steps", 2, "--threads", 1)
    code, _, err = run(*command)
    text = " ".join(err)
    assert code == 0
    assert "note: a.png: 6 squares of 128 pixels, 1 step each" in text
    assert re.search(r"note: a\.png: about \d+ seconds?, from the time of one step \(\d+\.\d\d s\)", text)
    code, _, err = run(*command, "--max-squares", 2, "--overwrite")
    needed = re.search(r"needs (\d+) squares of the network, more than the limit of 2.*--max-squares \1", " ".join(err))
    assert code == 2
    assert run(*command, "--max-squares", int(needed.group(1)), "--overwrite")[0] == 0
    assert run(*command, "--max-squares", 0, "--overwrite")[0] == 2
    Image.fromarray(wire(400, 600)).convert("L").point(lambda value: 0).save("m.png")
    one = Image.new("L", (600, 400))
    one.paste(255, (100, 100, 120, 130))
    one.save("m.png")
    code, _, err = run(*command, "--overwrite")
    assert code == 0
    assert "square" not in " ".join(err)  # one square is nothing to report
