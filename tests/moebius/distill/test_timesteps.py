"""Timesteps and noise of a batch, against the inference runtime's schedule and the distributions' own formulas."""

import math

import numpy as np
import pytest
import torch

from moebius.distill.timesteps import (
    add_noise,
    alphas_cumprod,
    predict_clean,
    sample_noise,
    sample_timesteps,
    velocity,
)
from moebius.errors import TrainingError
from moebius_runtime.errors import InputError
from moebius_runtime.schedule import NoiseSchedule


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_schedule_is_the_runtimes_bit_for_bit():
    assert np.array_equal(alphas_cumprod().numpy(), NoiseSchedule().alphas_cumprod)
    other = NoiseSchedule(num_train_timesteps=37, beta_start=0.001, beta_end=0.05)
    assert np.array_equal(alphas_cumprod(37, 0.001, 0.05).numpy(), other.alphas_cumprod)


@pytest.mark.parametrize("arguments", [(1,), (1000, 0.02, 0.01), (1000, 0.0, 0.01), (1000, 0.5, 1.0), (9, math.nan)])
def test_impossible_schedules_are_refused(arguments):
    with pytest.raises(InputError, match="expected"):
        alphas_cumprod(*arguments)


def test_noise_is_added_as_the_runtime_adds_it():
    timesteps = torch.tensor([0, 1, 499, 998, 999])
    clean, noise = torch.randn(5, 4, 6, 7, generator=seeded()), torch.randn(5, 4, 6, 7, generator=seeded(1))
    noisy = add_noise(clean, noise, timesteps, alphas_cumprod())
    assert noisy.dtype == torch.float32
    for row, timestep in enumerate(timesteps.tolist()):
        expected = NoiseSchedule().add_noise(clean[row : row + 1].numpy(), noise[row : row + 1].numpy(), timestep)
        np.testing.assert_allclose(noisy[row : row + 1].numpy(), expected, rtol=0, atol=5e-7)


def test_the_clean_estimate_turns_the_noise_round():
    timesteps = torch.tensor([0, 250, 999])
    clean = torch.randn(3, 4, 5, 5, generator=seeded(), dtype=torch.float64)
    noise = torch.randn(3, 4, 5, 5, generator=seeded(1), dtype=torch.float64)
    bars = alphas_cumprod()
    back = predict_clean(add_noise(clean, noise, timesteps, bars), noise, timesteps, bars)
    torch.testing.assert_close(back, clean, rtol=1e-13, atol=1e-13)
    # A wrong noise: off by sqrt((1 - a) / a) times its error, equation 15 of Ho et al.
    moved = predict_clean(add_noise(clean, noise, timesteps, bars), noise + 1, timesteps, bars)
    expected = ((1 - bars.double()[timesteps]) / bars.double()[timesteps]).sqrt()
    torch.testing.assert_close((back - moved).mean(dim=(1, 2, 3)), expected, rtol=1e-12, atol=0)
    assert 14.6 < expected[2] < 14.7  # as its docstring says


def test_the_velocity_is_the_runtimes_and_diffusers():
    """All three say what noise and what clean latents a velocity means."""
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear", prediction_type="v_prediction", clip_sample=False)
    schedule, bars = NoiseSchedule(prediction_type="v_prediction"), alphas_cumprod()
    timesteps = torch.tensor([0, 250, 999])
    clean, noise = (torch.randn(3, 4, 5, 5, generator=seeded(seed)) for seed in range(2))
    noisy, asked = add_noise(clean, noise, timesteps, bars), velocity(clean, noise, timesteps, bars)
    torch.testing.assert_close(asked, theirs.get_velocity(clean, noise, timesteps), rtol=0, atol=1e-6)
    # Two products and a sum of float32 numbers of size 1 to 4: 6e-8 of each.
    back = predict_clean(noisy, asked, timesteps, bars, "v_prediction")
    torch.testing.assert_close(back, clean, rtol=0, atol=1e-6)
    for row, timestep in enumerate(timesteps.tolist()):
        found = schedule.predicted_noise(asked[row].numpy(), noisy[row].numpy(), timestep)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, noise[row].numpy(), rtol=0, atol=1e-6)
    # A wrong velocity: off by sqrt(1 - a) times its error, which is at most that.
    moved = predict_clean(noisy, asked + 1, timesteps, bars, "v_prediction")
    torch.testing.assert_close((back - moved).mean(dim=(1, 2, 3)), (1 - bars[timesteps]).sqrt(), rtol=0, atol=1e-6)


