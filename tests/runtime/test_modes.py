"""The modes and the levers that they set: defaults and overrides, the guidance interval, what is decoded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moebius_runtime.bundle.manifest import Defaults, ModeDefaults, read_manifest
from moebius_runtime.errors import BundleError, InputError
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline, make_options
from moebius_runtime.regions import find_squares, whole_crop, whole_square
from moebius_runtime.regions.paste import paste, pasted_box
from moebius_runtime.sampling.schedule import NoiseSchedule
from moebius_runtime.settings.modes import MODES, RECORDED, recorded
from moebius_runtime.settings.options import settings_of

DEFAULTS = Defaults(num_inference_steps=20, guidance_scale=2.5, strength=0.99, noise_offset=0.0357)


@pytest.fixture
def pipeline(toy_bundle):
    return InpaintPipeline.from_bundle(toy_bundle.path, threads=1)


def picture(height=128, width=128, seed=0):
    return Picture(np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8), "RGB")


def area(height=128, width=128):
    mask = np.zeros((height, width), bool)
    mask[30:50, 40:75] = True
    return mask


def graphs_of(pipeline, **options):
    """The graphs that a run takes, in order, each with its timestep or None."""
    calls, real = [], pipeline.backend.run

    def run(graph, inputs):
        calls.append((graph, int(inputs["timestep"][0]) if "timestep" in inputs else None))
        return real(graph, inputs)

    pipeline.backend.run = run
    try:
        result = pipeline.inpaint(picture(), area(), make_options(**options))
    finally:
        pipeline.backend.run = real
    return calls, result


# --- defaults -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_default_of_a_mode_can_be_overridden(mode):
    """Each recorded default reaches the run, and an explicit option wins over it."""
    other = {
        "steps": 7,
        "sampler": "unipc",
        "strength": 0.5,
        "start": "pixels",
        "guidance_interval": (10, 20),
        "decode": "full",
        "vae_decoder": "tiny",
    }
    assert set(other) == set(RECORDED)
    plain = settings_of(InpaintOptions(mode=mode), DEFAULTS)
    for name, value in recorded(MODES[mode]).items():
        fallback = {"steps": DEFAULTS.num_inference_steps, "strength": DEFAULTS.strength}.get(name)
        assert getattr(plain, name) == (
            fallback if value is None else tuple(value) if isinstance(value, list) else value
        )
    for name, value in other.items():
        if name == "start" and MODES[mode].original:
            continue
        assert getattr(settings_of(InpaintOptions(mode=mode, **{name: value}), DEFAULTS), name) == value


def test_a_bundles_own_defaults_stand_between():
    own = {"balanced": ModeDefaults(steps=8, sampler="unipc", guidance_interval=[100, 900])}
    found = settings_of(InpaintOptions(mode="balanced"), DEFAULTS, own)
    assert (found.steps, found.sampler, found.guidance_interval) == (8, "unipc", (100, 900))
    assert found.start == MODES["balanced"].start  # which the bundle leaves out
    assert settings_of(InpaintOptions(mode="balanced", steps=3), DEFAULTS, own).steps == 3
    assert settings_of(InpaintOptions(mode="fast"), DEFAULTS, own).steps == MODES["fast"].steps


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 49, 999])
@pytest.mark.parametrize("own", [0.2, 0.001])
def test_a_modes_own_strength_keeps_a_step_of_few(steps, own):
    """The small bundle has strength 0.2: `--steps 2` runs one step. A strength that the user gives is refused."""
    schedule = NoiseSchedule(1000, 0.00085, 0.012)
    modes = {"best": ModeDefaults(strength=own)}
    found = settings_of(InpaintOptions(steps=steps), DEFAULTS, modes)
    assert len(schedule.inference_timesteps(steps, found.strength)) == max(int(steps * own), 1)
    if int(steps * own) >= 1:
        assert found.strength == own
    asked = settings_of(InpaintOptions(steps=steps, strength=own), DEFAULTS, modes)
    assert asked.strength == own


def test_a_strength_of_sampler_lcm_stays():
    """There it shortens the grid of timesteps and drops no step."""
    modes = {"best": ModeDefaults(strength=0.2)}
    distilled = DEFAULTS.model_copy(update={"sampler": "lcm"})
    assert settings_of(InpaintOptions(steps=2), distilled, modes).strength == 0.2


@pytest.mark.parametrize("steps", [0, -1, 1001, "6", 2.5, float("nan"), [3]])
def test_wrong_steps_are_refused_whatever_the_modes_strength(toy_copy, edit_manifest, steps):
    edit_manifest(toy_copy.path, lambda content: content.update(modes={"best": {"strength": 0.2}}))
    toy = InpaintPipeline.from_bundle(toy_copy.path, threads=1)
    with pytest.raises(InputError, match="number of steps"):
        toy.check(InpaintOptions(steps=steps))


def test_the_manifest_holds_them(toy_copy, edit_manifest):
    edit_manifest(toy_copy.path, lambda content: content.update(modes={"fast": {"steps": 2}}))
    steps = []
    toy = InpaintPipeline.from_bundle(toy_copy.path, threads=1)
    toy.inpaint(picture(), area(), InpaintOptions(mode="fast"), on_step=lambda done, total: steps.append(total))
    assert steps == [2, 2]
    for wrong in ({"reference": {"steps": 2}}, {"fast": {"steps": 0}}, {"fast": {"fit": "crop"}}, {"quick": {}}):
        edit_manifest(toy_copy.path, lambda content, wrong=wrong: content.update(modes=wrong))
        with pytest.raises(BundleError, match="modes"):
            read_manifest(toy_copy.path)


def test_a_bundle_with_an_unknown_sampler_is_refused(toy_copy, edit_manifest):
    edit_manifest(toy_copy.path, lambda content: content.update(modes={"fast": {"sampler": "euler"}}))
    toy = InpaintPipeline.from_bundle(toy_copy.path, threads=1)
    with pytest.raises(InputError, match="sampler 'euler'"):
        toy.check(InpaintOptions(mode="fast"))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "reference"])
def test_one_encode_and_independence_in_every_mode_but_reference(pipeline, mode):
    calls, result = graphs_of(pipeline, mode=mode)
    assert [graph for graph, _ in calls].count("vae_encoder") == 1
    changed = picture()
    changed.pixels[area()] = 255 - changed.pixels[area()]
    again = pipeline.inpaint(changed, area(), InpaintOptions(mode=mode))
    assert (again.picture.pixels == result.picture.pixels).all()
    assert [graph for graph, _ in graphs_of(pipeline, mode=mode, start="pixels")[0]].count("vae_encoder") == 2


# --- guidance interval --------------------------------------------------------------------------------------


def test_guidance_applies_inside_the_interval_only(pipeline):
    calls, result = graphs_of(pipeline, steps=10, guidance_interval=(300, 600))
    steps = [(graph, timestep) for graph, timestep in calls if timestep is not None]
    inside = [timestep for graph, timestep in steps if graph == "unet"]
    assert inside == [600, 500, 400, 300]
    assert [timestep for graph, timestep in steps if graph == "unet_conditional"] == [900, 800, 700, 200, 100, 0]
    pipeline.backend.has = lambda graph: graph != "unet_conditional"  # the slow form: both branches, scale 1 outside
    calls, slow = graphs_of(pipeline, steps=10, guidance_interval=(300, 600))
    assert {graph for graph, timestep in calls if timestep is not None} == {"unet"}
    difference = result.picture.pixels.astype(int) - slow.picture.pixels
    assert np.abs(difference).max() <= 1  # eps_u + (eps_c - eps_u) rounds otherwise than eps_c
    whole = graphs_of(pipeline, steps=10)[1].picture.pixels
    assert np.abs(whole.astype(int) - result.picture.pixels).max() > 1


def test_the_whole_interval_changes_nothing(pipeline):
    whole = graphs_of(pipeline, steps=4)[1].picture.pixels
    assert (graphs_of(pipeline, steps=4, guidance_interval=[0, 999])[1].picture.pixels == whole).all()


@pytest.mark.parametrize("wrong", [(1,), (5, 4), (-1, 3), (1.0, 2), (True, 5), "12", 7, (1, 2, 3), [None, 1], {}])
def test_what_is_no_interval(wrong):
    with pytest.raises(InputError, match="guidance-interval"):
        InpaintOptions(guidance_interval=wrong)


# --- what is decoded ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_paste_reads_nothing_outside_of_its_box(seed):
    """Random masks, scales, blends and fits: other values outside of the box change no pixel."""
    rng = np.random.RandomState(seed)
    size = 64
    shape = (int(rng.randint(20, 200)), int(rng.randint(20, 200)))
    mask = np.zeros(shape, bool)
    for _ in range(rng.randint(1, 4)):
        top, left = rng.randint(0, shape[0] - 3), rng.randint(0, shape[1] - 3)
        mask[top : top + rng.randint(1, 12), left : left + rng.randint(1, 12)] = True
    mode, blend, colour = ("reference", "best")[seed % 2], ("soft", "hard")[seed // 2 % 2], seed % 3 == 0
    settings = settings_of(InpaintOptions(mode=mode, blend=blend), DEFAULTS)
    whole = whole_square(whole_crop(shape, size), shape)
    for square in [whole] if seed % 4 == 0 else find_squares(mask, size):
        box = pasted_box(square, shape, mask, size, settings, compensate_colour=colour)
        inside = np.zeros((size, size), bool)
        inside[box] = True
        generated = rng.randint(0, 256, (2, size, size, 3)).astype(np.uint8)
        generated[1][inside] = generated[0][inside]
        results = []
        for one in generated:
            target = picture(*shape)
            paste(one, square, target, mask.copy(), settings, compensate_colour=colour)
            results.append(target.pixels)
        assert (results[0] == results[1]).all()
        assert inside.mean() < 1 or mask.mean() > 0.05


def test_a_bundle_without_the_parts_decodes_the_whole_and_says_so(pipeline):
    calls, result = graphs_of(pipeline, mode="balanced")
    assert [graph for graph, _ in calls][-1] == "vae_decoder"
    (note,) = [note for note in result.notes if "decode" in note]
    assert "no graph vae_decoder_lower, vae_decoder_upper" in note
    assert not [note for note in graphs_of(pipeline, mode="balanced", decode="full")[1].notes if "decode" in note]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decode": "masked"}, "decode 'masked': .* has no graph vae_decoder_lower, vae_decoder_upper"),
        ({"vae_decoder": "tiny"}, "vae-decoder 'tiny': .* has no graph vae_decoder_tiny. .* --tiny-decoder"),
        ({"vae_decoder": "tiny", "decode": "masked"}, "the tiny decoder always decodes the whole square"),
        ({"decode": "half"}, "decode 'half': expected one of full, masked"),
        ({"vae_decoder": "small"}, "vae-decoder 'small': expected one of full, tiny"),
        ({"sampler": "euler"}, "sampler 'euler'"),
    ],
)
def test_explicit_options_that_cannot_be_served(pipeline, options, words):
    with pytest.raises(InputError, match=words):
        pipeline.check(make_options(**options))


def test_the_parts_are_decoders_and_no_graphs(toy_bundle):
    manifest = read_manifest(toy_bundle.path)
    parts = {"vae_decoder_tiny": manifest.graphs["vae_decoder"]}
    with_tiny = manifest.model_copy(update={"decoders": parts})
    assert set(type(manifest).model_validate(with_tiny.model_dump()).every_graph) == {*manifest.graphs, *parts}
    with pytest.raises(ValueError, match="among the decoders"):
        type(manifest).model_validate(manifest.model_copy(update={"graphs": manifest.graphs | parts}).model_dump())
    wrong = {"vae_decoder_lower": manifest.graphs["vae_decoder"]}
    with pytest.raises(ValueError, match="graph vae_decoder_lower has"):
        type(manifest).model_validate(manifest.model_copy(update={"decoders": wrong}).model_dump())


def test_an_older_bundle_takes_the_built_in_sets(pipeline):
    assert pipeline.manifest.modes == {}
    calls, _ = graphs_of(pipeline, mode="fast")
    assert sum(timestep is not None for _, timestep in calls) == MODES["fast"].steps


def test_options_are_hashable_with_an_interval():
    assert hash(InpaintOptions(guidance_interval=[1, 2])) == hash(replace(InpaintOptions(), guidance_interval=(1, 2)))
