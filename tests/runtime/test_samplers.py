from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.errors import InputError, OutputError
from moebius_runtime.sampling.samplers import SAMPLERS, SPACINGS, ddim
from moebius_runtime.sampling.schedule import NoiseSchedule, initial_noise

GOLDEN = Path(__file__).parents[1] / "golden" / "sampler_seed0.npz"
SCHEDULE = NoiseSchedule()
BARS = SCHEDULE.alphas_cumprod.astype(np.float64)
HALF_LOG_SNR = 0.5 * np.log(BARS / (1 - BARS))


def toy_denoiser(latents, timestep):
    """Nonlinear, of all channels and neighbours, and different at every timestep."""
    mixed = 0.9 * latents + 0.4 * np.roll(latents, 1, -1) - 0.2 * np.roll(latents, 1, 1)
    noise = np.tanh(mixed) * (0.6 + 0.4 * timestep / 1000) + 0.3 * np.sin(timestep / 90)
    return noise.astype(np.float32)


def diffusers_scheduler(name, timesteps, prediction_type="epsilon"):
    """The scheduler of diffusers that `name` stands for, made to walk the whole list of `timesteps`."""
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")

    shared = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 0,
        "prediction_type": prediction_type,
    }
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler(**shared, clip_sample=False, set_alpha_to_one=True)
        scheduler.set_timesteps(len(timesteps))
        np.testing.assert_array_equal(scheduler.timesteps.numpy(), timesteps)
        return scheduler
    shared |= {"solver_order": 2, "final_sigmas_type": "zero"}
    if name == "dpmpp-2m":
        scheduler = diffusers.DPMSolverMultistepScheduler(
            **shared, algorithm_type="dpmsolver++", solver_type="midpoint"
        )
    else:
        scheduler = diffusers.UniPCMultistepScheduler(**shared, solver_type="bh2", predict_x0=True)
    scheduler.set_timesteps(len(timesteps))
    # By "leading" these two mean 1000 // (S + 1) and no timestep 0, so DDIM's list is put in place of theirs,
    # with its noise levels computed as set_timesteps does.
    bars = scheduler.alphas_cumprod.numpy()
    sigmas = np.sqrt((1 - bars) / bars)[timesteps]
    scheduler.timesteps = torch.from_numpy(timesteps.copy())
    scheduler.sigmas = torch.from_numpy(np.append(sigmas, 0).astype(np.float32))
    return scheduler


def relative_l2(ours, theirs):
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


# 1 and 2 steps never reach the second order; under 15, diffusers takes branches for few steps.
@pytest.mark.parametrize("strength", [0.3, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 12, 20, 50])
@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_every_latent_agrees_with_diffusers(prediction_type, name, steps, strength):
    torch = pytest.importorskip("torch")

    if int(steps * strength) == 0:
        with pytest.raises(InputError, match="keeps none"):
            SCHEDULE.inference_timesteps(steps, strength)
        return
    timesteps = SCHEDULE.inference_timesteps(steps, strength)
    start = initial_noise(1, (2, 4, 6, 5))
    before = start.copy()
    outputs, ours = [], []

    def denoise(latents, timestep):
        assert latents.dtype == np.float32
        assert type(timestep) is int
        outputs.append((timestep, toy_denoiser(latents, timestep)))
        return outputs[-1][1]

    def callback(step, timestep, latents):
        assert (step, timestep) == (len(ours), timesteps[step])
        ours.append(latents)

    schedule = NoiseSchedule(prediction_type=prediction_type)
    result = SAMPLERS[name](denoise, start, schedule, timesteps, callback)

    np.testing.assert_array_equal(start, before)
    assert [timestep for timestep, _ in outputs] == timesteps.tolist()
    assert result is ours[-1]
    assert result.dtype == np.float32
    scheduler = diffusers_scheduler(name, SCHEDULE.inference_timesteps(steps, 1.0), prediction_type)
    if name != "ddim":
        scheduler.set_begin_index(steps - len(timesteps))  # as the image-to-image pipelines cut by strength
    theirs = torch.from_numpy(start)
    assert len(ours) == len(timesteps)
    for (timestep, output), latents in zip(outputs, ours, strict=True):
        theirs = scheduler.step(torch.from_numpy(output), timestep, theirs).prev_sample
        # Both sides round to float32 several times a step, 6e-8 each; over 50 steps up to 9e-7 was measured.
        assert relative_l2(latents, theirs.numpy()) < 2e-6


