"""Sampler `lcm` against diffusers' scheduler, and what a bundle of a distilled network serves."""

import re

import numpy as np
import pytest

from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.errors import BundleError, CancelledError, InputError
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline, make_options
from moebius_runtime.sampling.choice import SAMPLER_NAMES, sampler_of, timesteps_of
from moebius_runtime.sampling.lcm import boundary, lcm, lcm_timesteps
from moebius_runtime.sampling.schedule import NoiseSchedule, initial_noise, noise_stream

SHAPE = (2, 4, 6, 5)


def toy_denoiser(latents, timestep):
    """Nonlinear, of all channels and neighbours, and different at every timestep."""
    mixed = 0.9 * latents + 0.4 * np.roll(latents, 1, -1) - 0.2 * np.roll(latents, 1, 1)
    return (np.tanh(mixed) * (0.6 + 0.4 * timestep / 1000) + 0.3 * np.sin(timestep / 90)).astype(np.float32)


def relative_l2(ours, theirs):
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def scheduler_of(steps, strength, prediction_type):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    scheduler.set_timesteps(steps, strength=strength)
    return scheduler


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("strength", [0.3, 0.99, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_latent_agrees_with_diffusers(monkeypatch, prediction_type, strength, steps):
    torch = pytest.importorskip("torch")
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_lcm")
    schedule = NoiseSchedule(prediction_type=prediction_type)
    timesteps = lcm_timesteps(schedule, steps, strength)
    scheduler = scheduler_of(steps, strength, prediction_type)
    assert timesteps.tolist() == scheduler.timesteps.tolist()
    stream = noise_stream(3, SHAPE)
    start, further = next(stream), [next(stream) for _ in range(steps)]
    outputs, ours = [], []

    def denoise(latents, timestep):
        assert latents.dtype == np.float32
        outputs.append((timestep, toy_denoiser(latents, timestep)))
        return outputs[-1][1]

    result = lcm(denoise, start, schedule, timesteps, lambda step, timestep, x: ours.append(x), noises=iter(further))
    assert result is ours[-1]
    assert result.dtype == np.float32
    noises = iter(further)
    monkeypatch.setattr(scheduling, "randn_tensor", lambda *_, **__: torch.from_numpy(next(noises)))
    theirs = torch.from_numpy(start)
    for (timestep, output), latents in zip(outputs, ours, strict=True):
        theirs = scheduler.step(torch.from_numpy(output), timestep, theirs).prev_sample
        # Both sides round to float32 several times a step; division by sqrt(alpha-bar) = 0.07 enlarges that 15 times.
        assert relative_l2(latents, theirs.numpy()) < 3e-6


def test_the_last_step_adds_no_noise_and_takes_none():
    schedule, taken = NoiseSchedule(), []

    def noises():
        while True:
            taken.append(1)
            yield np.zeros(SHAPE, np.float32)

    timesteps = lcm_timesteps(schedule, 3)
    lcm(toy_denoiser, initial_noise(0, SHAPE), schedule, timesteps, noises=noises())
    assert len(taken) == 2


def test_the_grid_is_the_distillations():
    schedule = NoiseSchedule()
    assert lcm_timesteps(schedule, 4).tolist() == [999, 759, 499, 259]
    assert lcm_timesteps(schedule, 50).tolist() == list(range(999, 0, -20))
    assert lcm_timesteps(schedule, 4, 0.99).tolist()[0] == 979
    for steps, strength, words in (
        (0, 1.0, "0 steps with sampler lcm"),
        (51, 1.0, "expected 1 to 50"),
        (4, 0.05, "4 steps with sampler lcm at strength 0.05; expected 1 to 2"),
        (4, 0.0, "strength is 0.0"),
        (4, float("nan"), "strength is nan"),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            lcm_timesteps(schedule, steps, strength)
    with pytest.raises(InputError, match="the schedule has 20 timesteps and sampler lcm takes 50"):
        lcm_timesteps(NoiseSchedule(20), 4)


def test_the_boundary_is_diffusers(tmp_path):
    scheduler = scheduler_of(4, 1.0, "epsilon")
    for timestep in (0, 19, 999):
        assert boundary(timestep) == pytest.approx(scheduler.get_scalings_for_boundary_condition_discrete(timestep))


def test_noise_goes_on_in_the_stream_of_its_seed():
    stream = noise_stream(7, SHAPE, 0.1)
    first, second = next(stream), next(stream)
    np.testing.assert_array_equal(first, initial_noise(7, SHAPE, 0.1))
    drawn = np.random.RandomState(7)
    for got in (first, second):
        expected = drawn.standard_normal(SHAPE)
        expected += 0.1 * drawn.standard_normal((*SHAPE[:2], 1, 1))
        np.testing.assert_array_equal(got, expected.astype(np.float32))
    with pytest.raises(InputError, match="seed is -1"):
        noise_stream(-1, SHAPE)


def test_every_sampler_has_a_name_and_timesteps():
    schedule = NoiseSchedule()
    for name in SAMPLER_NAMES:
        timesteps = timesteps_of(schedule, name, 4, 1.0)
        result = sampler_of(name, noise_stream(0, SHAPE))(toy_denoiser, initial_noise(0, SHAPE), schedule, timesteps)
        assert result.shape == SHAPE


# --- bundles ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, make_toy, edit_manifest):
    """distilled(scale, sampler, steps): the toy bundle with its conditional branch as the one U-Net."""

    def make(scale=2.5, sampler="lcm", steps=4):
        toy = make_toy(tmp_path_factory.mktemp("distilled") / "bundle")

        def change(content):
            content["graphs"]["unet"] = content["graphs"].pop("unet_conditional")
            content["guidance"] = {"distilled": scale}
            content["defaults"] |= {"sampler": sampler, "num_inference_steps": steps, "guidance_scale": scale}

        edit_manifest(toy.path, change)
        return toy

    return make


@pytest.fixture(scope="module")
def lcm_bundle(distilled):
    return distilled()


@pytest.fixture
def scene():
    rng = np.random.RandomState(1)
    mask = np.zeros((128, 128), bool)
    mask[40:80, 48:90] = True
    return Picture(rng.randint(0, 256, (128, 128, 3)).astype(np.uint8), "RGB"), mask


@pytest.mark.parametrize("mode", ["best", "reference"])
def test_a_bundle_for_lcm_runs_its_steps_and_guidance(lcm_bundle, scene, mode):
    """Against the sampler called by hand on the graphs' NumPy functions, from the latents of the first step on."""
    pipeline = InpaintPipeline.from_bundle(lcm_bundle.path)
    seen = []
    run = pipeline.backend.run
    pipeline.backend.run = lambda graph, inputs: seen.append((graph, inputs)) or run(graph, inputs)
    pipeline.inpaint(*scene, make_options(seed=5, mode=mode))
    steps = [inputs for graph, inputs in seen if graph == "unet"]
    first = 999 if mode == "best" else 979
    assert [int(step["timestep"][0]) for step in steps] == timesteps_of(
        pipeline.schedule, "lcm", 4, 1.0 if mode == "best" else 0.99
    ).tolist()
    assert int(steps[0]["timestep"][0]) == first
    assert all(set(step) == {"sample", "timestep"} for step in steps)
    start, condition = steps[0]["sample"][:, :4], steps[0]["sample"][:, 4:]

    def denoise(x, timestep):
        return lcm_bundle.conditional(np.concatenate([x, condition], axis=1), timestep)

    noises = noise_stream(5, start.shape)
    next(noises)  # the starting noise
    timesteps = np.array([int(step["timestep"][0]) for step in steps])
    expected = lcm(denoise, start, pipeline.schedule, timesteps, noises=noises)
    decoded = next(inputs["latent"] for graph, inputs in seen if graph == "vae_decoder")
    np.testing.assert_allclose(decoded, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_the_same_seed_gives_the_same_picture_and_another_does_not(lcm_bundle, scene):
    pictures = [
        InpaintPipeline.from_bundle(lcm_bundle.path, threads=threads).inpaint(*scene, make_options(seed=seed))
        for threads, seed in ((1, 3), (2, 3), (1, 4))
    ]
    first, second, other = (result.picture.to_rgb() for result in pictures)
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_given_starting_noise_leaves_the_seed_to_the_steps_between(lcm_bundle, scene):
    pipeline = InpaintPipeline.from_bundle(lcm_bundle.path)
    own = initial_noise(3, (1, 4, 16, 16))
    results = [
        pipeline.inpaint(*scene, make_options(**options)).picture.to_rgb()
        for options in ({"seed": 3}, {"seed": 3, "noise": own}, {"seed": 4, "noise": own})
    ]
    np.testing.assert_array_equal(results[0], results[1])
    assert (results[1] != results[2]).any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance_scale": 2.0}, "guidance scale 2: this bundle's network was distilled at 2.5 and has no other"),
        ({"guidance_scale": 1.0}, "guidance scale 1: "),
        ({"sampler": "ddim"}, "sampler 'ddim': this bundle's network was distilled for sampler lcm"),
        ({"sampler": "unipc", "mode": "reference"}, "sampler 'unipc': "),
        ({"steps": 51}, "51 steps with sampler lcm at strength 1; expected 1 to 50"),
    ],
)
def test_what_a_distilled_bundle_cannot_serve_is_refused_before_any_work(lcm_bundle, scene, options, words):
    pipeline = InpaintPipeline.from_bundle(lcm_bundle.path)
    for refuse in (
        lambda: pipeline.check(make_options(**options)),
        lambda: pipeline.inpaint(*scene, make_options(**options)),
    ):
        with pytest.raises(InputError, match=re.escape(words)):
            refuse()
    assert not pipeline.backend._loaded


def test_what_a_distilled_bundle_can_serve(lcm_bundle):
    pipeline = InpaintPipeline.from_bundle(lcm_bundle.path)
    for options in ({"guidance_scale": 2.5}, {"sampler": "lcm"}, {"steps": 1}, {"steps": 2}, {"mode": "reference"}):
        pipeline.check(make_options(**options))
    notes = pipeline.option_notes(make_options(steps=8))
    assert notes == ["8 steps: this bundle was distilled for 4, more take longer and may not look better"]
    for steps in (1, 4, None):
        assert pipeline.option_notes(make_options(steps=steps)) == []


def test_a_bundle_with_distilled_guidance_alone_takes_every_other_sampler(distilled, scene):
    bundle = distilled(scale=2.0, sampler="ddim", steps=6)
    pipeline = InpaintPipeline.from_bundle(bundle.path)
    for sampler in ("ddim", "dpmpp-2m", "unipc"):
        pipeline.check(make_options(sampler=sampler, steps=20))
        assert pipeline.option_notes(make_options(sampler=sampler, steps=20)) == []
    with pytest.raises(InputError, match="sampler 'lcm': this bundle's network was not distilled for it"):
        pipeline.check(make_options(sampler="lcm"))
    ran = []
    pipeline.inpaint(*scene, make_options(), on_step=lambda done, total: ran.append((done, total)))
    assert ran[-1] == (6, 6)


def test_an_undistilled_bundle_refuses_lcm(toy_bundle):
    with pytest.raises(InputError, match="was not distilled for it; use ddim, dpmpp-2m or unipc"):
        InpaintPipeline.from_bundle(toy_bundle.path).check(make_options(sampler="lcm"))


def test_cancelling_ends_between_steps(lcm_bundle, scene):
    done = []
    with pytest.raises(CancelledError):
        InpaintPipeline.from_bundle(lcm_bundle.path).inpaint(
            *scene, make_options(), on_step=lambda step, total: done.append(step), cancelled=lambda: len(done) == 2
        )
    assert done == [1, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("guidance"), "graph unet has sample"),
        (lambda c: c["guidance"].update(distilled=101.0), "guidance.distilled"),
        (lambda c: c["guidance"].update(scale=2.0), "guidance.scale"),
        (lambda c: c["defaults"].update(guidance_scale=2.0), "default guidance scale 2 is not the distilled 2.5"),
        (lambda c: c["defaults"].update(sampler="unipc"), "defaults.sampler"),
        (lambda c: c["graphs"].update(unet_conditional=c["graphs"]["unet"]), "a graph unet_conditional beside unet"),
    ],
)
def test_manifests_that_contradict_themselves_are_refused(distilled, edit_manifest, change, words):
    bundle = distilled()
    edit_manifest(bundle.path, change)
    with pytest.raises(BundleError, match=re.escape(words)):
        read_manifest(bundle.path)


