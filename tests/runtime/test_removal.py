"""What mode `best` promises of a removal, on generated cases: independence, completeness, exactness outside.

The backend is a fake whose every output depends on every input, so that nothing hidden can pass unseen.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.backends import Backend
from moebius_runtime.blend import feather_width, outward_feather
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import InputError, MoebiusError
from moebius_runtime.masks import automatic_dilation, dilated, grown_mask
from moebius_runtime.pictures import Picture, picture_from_image
from moebius_runtime.pipeline import InpaintPipeline, make_options

CHANNELS = {"L": 1, "RGB": 3, "CMYK": 4}
SIDE, BLOCK = 16, 8
MIX = np.random.RandomState(1).standard_normal((12, 9)).astype(np.float32)


class Fake(Backend):
    """The toy bundle's graphs in a few lines of NumPy. Means over the whole square reach every output."""

    name = "fake"

    def _load(self, graph):
        return graph

    def _unload(self, handle):
        pass

    def _run(self, handle, inputs):
        if handle == "vae_encoder":
            image = inputs["image"]
            means = image.reshape(1, 3, SIDE, BLOCK, SIDE, BLOCK).mean(axis=(3, 5))
            grain = np.abs(image[:, :, 1::BLOCK, 2::BLOCK] - image[:, :, ::BLOCK, ::BLOCK])
            latent = np.concatenate([means, grain[:, :1] + grain.sum(dtype=np.float64).astype(np.float32)], axis=1)
            return latent.astype(np.float32)
        if handle == "vae_decoder":
            latent = inputs["latent"]
            smooth = latent.repeat(BLOCK, axis=2).repeat(BLOCK, axis=3)[:, :3] + 0.1 * np.tanh(latent.mean())
            return smooth.astype(np.float32)
        sample = inputs["sample"]
        mixed = np.einsum("oc,bchw->bohw", MIX[:4], sample) + np.tanh(sample.mean())
        predicted = sample[:, :4] * 0.9 + 0.1 * np.tanh(mixed) + 1e-4 * float(inputs["timestep"][0])
        return predicted.astype(np.float32)

    def describe(self):
        return {}


@pytest.fixture(scope="module")
def pipeline(toy_bundle) -> InpaintPipeline:
    return InpaintPipeline(Fake(Bundle.open(toy_bundle.path)), memory="fast")


def random_mask(rng: np.random.RandomState, height: int, width: int) -> np.ndarray:
    """Boxes, thin lines or specks, some of them at the border."""
    mask = np.zeros((height, width), bool)
    for _ in range(rng.randint(1, 5)):
        tall, wide = [(rng.randint(8, 40), rng.randint(8, 40)), (rng.randint(1, 4), 45), (3, 3)][rng.randint(3)]
        top, left = rng.randint(-2, height - 2), rng.randint(-2, width - 2)
        mask[max(0, top) : top + tall, max(0, left) : left + wide] = True
    return mask


def random_case(seed: int) -> tuple[Picture, np.ndarray, dict]:
    """A picture of any kind, a mask and options."""
    rng = np.random.RandomState(seed)
    mode = ["L", "RGB", "RGB", "CMYK"][rng.randint(4)]
    dtype = [np.uint8, np.uint16][rng.randint(2)]
    height, width = rng.randint(64, 260, 2)
    pixels = rng.randint(0, np.iinfo(dtype).max + 1, (height, width, CHANNELS[mode])).astype(dtype)
    alpha = None
    if mode != "CMYK" and rng.randint(2):
        alpha = rng.randint(0, np.iinfo(dtype).max + 1, (height, width)).astype(dtype)
        alpha[rng.randint(0, height) :, : rng.randint(1, width)] = 0
        alpha[rng.rand(height, width) < 0.05] = 0
    options = {
        "steps": int(rng.randint(1, 6)),
        "strength": float(rng.choice([1.0, 1.0, 0.99, 0.6])),
        "sampler": str(rng.choice(["ddim", "dpmpp-2m", "unipc"])),
        "guidance_scale": float(rng.choice([1.0, 2.5])),
        "fit": str(rng.choice(["crop", "whole"])),
        "blend": str(rng.choice(["soft", "hard"])),
        "mask_reduce": str(rng.choice(["nearest", "max"])),
        "mask_dilate": [None, "auto", 0, 1, 7][rng.randint(5)],
        "compensate_colour": bool(rng.randint(2)),
        "start": [None, "pixels", "cells"][rng.randint(3)],
        "seed": int(rng.randint(1000)),
    }
    if int(options["steps"] * options["strength"]) == 0:
        options["strength"] = 1.0
    return Picture(pixels, mode, alpha=alpha, usable_profile=False), random_mask(rng, height, width), options


