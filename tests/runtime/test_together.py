"""Several pictures in one run of a graph: each gets what it gets alone."""

from __future__ import annotations

import numpy as np
import pytest

from moebius_runtime.backends.ort import OrtBackend
from moebius_runtime.errors import CancelledError, InputError, OutputError
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline, make_options


@pytest.fixture(scope="module")
def open_toy(tmp_path_factory, make_toy):
    return make_toy(tmp_path_factory.mktemp("open") / "bundle", batch="batch")


@pytest.fixture
def pipeline(open_toy):
    return InpaintPipeline.from_bundle(open_toy.path, threads=1, memory="fast")


def picture(height, width, seed, alpha=False):
    rng = np.random.RandomState(seed)
    pixels = rng.randint(0, 256, (height, width, 4 if alpha else 3)).astype(np.uint8)
    return Picture(pixels[:, :, :3], "RGB", alpha=pixels[:, :, 3]) if alpha else Picture(pixels, "RGB")


def area(height, width, *boxes):
    mask = np.zeros((height, width), bool)
    for top, left, tall, wide in boxes:
        mask[top : top + tall, left : left + wide] = True
    return mask


def requests(**options):
    """Sizes and masks of all kinds: one square, two that lie apart, several that overlap and wait for each other."""
    shapes = [
        (128, 128, [(40, 48, 40, 32)]),
        (200, 700, [(30, 20, 40, 40), (90, 600, 50, 60)]),
        (150, 420, [(20, 20, 90, 380)]),
        (90, 131, [(0, 0, 30, 131)]),
        (128, 128, [(8, 8, 8, 8)]),
    ]
    return [
        (
            picture(height, width, seed),
            area(height, width, *boxes),
            make_options(**{"steps": 3, "seed": seed} | options),
        )
        for seed, (height, width, boxes) in enumerate(shapes)
    ]