def test_the_multistep_samplers_differ_from_ddim_and_from_each_other():
    timesteps = SCHEDULE.inference_timesteps(8, 1.0)
    start = initial_noise(1, (1, 4, 6, 5))
    first, second, third = (s(toy_denoiser, start, SCHEDULE, timesteps) for s in SAMPLERS.values())
    # Otherwise one function under three names would pass wherever their orders cannot be told apart.
    assert min(relative_l2(second, first), relative_l2(third, first), relative_l2(third, second)) > 1e-3


@pytest.mark.parametrize("name", SAMPLERS)
def test_one_timestep_ends_on_the_clean_data_it_predicts(name):
    # One step, whatever its timestep, is the prediction itself: x0 = (x - sqrt(1 - a) eps) / sqrt(a).
    start = initial_noise(4, (1, 4, 3, 3))
    for timestep in (0, 250, 999):
        noise = toy_denoiser(start, timestep).astype(np.float64)
        expected = (start - np.sqrt(1 - BARS[timestep]) * noise) / np.sqrt(BARS[timestep])
        result = SAMPLERS[name](toy_denoiser, start, SCHEDULE, np.array([timestep]))
        assert relative_l2(result, expected) < 5e-7  # three roundings of 6e-8, cancellation included


def test_ddim_repeats_the_golden_trajectory():
    # The network is not here, but a DDIM step is linear in its output: the four outputs are recovered from
    # the golden latents in float64, by equation 12 of the DDIM paper solved for eps with diffusers'
    # products, and played back.
    golden = np.load(GOLDEN)
    timesteps = golden["timesteps"]
    reference = diffusers_scheduler("ddim", SCHEDULE.inference_timesteps(20, 1.0))
    bars = reference.alphas_cumprod.numpy().astype(np.float64)[timesteps]
    path = np.concatenate([golden["start"][None], golden["trajectory"]]).astype(np.float64)
    outputs = {}
    for step in range(4):
        now, then = bars[step], bars[step + 1]
        shrink = np.sqrt(then / now)
        outputs[int(timesteps[step])] = (path[step + 1] - shrink * path[step]) / (
            np.sqrt(1 - then) - shrink * np.sqrt(1 - now)
        )
    ours = []
    zero = np.zeros_like(golden["start"])
    ddim(
        lambda latents, timestep: outputs.get(timestep, zero),
        golden["start"],
        SCHEDULE,
        SCHEDULE.inference_timesteps(int(golden["steps"]), float(golden["strength"])),
        lambda step, timestep, latents: ours.append(latents),
    )
    for latents, expected in zip(ours[:4], golden["trajectory"], strict=True):
        assert relative_l2(latents, expected) < 5e-7  # float32 rounding of four steps; measured at most 1.4e-7


def gaussian_denoiser(mean, deviation):
    """The exact noise prediction for data ~ N(mean, deviation^2): linear in the latents."""

    def denoise(latents, timestep):
        bar = BARS[timestep]
        variance = bar * deviation**2 + 1 - bar
        return (np.sqrt(1 - bar) * (latents - np.sqrt(bar) * mean) / variance).astype(np.float32)

    return denoise


def gaussian_latents(timestep, mean, deviation, quantile):
    """The exact trajectory of the same differential equation: a point keeps its quantile."""
    bar = BARS[timestep]
    return np.sqrt(bar) * mean + np.sqrt(bar * deviation**2 + 1 - bar) * quantile


def even_timesteps(intervals):
    """Timesteps from 999 to 0, nearly even in half log-SNR: `intervals` equal steps for the solvers."""
    wanted = np.linspace(HALF_LOG_SNR[999], HALF_LOG_SNR[0], intervals + 1)
    return np.abs(HALF_LOG_SNR - wanted[:, None]).argmin(axis=1)


