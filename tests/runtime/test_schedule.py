from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.errors import InputError
from moebius_runtime.sampling.schedule import NoiseSchedule, initial_noise

GOLDEN = Path(__file__).parents[1] / "golden" / "sampler_seed0.npz"


def diffusers_ddim(**changes):
    diffusers = pytest.importorskip("diffusers")

    settings = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, **changes}
    return diffusers.DDIMScheduler(**settings, beta_schedule="scaled_linear", timestep_spacing="leading")


# The default, and others so that no constant of the default can hide in the formula.
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_start": 1e-4, "beta_end": 0.02},
        {"num_train_timesteps": 999},
        {"num_train_timesteps": 37, "beta_start": 0.003, "beta_end": 0.003},
        {"num_train_timesteps": 2},
    ],
)
def test_alphas_cumprod_is_that_of_diffusers_but_for_the_last_bit(changes):
    ours = NoiseSchedule(**changes).alphas_cumprod
    theirs = diffusers_ddim(**changes).alphas_cumprod.numpy()
    assert ours.dtype == np.float32
    # Equal bit by bit on a CPU where torch fuses multiplication and addition (x86 with AVX2). Elsewhere the
    # root of a beta may round the other way, which moved a product by up to 2.4e-7, two units of float32.
    # float64 betas, for comparison, are off by 9e-7 and fail.
    np.testing.assert_allclose(ours, theirs, rtol=3e-7, atol=0)


def test_alphas_cumprod_is_cached_and_cannot_be_changed():
    schedule = NoiseSchedule()
    assert schedule.alphas_cumprod is schedule.alphas_cumprod
    with pytest.raises(ValueError, match="read-only"):
        schedule.alphas_cumprod[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.beta_end = 0.02


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_train_timesteps": 1}, "num_train_timesteps is 1"),
        ({"num_train_timesteps": 10**9}, "from 2 to 10000"),
        ({"num_train_timesteps": 1000.0}, "whole number"),
        ({"num_train_timesteps": True}, "whole number"),
        ({"beta_start": 0.0}, "0 < beta_start"),
        ({"beta_start": 0.02}, "beta_start <= beta_end"),
        ({"beta_end": 1.0}, "beta_end < 1"),
        ({"beta_start": float("nan")}, "finite"),
        ({"beta_end": "0.012"}, "'0.012'; expected a number"),
        ({"beta_end": 10**400}, "finite"),
        ({"beta_start": 1e-9}, "no usable noise level"),  # 1 - beta rounds to 1: no noise at t = 0
        ({"beta_start": 0.9, "beta_end": 0.9}, "no usable noise level"),  # the signal underflows
        ({"beta_schedule": "linear"}, "'linear'; only 'scaled_linear'"),
        ({"prediction_type": "sample"}, "'sample'; only 'epsilon' and 'v_prediction'"),
        ({"prediction_type": ["epsilon"]}, "only 'epsilon'"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused_in_one_line(changes, words):
    with pytest.raises(InputError, match=words) as caught:
        NoiseSchedule(**changes)
    assert "\n" not in str(caught.value)


def test_timesteps_of_the_reference():
    timesteps = NoiseSchedule().inference_timesteps(20, 0.99)
    assert timesteps.dtype == np.int64
    assert timesteps.tolist() == list(range(900, -1, -50))
    np.testing.assert_array_equal(timesteps, np.load(GOLDEN)["timesteps"])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 12, 20, 27, 50, 333, 999, 1000])
@pytest.mark.parametrize("strength", [0.3, 0.58, 0.75, 0.99, 1.0])
def test_timesteps_are_those_of_diffusers_cut_from_the_noisy_end(steps, strength):
    scheduler = diffusers_ddim()
    scheduler.set_timesteps(steps)
    kept = min(int(steps * strength), steps)
    if kept == 0:
        with pytest.raises(InputError, match="at least one is needed"):
            NoiseSchedule().inference_timesteps(steps, strength)
    else:
        ours = NoiseSchedule().inference_timesteps(steps, strength)
        np.testing.assert_array_equal(ours, scheduler.timesteps.numpy()[steps - kept :])