def with_other_colours(picture: Picture, where: np.ndarray, seed: int) -> Picture:
    """The picture with random, black or white pixels at `where`."""
    rng = np.random.RandomState(seed)
    top = np.iinfo(picture.pixels.dtype).max
    pixels = picture.pixels.copy()
    values = [rng.randint(0, top + 1, pixels.shape), np.zeros(pixels.shape), np.full(pixels.shape, top)][seed % 3]
    pixels[where] = values.astype(pixels.dtype)[where]
    return replace(picture, pixels=pixels)


def filled(pipeline: InpaintPipeline, picture: Picture, mask: np.ndarray, options: dict) -> Picture | str:
    """The result, or the message of a refusal, which must not depend on what is hidden either."""
    try:
        return pipeline.inpaint(picture, mask, make_options(**options)).picture
    except MoebiusError as error:
        return str(error)


@pytest.mark.parametrize("first", range(0, 240, 20))
def test_what_lies_under_the_mask_has_no_influence(pipeline, first):
    """20 pairs each: pictures that differ under the mask, and in the colours of invisible pixels."""
    compared = 0
    for seed in range(first, first + 20):
        picture, mask, options = random_case(seed)
        invisible = np.zeros(mask.shape, bool) if picture.alpha is None else picture.alpha == 0
        other = with_other_colours(picture, mask | invisible, seed)
        assert not np.array_equal(picture.pixels, other.pixels)
        one, two = filled(pipeline, picture, mask, options), filled(pipeline, other, mask, options)
        if isinstance(one, str):
            assert one == two
            continue
        grown = grown_mask(mask, "auto" if options["mask_dilate"] is None else options["mask_dilate"])
        hidden = invisible & ~grown
        for before, after in ((picture, one), (other, two)):  # what is invisible and not masked stays untouched
            assert np.array_equal(after.pixels[hidden], before.pixels[hidden]), (seed, options)
            kept = ~grown if options["blend"] == "hard" else ~dilated(grown, 24)
            assert np.array_equal(after.pixels[kept], before.pixels[kept]), (seed, options)
            assert after.alpha is None or np.array_equal(after.alpha, before.alpha)
        assert np.array_equal(one.pixels[~hidden], two.pixels[~hidden]), (seed, options)
        assert one.pixels[~hidden].tobytes() == two.pixels[~hidden].tobytes()
        compared += 1
    assert compared >= 18


def test_the_reference_depends_on_what_lies_under_the_mask(pipeline):
    """So the fake backend would show it: the test above can fail."""
    shown = 0
    for seed in range(30):
        picture, mask, options = random_case(seed)
        if options["strength"] == 1 or picture.alpha is not None:
            continue
        other = with_other_colours(picture, mask, seed)
        pair = [
            filled(pipeline, each, mask, options | {"mode": "reference", "start": None}) for each in (picture, other)
        ]
        shown += not np.array_equal(pair[0].pixels, pair[1].pixels)
    assert shown >= 5