def error_at_timestep_0(name, intervals):
    """Relative L2 distance from the exact trajectory after the even steps, before the last one to clean."""
    mean, deviation = 0.5, 1.0
    timesteps = even_timesteps(intervals)
    quantile = initial_noise(3, (1, 4, 8, 8), 0).astype(np.float64)
    reached = []
    SAMPLERS[name](
        gaussian_denoiser(mean, deviation),
        gaussian_latents(999, mean, deviation, quantile).astype(np.float32),
        SCHEDULE,
        timesteps,
        lambda step, timestep, latents: reached.append(latents),
    )
    return relative_l2(reached[intervals - 1], gaussian_latents(0, mean, deviation, quantile))


# Theory: 1 for DDIM, 2 for DPM-Solver++(2M), 3 for UniPC-2 (its corrector raises the order by one). Measured
# from 10 to 20 steps: 0.95, 1.78, 2.80; integer timesteps are only nearly even, and the limit is not reached.
@pytest.mark.parametrize(("name", "low", "high"), [("ddim", 0.8, 1.2), ("dpmpp-2m", 1.6, 2.2), ("unipc", 2.5, 3.2)])
def test_order_of_convergence_on_gaussian_data(name, low, high):
    order = np.log2(error_at_timestep_0(name, 10) / error_at_timestep_0(name, 20))
    assert low < order < high


def test_at_ten_steps_the_second_order_samplers_beat_ddim():
    # Measured: 0.128, 0.0174 and 0.0147. Even steps in half log-SNR; on leading timesteps see the next test.
    errors = {name: error_at_timestep_0(name, 10) for name in SAMPLERS}
    assert errors["dpmpp-2m"] < errors["ddim"] / 5
    assert errors["unipc"] < errors["dpmpp-2m"]