def test_the_product_of_steps_and_strength_is_truncated_in_binary():
    # 50 * 0.58 is 28.999999999999996 in binary; the reference's int() makes 28 of it.
    assert len(NoiseSchedule().inference_timesteps(50, 0.58)) == 28


def test_the_advice_of_the_strength_error_works_for_every_number_of_steps():
    schedule = NoiseSchedule()
    for steps in range(1, 1001):
        with pytest.raises(InputError) as caught:
            schedule.inference_timesteps(steps, 0.0009)
        advised = float(str(caught.value).partition("Use a strength of at least ")[2].partition(",")[0])
        assert schedule.inference_timesteps(steps, advised).tolist()[-1] == 0


@pytest.mark.parametrize(
    ("steps", "strength", "words"),
    [
        (0, 1.0, "number of steps is 0"),
        (-3, 1.0, "number of steps is -3"),
        (1001, 1.0, "from 1 to 1000"),
        (2.0, 1.0, "whole number"),
        (True, 1.0, "whole number"),
        (20, 0.0, "strength is 0.0"),
        (20, 1.01, "strength is 1.01"),
        (20, float("nan"), "finite"),
        (20, "0.5", "expected a number"),
        (1, 0.99, "keeps none of 1 step;"),
        (20, 0.04, "keeps none of 20 steps;.* at least 0.05, or more steps"),
    ],
)
def test_steps_and_strengths_out_of_range_are_refused(steps, strength, words):
    with pytest.raises(InputError, match=words):
        NoiseSchedule().inference_timesteps(steps, strength)


def test_add_noise_makes_the_reference_start():
    golden = np.load(GOLDEN)
    start = NoiseSchedule().add_noise(golden["latents"], golden["noise"], int(golden["timesteps"][0]))
    assert start.dtype == np.float32
    # The same float32 operations in the same order: equal here; one last bit is left to fused operations.
    np.testing.assert_allclose(start, golden["start"], rtol=2.4e-7, atol=1.2e-7)


@pytest.mark.parametrize("timestep", [0, 1, 500, 999])
def test_add_noise_agrees_with_diffusers(timestep):
    torch = pytest.importorskip("torch")

    latents, noise = initial_noise(1, (2, 4, 5, 3)), initial_noise(2, (2, 4, 5, 3))
    theirs = diffusers_ddim().add_noise(
        torch.from_numpy(latents), torch.from_numpy(noise), torch.tensor([timestep, timestep])
    )
    ours = NoiseSchedule().add_noise(latents.astype(np.float64), noise, timestep)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2.4e-7, atol=1.2e-7)  # as above


def test_add_noise_refuses_other_shapes_and_timesteps():
    schedule, latents = NoiseSchedule(), np.zeros((2, 4, 5, 3), np.float32)
    with pytest.raises(InputError, match=r"\[1, 4, 5, 3\] and the latents \[2, 4, 5, 3\]"):
        schedule.add_noise(latents, latents[:1], 3)  # would broadcast: both pictures would share their noise
    for timestep in (-1, 1000, 2.5):
        with pytest.raises(InputError, match="from 0 to 999"):
            schedule.add_noise(latents, latents, timestep)


def test_initial_noise_is_frozen():
    # Written down from NumPy 2.4; NEP 19 freezes RandomState's stream. 1.7640524 is the known first number of
    # seed 0. The logarithm of the C library may move the last bit of float64, seldom of float32.
    noise = initial_noise(0, (1, 4, 64, 64), 0)
    assert noise.dtype == np.float32
    np.testing.assert_allclose(noise.ravel()[:4], [1.7640524, 0.4001572, 0.978738, 2.2408931], rtol=2e-7)
    last = initial_noise(2**32 - 1, (1, 4, 64, 64), 0)
    np.testing.assert_allclose(last.ravel()[-2:], [-0.27074546, 0.08076127], rtol=2e-7)
    assert abs(float(noise.mean())) < 0.031  # 4 standard errors of 16384 numbers: 0.031
    assert abs(float(noise.std()) - 1) < 0.022  # 4 standard errors: 0.022