def batches(monkeypatch):
    """Squares of each run of a graph, by graph, from now on."""
    found: dict[str, list[int]] = {}
    real = OrtBackend.run

    def run(self, graph, inputs):
        found.setdefault(graph, []).append(len(next(iter(inputs.values()))))
        return real(self, graph, inputs)

    monkeypatch.setattr(OrtBackend, "run", run)
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "reference", "strength": 0.9},
        {"mode": "reference", "strength": 1.0},
        {"start": "pixels", "sampler": "dpmpp-2m"},
        {"sampler": "unipc", "guidance_interval": (0, 400)},
        {"guidance_scale": 1.0, "compensate_colour": True},
        {"noise": np.random.RandomState(5).standard_normal((1, 4, 16, 16)).astype(np.float32)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("batch", [2, 3, 64])
def test_every_picture_gets_its_own_bytes_in_any_batch(pipeline, batch, options):
    wanted = requests(**options)
    alone = [pipeline.inpaint(*request) for request in wanted]
    together = pipeline.inpaint_many(wanted, batch=batch)
    for one, other, (given, _, _) in zip(together, alone, wanted, strict=True):
        np.testing.assert_array_equal(one.picture.pixels, other.picture.pixels)
        assert one.notes == other.notes
        assert not np.array_equal(one.picture.pixels, given.pixels)


def test_the_noise_between_the_steps_of_lcm_is_each_picture_s_own(tmp_path, make_toy, edit_manifest):
    toy = make_toy(tmp_path / "bundle", batch="batch")

    def distilled(content):
        content["graphs"]["unet"] = content["graphs"].pop("unet_conditional")
        content["guidance"] = {"distilled": 2.5}
        content["defaults"] |= {"sampler": "lcm", "num_inference_steps": 4, "guidance_scale": 2.5}

    edit_manifest(toy.path, distilled)
    pipeline = InpaintPipeline.from_bundle(toy.path, threads=1)
    wanted = requests(steps=None)
    for one, request in zip(pipeline.inpaint_many(wanted, batch=4), wanted, strict=True):
        np.testing.assert_array_equal(one.picture.pixels, pipeline.inpaint(*request).picture.pixels)


def test_a_graph_runs_once_for_a_batch_of_squares(pipeline, monkeypatch):
    wanted = requests()
    runs = [pipeline.plan(mask, options).runs for _, mask, options in wanted]
    waves = [sum(len(one[k]) for one in runs if k < len(one)) for k in range(max(map(len, runs)))]
    assert waves[0] > 5  # pictures
    assert len(waves) > 1
    sizes = [size for wave in waves for size in [4] * (wave // 4) + [wave % 4] * (wave % 4 > 0)]
    found = batches(monkeypatch)
    pipeline.inpaint_many(wanted, batch=4)
    assert found == {
        "vae_encoder": sizes,
        "unet": [size for size in sizes for _ in range(3)],
        "vae_decoder": sizes,
    }
    found.clear()
    pipeline.inpaint(*wanted[1])  # one picture takes one square at a time
    assert found == {"vae_encoder": [1, 1], "unet": [1] * 6, "vae_decoder": [1, 1]}


def test_options_that_differ_are_refused_but_for_seed_and_noise(pipeline):
    wanted = requests()
    wanted[1] = (*wanted[1][:2], make_options(steps=3, mask_dilate=7))
    with pytest.raises(InputError, match="the options of the pictures differ"):
        pipeline.inpaint_many(wanted, batch=2)
    assert pipeline.inpaint_many([], batch=2) == []


@pytest.mark.parametrize("batch", [0, -1, True, 2.0, "2"])
def test_what_is_no_batch(pipeline, batch):
    with pytest.raises(InputError, match="expected a whole number, 1 or more"):
        pipeline.inpaint_many(requests(), batch=batch)
    with pytest.raises(InputError, match="expected a whole number, 1 or more"):
        pipeline.check(make_options(), batch)


def test_a_bundle_with_a_fixed_batch_takes_one_square_a_run(toy_bundle):
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path, threads=1)
    for call in (lambda: pipeline.inpaint_many(requests(), batch=2), lambda: pipeline.check(make_options(), 2)):
        with pytest.raises(
            InputError, match=r"batch 2: vae_encoder of .* takes one square .*--dynamic-batch"
        ) as caught:
            call()
        assert "\n" not in str(caught.value)
    together = pipeline.inpaint_many(requests(), batch=1)
    for one, request in zip(together, requests(), strict=True):
        np.testing.assert_array_equal(one.picture.pixels, pipeline.inpaint(*request).picture.pixels)


@pytest.mark.parametrize("value", [np.nan, 3.0])
@pytest.mark.parametrize("graph", ["vae_encoder", "unet", "vae_decoder"])
def test_one_bad_square_of_a_batch_is_noticed(pipeline, monkeypatch, graph, value):
    real = pipeline.backend.run

    def run(name, inputs):
        output = real(name, inputs)
        if name == graph:
            output[-1] = value
        return output

    monkeypatch.setattr(pipeline.backend, "run", run)
    with pytest.raises(OutputError, match=r"NaN|constant"):
        pipeline.inpaint_many(requests(), batch=3)


def test_a_cancelled_call_stops(pipeline, monkeypatch):
    found = batches(monkeypatch)
    with pytest.raises(CancelledError):
        pipeline.inpaint_many(requests(), batch=4, cancelled=lambda: len(found.get("unet", [])) >= 2)
    assert found["unet"] == [4, 4]
    pipeline.inpaint_many(requests(), batch=4)


def test_transparent_pictures_and_notes_stay_with_their_picture(pipeline):
    wanted = [(picture(128, 128, 1, alpha=True), area(128, 128, (0, 0, 128, 120)), make_options(steps=2)),
              *((*request[:2], make_options(steps=2)) for request in requests())]  # fmt: skip
    alone = [pipeline.inpaint(*request) for request in wanted]
    assert alone[0].notes != alone[1].notes
    for one, other in zip(pipeline.inpaint_many(wanted, batch=5), alone, strict=True):
        assert one.notes == other.notes
        np.testing.assert_array_equal(one.picture.pixels, other.picture.pixels)