def test_on_leading_timesteps_the_second_order_pays_from_about_fifty_steps():
    # The last leap of the leading list (t = 1000 // S to 0) is long in half log-SNR at any S. On this data
    # ddim, dpmpp-2m and unipc are off by 0.109, 0.128, 0.132 after 10 steps, 0.0247, 0.0122, 0.0110 after 50.
    quantile = initial_noise(3, (1, 4, 16, 16), 0).astype(np.float64)
    timesteps = SCHEDULE.inference_timesteps(50, 1.0)
    start = gaussian_latents(timesteps[0], 0.5, 1.0, quantile).astype(np.float32)
    errors = {
        name: relative_l2(sampler(gaussian_denoiser(0.5, 1.0), start, SCHEDULE, timesteps), 0.5 + quantile)
        for name, sampler in SAMPLERS.items()
    }
    assert errors["ddim"] < 0.03
    assert errors["dpmpp-2m"] < 0.6 * errors["ddim"]
    assert errors["unipc"] < errors["dpmpp-2m"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_denoiser_may_reuse_its_output_buffer(name):
    # Inference runtimes with bound outputs do.
    buffer = np.empty((1, 4, 6, 5), np.float32)

    def denoise(latents, timestep):
        buffer[:] = toy_denoiser(latents, timestep)
        return buffer

    start, timesteps = initial_noise(1, (1, 4, 6, 5)), SCHEDULE.inference_timesteps(8, 1.0)
    expected = SAMPLERS[name](toy_denoiser, start, SCHEDULE, timesteps)
    np.testing.assert_array_equal(SAMPLERS[name](denoise, start, SCHEDULE, timesteps), expected)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_the_result_is_float32_whatever_the_denoiser_returns(name, kind):
    start, timesteps = initial_noise(1, (1, 4, 6, 5)), SCHEDULE.inference_timesteps(4, 1.0)
    result = SAMPLERS[name](lambda x, t: toy_denoiser(x, t).astype(kind), start.astype(np.float64), SCHEDULE, timesteps)
    assert result.dtype == np.float32


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_noise_that_is_not_finite_is_reported_with_its_step(name, bad):
    called = []

    def denoise(latents, timestep):
        noise = toy_denoiser(latents, timestep)
        if timestep == 500:
            noise[0, 3, 2, 1] = bad
        return noise

    with pytest.raises(OutputError, match=r"predicted noise of step 1 \(timestep 500\): 1 of 120 values"):
        SAMPLERS[name](
            denoise,
            initial_noise(1, (1, 4, 6, 5)),
            SCHEDULE,
            SCHEDULE.inference_timesteps(4, 1.0),
            lambda *arguments: called.append(arguments),
        )
    assert [step for step, _, _ in called] == [0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_latents_that_overflow_are_reported_with_their_step(name):
    def denoise(latents, timestep):
        return np.full_like(latents, -3e38 if timestep == 500 else 0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one report, the error, and no warning beside it
        with pytest.raises(OutputError, match=r"latents of step 1 \(timestep 500\): 120 of 120 values"):
            SAMPLERS[name](denoise, initial_noise(1, (1, 4, 6, 5)), SCHEDULE, SCHEDULE.inference_timesteps(4, 1.0))


@pytest.mark.parametrize("name", SAMPLERS)
def test_noise_of_another_shape_is_refused(name):
    start = initial_noise(1, (2, 4, 6, 5))
    with pytest.raises(OutputError, match=r"step 0 \(timestep 750\) has shape \[1, 4, 6, 5\]; expected \[2, 4, 6, 5\]"):
        SAMPLERS[name](lambda x, t: x[:1], start, SCHEDULE, SCHEDULE.inference_timesteps(4, 1.0))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("timesteps", "words"),
    [
        (np.array([], np.int64), r"shape \[0\]"),
        (np.array([[500, 0]]), r"shape \[1, 2\]"),
        (np.array([500.0, 0.0]), "float64"),
        (np.array([0, 500]), "strictly falling"),
        (np.array([500, 500, 0]), "strictly falling"),
        (np.array([1000, 0]), "from 0 to 999"),
        (np.array([500, -1]), "from 0 to 999"),
    ],
)
def test_bad_timesteps_are_refused_before_the_network_runs(name, timesteps, words):
    def denoise(latents, timestep):
        raise AssertionError("the network ran")

    with pytest.raises(InputError, match=words):
        SAMPLERS[name](denoise, initial_noise(1, (1, 4, 6, 5)), SCHEDULE, timesteps)


@pytest.mark.parametrize("name", SAMPLERS)
def test_bad_latents_are_refused(name):
    timesteps = SCHEDULE.inference_timesteps(4, 1.0)
    with pytest.raises(InputError, match=r"shape \[4, 6, 5\]"):
        SAMPLERS[name](toy_denoiser, np.zeros((4, 6, 5), np.float32), SCHEDULE, timesteps)
    latents = initial_noise(1, (1, 4, 6, 5))
    latents[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN or infinity"):
        SAMPLERS[name](toy_denoiser, latents, SCHEDULE, timesteps)


def test_ten_even_steps_come_closer_than_ten_leading_ddim_steps_on_a_broad_spectrum():
    """Independent Gaussian values with standard deviations from 0.05 to 3, as a picture's spectrum has.

    The exact noise prediction is linear there. Measured: ddim on its leading steps 0.098, dpmpp-2m 0.018 and unipc
    0.017 on timesteps even in log-SNR: at least four times closer is asked for.
    """
    spread = np.exp(np.linspace(np.log(0.05), np.log(3), 4 * 32 * 32)).reshape(1, 4, 32, 32)
    unit = np.random.RandomState(1).standard_normal(spread.shape)
    bars = SCHEDULE.alphas_cumprod.astype(np.float64)

    def deviation(timestep):
        return np.sqrt(bars[timestep] * spread**2 + 1 - bars[timestep])

    def denoise(latents, timestep):
        return (np.sqrt(1 - bars[timestep]) * latents / deviation(timestep) ** 2).astype(np.float32)

    def error(name):
        steps = 11 if name == "ddim" else 10  # strength 0.99 drops one of 11: ten evaluations each
        timesteps = SCHEDULE.inference_timesteps(steps, 0.99 if name == "ddim" else 1.0, SPACINGS[name])
        assert len(timesteps) == 10
        start = (unit * deviation(timesteps[0])).astype(np.float32)
        result = SAMPLERS[name](denoise, start, SCHEDULE, timesteps)
        return np.linalg.norm(result - unit * spread) / np.linalg.norm(unit * spread)

    assert error("dpmpp-2m") < error("ddim") / 4
    assert error("unipc") < error("ddim") / 4