def test_half_precision_is_raised():
    half = torch.randn(1, 4, 2, 2, generator=seeded()).bfloat16()
    assert add_noise(half, half, torch.tensor([5]), alphas_cumprod()).dtype == torch.float32


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_lognorm_is_distributed_as_stated(mean, std):
    """The empirical distribution against Φ at every timestep: Kolmogorov-Smirnov at a level of 1e-6."""
    count, drawn = 100, 40_000
    timesteps = sample_timesteps(drawn, seeded(), count=count, mean=mean, std=std)
    assert timesteps.dtype == torch.int64
    assert timesteps.min() >= 0
    assert timesteps.max() < count
    edges = torch.arange(1, count, dtype=torch.float64)
    expected = torch.special.ndtr((torch.logit(edges / count) - mean) / std)
    found = torch.tensor([(timesteps < edge).double().mean() for edge in edges])
    assert (found - expected).abs().max() < math.sqrt(math.log(2 / 1e-6) / (2 * drawn))
    uniform = edges / count
    assert (uniform - expected).abs().max() > 0.05  # the bound above tells them apart


def test_uniform_takes_every_timestep_alike():
    counts = torch.bincount(sample_timesteps(100_000, seeded(), sampling="uniform", count=10), minlength=10)
    assert len(counts) == 10
    assert (counts - 10_000).abs().max() < 600  # six standard deviations are 570


def test_the_last_timestep_bounds_what_is_drawn():
    assert sample_timesteps(4, seeded(), mean=60.0).tolist() == [999] * 4
    assert sample_timesteps(4, seeded(), mean=-60.0).tolist() == [0] * 4


def test_a_generator_fixes_the_batch():
    for draw in (
        lambda g: sample_timesteps(9, g),
        lambda g: sample_timesteps(9, g, sampling="uniform"),
        lambda g: sample_noise((2, 4, 3, 3), g),
    ):
        generator = seeded(7)
        first, second = draw(generator), draw(generator)
        assert torch.equal(first, draw(seeded(7)))
        assert not torch.equal(first, second)


def test_global_randomness_is_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    sample_timesteps(3, seeded()), sample_noise((1, 4, 2, 2), seeded())
    assert torch.equal(torch.rand(1), expected)


def test_the_offset_is_one_number_per_channel():
    shape = (64, 4, 5, 5)
    plain, moved = sample_noise(shape, seeded(), offset=0.0), sample_noise(shape, seeded(), offset=0.25)
    offset = moved - plain
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand(shape), rtol=0, atol=1e-6)
    assert offset[:, :, 0, 0].std() == pytest.approx(0.25, rel=0.2)
    assert offset[:, :, 0, 0].unique().numel() == 256


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: sample_timesteps(1, seeded(), sampling="cosine"), "expected 'uniform' or 'lognorm'"),
        (lambda: sample_timesteps(1, seeded(), std=0.0), "above 0"),
        (lambda: sample_timesteps(1, seeded(), std=math.nan), "above 0"),
        (lambda: sample_noise((1, 4, 2, 2), seeded(), offset=-0.1), "0 or more"),
        (lambda: sample_noise((1, 4, 2, 2), seeded(), offset=math.nan), "0 or more"),
    ],
)
def test_wrong_options_are_refused(call, words):
    with pytest.raises(TrainingError, match=words):
        call()