@pytest.mark.parametrize(
    "options", [{}, {"strength": 0.6, "start": "cells", "blend": "hard"}, {"fit": "whole", "steps": 2}]
)
@pytest.mark.parametrize("runtime", ["ort-cpu", "torch"])
def test_independence_on_a_real_network(request, runtime, options):
    bundle = request.getfixturevalue("fused_bundle")
    if runtime == "torch":
        pytest.importorskip("torch")
    pipeline = InpaintPipeline.from_bundle(bundle, runtime, threads=1)
    pixels = np.random.RandomState(0).randint(0, 256, (150, 190, 3)).astype(np.uint8)
    mask = np.zeros((150, 190), bool)
    mask[40:90, 60:120] = mask[100:103, 20:150] = True
    results = []
    for value in (0, 255):
        pixels[mask] = value
        results.append(pipeline.inpaint(Picture(pixels, "RGB"), mask, make_options(**({"steps": 3} | options))))
    assert np.array_equal(results[0].picture.pixels, results[1].picture.pixels)


# --- completeness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [0, 1, 2, 3, 5, 8, 13, 24])
def test_the_feather_runs_outward_only(width):
    for seed in range(12):
        mask = random_mask(np.random.RandomState(seed), 90, 120)
        weights = outward_feather(mask, width)
        assert weights.dtype == np.uint8
        assert (weights[mask] == 255).all()  # every masked pixel is replaced
        assert (weights[~dilated(mask, width)] == 0).all()  # and nothing beyond the width

    straight = np.zeros((30, 80), bool)
    straight[:, :20] = True
    profile = outward_feather(straight, width)[15].astype(int)
    steps = -np.diff(profile[18 : 22 + width])
    assert (steps >= 0).all()  # it falls with the distance
    if width >= 8:
        assert steps.max() < 64  # slowly
        assert profile[20 + width - 3] > 0  # over all of its width


def test_the_feathers_width_is_bounded():
    assert [feather_width(scale) for scale in (0.25, 1.0, 2.0, 100.0)] == [8, 8, 16, 24]


def test_a_feather_at_the_border_of_the_window():
    mask = np.zeros((40, 40), bool)
    mask[:6, 10:20] = mask[30:, :3] = True
    weights = outward_feather(mask, 8)
    assert (weights[mask] == 255).all()
    assert (weights[~dilated(mask, 8)] == 0).all()


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp-2m", "unipc"])
def test_few_steps_leave_no_trace(pipeline, steps, sampler):
    """A red object on grey, tightly masked, comes out as if it had been grey all along."""
    plain = np.full((160, 200, 3), 150, np.uint8)
    mask = np.zeros((160, 200), bool)
    mask[60:110, 70:140] = True
    with_object = plain.copy()
    with_object[mask] = (230, 40, 40)
    options = make_options(steps=steps, sampler=sampler)
    results = [pipeline.inpaint(Picture(each, "RGB"), mask, options).picture.pixels for each in (plain, with_object)]
    assert np.array_equal(*results)


# --- equal pictures, equal results --------------------------------------------------------------------------


def noise_picture(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.RandomState(7).randint(0, 256, (height, width, channels)).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photograph_is_filled_like_its_upright_counterpart(pipeline, orientation):
    upright = Image.fromarray(noise_picture(140, 180))
    mask = Image.new("L", (180, 140))
    mask.paste(255, (30, 50, 70, 80))
    expected = np.asarray(pipeline(upright, mask, steps=2))
    # PIL's own inverses of the eight orientations (EXIF 2.32, tag 274)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored, stored_mask = (
        image if orientation == 1 else image.transpose(Image.Transpose(undo[orientation])) for image in (upright, mask)
    )
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.info["exif"] = exif.tobytes()
    assert np.array_equal(np.asarray(pipeline(stored, mask, steps=2)), expected)
    turned = pipeline(stored, stored_mask, mask_orientation="stored", steps=2)
    assert np.array_equal(np.asarray(turned), expected)
    stored_mask.info["exif"] = exif.tobytes()  # a mask with an orientation of its own is not turned twice
    for how in ("upright", "stored"):
        assert np.array_equal(np.asarray(pipeline(stored, stored_mask, mask_orientation=how, steps=2)), expected)