def test_the_noise_offset_moves_whole_channels_by_the_numbers_drawn_next():
    shape = (2, 4, 6, 5)
    plain, moved = initial_noise(7, shape, 0), initial_noise(7, shape, 0.0357)
    np.testing.assert_array_equal(moved, initial_noise(7, shape))  # the default is the reference's 0.0357
    stream = np.random.RandomState(7)
    stream.standard_normal(2 * 4 * 6 * 5)
    expected = 0.0357 * stream.standard_normal(8).reshape(2, 4, 1, 1)
    assert np.abs(expected).min() > 1e-4  # so that an offset left out, or shared between channels, shows
    # Both sides are rounded to float32 at magnitudes up to 4: 2 * 2.4e-7.
    np.testing.assert_allclose(moved.astype(np.float64) - plain, np.broadcast_to(expected, shape), atol=5e-7)


@pytest.mark.parametrize(
    ("seed", "shape", "offset", "words"),
    [
        (-1, (1, 4, 8, 8), 0, "seed is -1; expected a whole number from 0 to 4294967295"),
        (2**32, (1, 4, 8, 8), 0, "seed is 4294967296"),
        (0.0, (1, 4, 8, 8), 0, "seed is 0.0"),
        (None, (1, 4, 8, 8), 0, "seed is None"),
        (True, (1, 4, 8, 8), 0, "seed is True"),
        (0, (4, 8, 8), 0, "four sizes"),
        (0, (1, 4, 0, 8), 0, "size of the noise is 0"),
        (0, (1, 4, 8, 8), -0.1, "noise_offset is -0.1"),
        (0, (1, 4, 8, 8), float("inf"), "finite"),
    ],
)
def test_initial_noise_refuses_what_is_out_of_range(seed, shape, offset, words):
    with pytest.raises(InputError, match=words):
        initial_noise(seed, shape, offset)


def test_numpy_integers_and_floats_are_welcome():
    schedule = NoiseSchedule(beta_end=np.float64(0.012), num_train_timesteps=np.int64(1000))
    assert len(schedule.inference_timesteps(np.int32(8), np.float32(0.5))) == 4
    np.testing.assert_array_equal(initial_noise(np.uint32(5), (1, 4, 2, 2)), initial_noise(5, (1, 4, 2, 2)))


@pytest.mark.parametrize("steps", [1, 2, 8, 12, 20, 100, 1000])
def test_logsnr_timesteps_are_even_in_half_log_snr(steps):
    """Each is the nearest free timestep to S even steps from the last training timestep towards the first."""
    schedule = NoiseSchedule()
    timesteps = schedule.inference_timesteps(steps, 1.0, "logsnr")
    assert len(timesteps) == steps
    assert timesteps[0] == 999
    assert np.all(np.diff(timesteps) < 0)
    bars = schedule.alphas_cumprod.astype(np.float64)
    ratio = 0.5 * np.log(bars / (1 - bars))
    wanted = np.linspace(ratio[999], ratio[0], steps + 1)[:-1]
    nearest = [int(np.abs(ratio - value).argmin()) for value in wanted]
    free = len({*nearest}) == steps
    assert timesteps.tolist() == nearest if free else timesteps.min() >= 0


def test_strength_drops_the_noisiest_of_either_spacing():
    schedule = NoiseSchedule()
    for spacing in ("leading", "logsnr"):
        assert np.array_equal(
            schedule.inference_timesteps(10, 0.75, spacing), schedule.inference_timesteps(10, 1.0, spacing)[3:]
        )
    with pytest.raises(InputError, match="'leading' or 'logsnr'"):
        schedule.inference_timesteps(10, 1.0, "cosine")