def test_lcm_without_distilled_guidance_is_refused(toy_copy, edit_manifest):
    edit_manifest(toy_copy.path, lambda content: content["defaults"].update(sampler="lcm"))
    with pytest.raises(BundleError, match="sampler lcm is the default, and no guidance is distilled"):
        read_manifest(toy_copy.path)


def test_manifests_of_before_still_load(toy_copy, edit_manifest):
    def as_before(content):
        del content["guidance"], content["defaults"]["sampler"]

    edit_manifest(toy_copy.path, as_before)
    manifest = read_manifest(toy_copy.path)
    assert manifest.guidance is None
    assert manifest.defaults.sampler == "ddim"


def test_the_command_warns_and_refuses(run, lcm_bundle):
    common = ("a.png", "--mask", "m.png", "--bundle", lcm_bundle.path)
    code, _, lines = run(*common, "--out", "o.png", "--steps", "8", "--overwrite")
    assert code == 0
    assert any("this bundle was distilled for 4" in line for line in lines)
    code, _, lines = run(*common, "--out", "p.png", "--guidance-scale", "4")
    assert code == 2
    assert "leave --guidance-scale out" in " ".join(lines)
    code, _, lines = run(*common, "--out", "p.png", "--sampler", "ddim")
    assert code == 2
    assert "leave --sampler out" in " ".join(lines)