def test_opaque_alpha_and_palettes_change_nothing(pipeline):
    few = (noise_picture(140, 180) // 86 * 86).astype(np.uint8)
    image = Image.fromarray(few)
    mask = Image.new("L", (180, 140))
    mask.paste(255, (30, 50, 70, 80))
    expected = np.asarray(pipeline(image, mask, steps=2))
    opaque = image.convert("RGBA")
    assert np.array_equal(np.asarray(pipeline(opaque, mask, steps=2))[:, :, :3], expected)
    palette = image.quantize(27)
    assert np.array_equal(np.asarray(palette.convert("RGB")), few)
    assert np.array_equal(np.asarray(pipeline(palette, mask, steps=2)), expected)


def test_a_padded_picture_is_filled_alike(pipeline):
    """Squares of the network's size that lie inside of both pictures hold the same pixels."""
    pixels, mask = noise_picture(300, 400), np.zeros((300, 400), bool)
    mask[140:160, 190:215] = True
    options = make_options(steps=2, mask_dilate=3)
    plain = pipeline.inpaint(Picture(pixels, "RGB"), mask, options).picture.pixels
    for above, left in itertools.product((0, 16, 37), (0, 8, 51)):
        padded = np.pad(pixels, ((above, 40), (left, 30), (0, 0)))
        area = np.pad(mask, ((above, 40), (left, 30)))
        result = pipeline.inpaint(Picture(padded, "RGB"), area, options).picture.pixels
        assert np.array_equal(result[above : above + 300, left : left + 400], plain)


# --- transparency and refusals ------------------------------------------------------------------------------


def test_a_mask_over_all_that_is_visible_is_refused(pipeline):
    alpha = np.zeros((128, 128), np.uint8)
    alpha[40:60, 40:60] = 255
    mask = alpha > 0
    with pytest.raises(InputError, match="every visible pixel"):
        pipeline.inpaint(Picture(noise_picture(128, 128), "RGB", alpha=alpha), mask, make_options(steps=2))


def test_a_square_without_anything_known_is_noted(toy_bundle):
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path, threads=1)
    alpha = np.zeros((300, 400), np.uint8)
    alpha[20:40, 20:40] = alpha[280:, 380:] = 255
    mask = np.zeros((300, 400), bool)
    mask[15:45, 15:45] = True
    picture = Picture(noise_picture(300, 400), "RGB", alpha=alpha)
    assert any("nothing around it is known" in note for note in noted(pipeline, picture, mask))
    alpha[90:, :90] = 255
    assert not any("nothing around it is known" in note for note in noted(pipeline, picture, mask))


def noted(pipeline, picture, mask) -> list[str]:
    """The notes; the toy's encoder gives one constant for a flat square, which is refused."""
    run = pipeline.backend.run

    def with_grain(graph, inputs):
        output = run(graph, inputs)
        return output + np.linspace(0, 1e-3, output.size, dtype=np.float32).reshape(output.shape)

    pipeline.backend.run = with_grain
    notes = pipeline.inpaint(picture, mask, make_options(steps=2)).notes
    pipeline.backend.run = run
    return list(notes)


def test_masked_transparent_pixels_lose_their_colours_and_keep_their_alpha(pipeline):
    pixels, alpha = noise_picture(128, 128), np.full((128, 128), 255, np.uint8)
    alpha[50:60, 50:60] = 0
    mask = np.zeros((128, 128), bool)
    mask[40:70, 40:70] = True
    result = pipeline.inpaint(Picture(pixels, "RGB", alpha=alpha), mask, make_options(steps=2))
    assert np.array_equal(result.picture.alpha, alpha)
    assert (result.picture.pixels != pixels).any(axis=2)[50:60, 50:60].mean() > 0.9
    assert any("11% of the masked pixels are transparent" in note for note in result.notes)


def note_of(pipeline, pixels, mask, words, **options) -> bool:
    notes = pipeline.inpaint(Picture(pixels, "RGB"), mask, make_options(steps=4, **options)).notes
    return any(words in note for note in notes)


def test_a_tight_mask_is_noted(pipeline):
    """An object whose border is the mask's: growing it, as `auto` does, is enough."""
    pixels = np.full((200, 240, 3), 180, np.uint8) + np.random.RandomState(0).randint(0, 9, (200, 240, 1), np.uint8)
    mask = np.zeros((200, 240), bool)
    mask[60:120, 80:150] = True
    pixels[mask] = 30
    assert note_of(pipeline, pixels, mask, "along 100% of the mask's border", mask_dilate=0)
    assert not note_of(pipeline, pixels, mask, "of the mask's border")
    wide = dilated(mask, 6)
    assert not note_of(pipeline, pixels, wide, "of the mask's border", mask_dilate=0)
    texture = noise_picture(200, 240)  # differences everywhere are no edge
    assert not note_of(pipeline, texture, mask, "of the mask's border", mask_dilate=0)
    too_small = np.zeros_like(mask)
    too_small[65:115, 85:145] = True
    pixels[dilated(too_small, automatic_dilation(mask.shape))] = 30
    assert not note_of(pipeline, pixels, too_small, "of the mask's border", mask_dilate=0)  # inside the object


def test_an_inverted_mask_is_noted_with_its_share(pipeline):
    mask = np.ones((128, 128), bool)
    mask[:32, :64] = False
    assert note_of(pipeline, noise_picture(128, 128), mask, "the mask marks 88% of the picture")
    assert not note_of(pipeline, noise_picture(128, 128), ~mask, "the mask marks")


def test_what_options_break_is_noted(pipeline):
    def notes(**options):
        return pipeline.option_notes(make_options(**options))

    assert notes() == notes(strength=0.9, blend="hard") == notes(mode="reference", strength=1.0) == []
    (note,) = notes(mode="reference", steps=20)
    assert "strength 0.99 starts from the picture with what is to be removed in it (at timestep 900)" in note
    (note,) = notes(steps=1)
    assert "the 1 steps start at timestep 0, where little noise is left" in note
    (note,) = notes(steps=10, strength=0.2)
    assert "timestep 100" in note


@pytest.mark.parametrize(
    ("image", "mask", "words"),
    [
        (np.zeros((96, 128, 3), np.uint8), None, r"the image is a NumPy array, uint8 \[96, 128, 3\]; .*fromarray"),
        ("photo.jpg", None, r"the image is the path 'photo.jpg'; .*PIL\.Image\.open"),
        (b"bytes", None, "the image is of type bytes; expected a Pillow image"),
        (None, np.zeros((96, 128), bool), r"the mask is a NumPy array, bool \[96, 128\]"),
        (None, "mask.png", "the mask is the path"),
        (None, Image.new("L", (64, 64), 255), "the mask is 64x64 pixels and the picture 128x96"),
        (None, Image.new("L", (256, 192), 255), "the mask is 256x192 .*Give a mask of the size of the picture"),
        (None, Image.new("L", (128, 96)), "Its brightest value is 0"),
        (None, Image.new("L", (128, 96), 1), "Its brightest value is 1 of 255.*Multiply its values by 255"),
        (None, Image.new("L", (128, 96), 255), "marks every pixel"),
    ],
)
def test_wrong_arguments_of_the_python_api(pipeline, image, mask, words):
    image = Image.new("RGB", (128, 96)) if image is None else image
    mask = Image.new("L", (128, 96)) if mask is None else mask
    with pytest.raises(InputError, match=words) as caught:
        pipeline(image, mask, steps=1)
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inpaint_refuses_other_types(pipeline):
    picture, mask = picture_from_image(Image.new("RGB", (128, 96))), np.zeros((96, 128), bool)
    for first, second, words in (
        (np.zeros((96, 128, 3), np.uint8), mask, "the picture is of type ndarray; expected a moebius_runtime.Picture"),
        (picture, Image.new("L", (128, 96)), "the mask is of type Image; expected a NumPy array"),
        (picture, mask[0], "the mask is 128, the picture 128x96"),
    ):
        with pytest.raises(InputError, match=words):
            pipeline.inpaint(first, second, make_options(steps=1))
