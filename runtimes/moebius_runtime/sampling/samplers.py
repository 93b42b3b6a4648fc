"""Samplers: plain functions that turn noisy latents into clean ones with the help of a denoiser.

All three iterate over the same falling list of timesteps; the last step always ends on clean data (signal 1,
noise 0), whatever its timestep. So a list that `strength` has cut, down to a single timestep, needs nothing
beside it.

They solve the same differential equation, written with signal a, noise level s and l = log(a / s) of a
timestep. Coefficients are Python floats (float64); arrays stay float32, which NumPy's own float64 scalars
would widen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import CancelledError, InputError, OutputError
from moebius_runtime.sampling.schedule import Latents, NoiseSchedule, Spacing

Denoise = Callable[[Latents, int], Latents]
"""(latents [B, 4, h, w], timestep) -> what the network predicts, same shape, guidance already applied.

Noise or velocity, by the schedule's `prediction_type`; the samplers convert it to noise.
"""

Callback = Callable[[int, int, Latents], None]
"""(step from 0, its timestep, latents after it); the latents are the sampler's own: do not change them."""

Cancelled = Callable[[], bool]
"""True once the work should stop. It is asked often and must return at once."""


class Sampler(Protocol):
    """The signature of every sampler."""

    def __call__(
        self,
        denoise: Denoise,
        latents: Latents,
        schedule: NoiseSchedule,
        timesteps: npt.NDArray[np.int64],
        callback: Callback | None = None,
        cancelled: Cancelled | None = None,
    ) -> Latents:
        """Clean latents, float32 [B, 4, h, w], from noisy ones at timesteps[0]."""


def ddim(
    denoise: Denoise,
    latents: Latents,
    schedule: NoiseSchedule,
    timesteps: npt.NDArray[np.int64],
    callback: Callback | None = None,
    cancelled: Cancelled | None = None,
) -> Latents:
    """DDIM without added noise: Song et al. 2021a, equation 12 with sigma (eta) 0; first order, no clipping.

    Args:
        denoise: the network, see `Denoise`; called once per timestep.
        latents: float32 [B, 4, h, w], at the noise level of timesteps[0].
        schedule: the process that the network was trained on.
        timesteps: int64 [n], strictly falling, as `NoiseSchedule.inference_timesteps` gives them.
        callback: called after every step, see `Callback`.
        cancelled: asked before every step, see `Cancelled`.

    Returns:
        Clean latents, float32 [B, 4, h, w], on the latents' scale.

    Raises:
        CancelledError: `cancelled` returned True.
        InputError: the latents or the timesteps are not as described.
        OutputError: the predicted noise has another shape, or it or the latents are not finite.
    """
    levels = _levels(schedule, timesteps)

    def advance(step: int, x: Latents, noise: Latents) -> Latents:
        target = levels[step + 1]
        return target.signal * _clean(x, noise, levels[step]) + target.noise * noise

    return walk(denoise, latents, schedule, timesteps, callback, cancelled, advance)


def dpmpp_2m(
    denoise: Denoise,
    latents: Latents,
    schedule: NoiseSchedule,
    timesteps: npt.NDArray[np.int64],
    callback: Callback | None = None,
    cancelled: Cancelled | None = None,
) -> Latents:
    """DPM-Solver++(2M): Lu et al. 2022b ("DPM-Solver++"), algorithm 2; second order from the second step on.

    The first step has no past and the last one ends at infinite l, where the second-order term has no
    meaning: both are of first order. (diffusers' `lower_order_final`, in force under 15 steps, asks for the
    latter too.) Leading timesteps end with a long leap in l, for 10 steps from 1.1 (t = 100) to 3.5 (t = 0).
    Extrapolating over it costs much of what the second order gains: what it is worth at few steps must be
    measured.

    Arguments, result and errors are those of `ddim`.
    """
    levels = _levels(schedule, timesteps)
    past: list[Latents] = []

    def advance(step: int, x: Latents, noise: Latents) -> Latents:
        past.append(_clean(x, noise, levels[step]))
        del past[:-2]
        return _extrapolate(x, past, levels, step)

    return walk(denoise, latents, schedule, timesteps, callback, cancelled, advance)


def unipc(
    denoise: Denoise,
    latents: Latents,
    schedule: NoiseSchedule,
    timesteps: npt.NDArray[np.int64],
    callback: Callback | None = None,
    cancelled: Cancelled | None = None,
) -> Latents:
    """UniPC-2 with B2(h): Zhao et al. 2023, algorithms 1 (UniC) and 2 (UniP), in their clean-data form.

    The predictor is DPM-Solver++(2M), to which UniP-2 with B2 reduces. Each evaluation, made for the next
    step anyway, also corrects the step before, which raises the order to 3 (their theorem 3.1). The corrected
    latents are not evaluated again, and the last step is not corrected. The callback sees the predictor's
    latents. What `dpmpp_2m` says about the long leap holds here too.

    Arguments, result and errors are those of `ddim`.
    """
    levels = _levels(schedule, timesteps)
    past: list[Latents] = []
    origin: list[Latents] = []  # the corrected latents that the last prediction started from

    def advance(step: int, x: Latents, noise: Latents) -> Latents:
        past.append(_clean(x, noise, levels[step]))
        del past[:-3]
        origin[:] = [_correct(origin[0], past, levels, step) if step else x]
        return _extrapolate(origin[0], past, levels, step)

    return walk(denoise, latents, schedule, timesteps, callback, cancelled, advance)


SAMPLERS: dict[str, Sampler] = {"ddim": ddim, "dpmpp-2m": dpmpp_2m, "unipc": unipc}

# The reference samples DDIM on leading timesteps. Those end with a long leap, over which the two others lose what
# they gain: they get timesteps that are even in log-SNR (tests/runtime/test_samplers.py measures both).
SPACINGS: dict[str, Spacing] = {"ddim": "leading", "dpmpp-2m": "logsnr", "unipc": "logsnr"}


@dataclass(frozen=True)
class _Level:
    """One timestep: latents = signal * clean + noise * N(0, 1); log_ratio is log(signal / noise)."""

    signal: float
    noise: float
    log_ratio: float


def _levels(schedule: NoiseSchedule, timesteps: npt.NDArray[np.int64]) -> list[_Level]:
    """The levels of the timesteps, then that of clean data: n + 1 entries."""
    bars = schedule.alphas_cumprod[check_timesteps(schedule, timesteps)].tolist()
    noisy = [_Level(math.sqrt(bar), math.sqrt(1 - bar), 0.5 * math.log(bar / (1 - bar))) for bar in bars]
    return [*noisy, _Level(1.0, 0.0, math.inf)]


def check_timesteps(schedule: NoiseSchedule, timesteps: npt.NDArray[np.int64]) -> list[int]:
    """Returns the timesteps as a list; raises `InputError` unless they are int64 [n], strictly falling, and known."""
    given = np.asarray(timesteps)
    if given.ndim != 1 or given.size == 0 or given.dtype.kind != "i":
        raise InputError(
            f"timesteps are {given.dtype} of shape {list(given.shape)}; expected [n] int64, n > 0. "
            "NoiseSchedule.inference_timesteps makes one."
        )
    count = schedule.num_train_timesteps
    if given.min() < 0 or given.max() >= count or np.any(np.diff(given) >= 0):
        raise InputError(f"timesteps are {given.tolist()}; expected strictly falling numbers from 0 to {count - 1}.")
    falling: list[int] = given.tolist()
    return falling


def walk(
    denoise: Denoise,
    latents: Latents,
    schedule: NoiseSchedule,
    timesteps: npt.NDArray[np.int64],
    callback: Callback | None,
    cancelled: Cancelled | None,
    advance: Callable[[int, Latents, Latents], Latents],
) -> Latents:
    """Evaluate, advance(step, latents, noise), check and report, once per timestep."""
    x = np.asarray(latents, np.float32)
    if x.ndim != 4:
        raise InputError(
            f"the starting latents have shape {list(x.shape)}; expected [batch, 4, height, width]. Add the batch axis."
        )
    if not np.isfinite(x).all():
        raise InputError(
            "the starting latents hold NaN or infinity; expected finite numbers. Check the noise and the encoder."
        )
    for step, timestep in enumerate(np.asarray(timesteps).tolist()):
        check_cancelled(cancelled)
        predicted = np.asarray(denoise(x, timestep), np.float32)
        if predicted.shape != x.shape:
            raise OutputError(
                f"the predicted noise of step {step} (timestep {timestep}) has shape {list(predicted.shape)}; "
                f"expected {list(x.shape)}. Check that the bundle's network belongs to this version."
            )
        _require_finite("predicted noise", predicted, step, timestep)
        noise = schedule.predicted_noise(predicted, x, timestep)
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported on the next line
            x = advance(step, x, noise)
        _require_finite("latents", x, step, timestep)
        if callback is not None:
            callback(step, timestep, x)
    return x


def check_cancelled(cancelled: Cancelled | None) -> None:
    """Raises `CancelledError` where the caller wants the work to stop."""
    if cancelled is not None and cancelled():
        raise CancelledError("the work was cancelled; nothing was written")


def _require_finite(name: str, array: Latents, step: int, timestep: int) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        raise OutputError(
            f"{name} of step {step} (timestep {timestep}): {int((~finite).sum())} of {array.size} values are "
            "NaN or infinite; expected finite numbers. Run the fp32 bundle, or verify this one."
        )


def clean_latents(schedule: NoiseSchedule, x: Latents, noise: Latents, timestep: int) -> Latents:
    """The clean latents that `x` at a timestep and its predicted noise imply (Song et al. 2021a, equation 9)."""
    bar = float(schedule.alphas_cumprod[timestep])
    return _clean(x, noise, _Level(math.sqrt(bar), math.sqrt(1 - bar), 0.5 * math.log(bar / (1 - bar))))


def _clean(x: Latents, noise: Latents, level: _Level) -> Latents:
    """The clean latents that `x` and its predicted noise imply (Song et al. 2021a, equation 9)."""
    return np.divide(x - level.noise * noise, level.signal, dtype=np.float32)


def _extrapolate(x: Latents, past: list[Latents], levels: list[_Level], step: int) -> Latents:
    """From `x` at levels[step] to the next level, with the clean-data predictions `past`, newest last.

    Lu et al. 2022b, algorithm 2: the data is taken to be the newest prediction, moved by half a step along
    the line through the last two where the order is 2.
    """
    data = past[-1]
    if 0 < step < len(levels) - 2:
        before, here, target = levels[step - 1 : step + 2]
        ratio = (here.log_ratio - before.log_ratio) / (target.log_ratio - here.log_ratio)
        data = data + (0.5 / ratio) * (past[-1] - past[-2])
    return _move(x, data, levels[step], levels[step + 1])


def _correct(x: Latents, past: list[Latents], levels: list[_Level], step: int) -> Latents:
    """Redo the step from `x` at levels[step - 1] to levels[step], now that past[-1] was predicted there.

    UniC, Zhao et al. 2023, algorithm 1: the data is taken to be the prediction at levels[step - 1] plus
    weighted differences to the adjacent predictions; the weights solve R w = b for B2(h) = exp(-h) - 1. With the new
    point as the only adjacent one, the weight is the limit 1/2 of b for small h, as in diffusers.
    """
    origin, target = levels[step - 1], levels[step]
    middle, newest = past[-2], past[-1]
    if step == 1:
        return _move(x, middle + 0.5 * (newest - middle), origin, target)
    # The neighbours lie at ratio * h (before the origin, ratio < 0) and at h: R = [[1, 1], [ratio, 1]].
    h = target.log_ratio - origin.log_ratio
    ratio = (levels[step - 2].log_ratio - origin.log_ratio) / h
    growth = math.expm1(-h)
    moment = -growth / h - 1
    b1 = moment / growth
    b2 = -2 * (moment / h + 0.5) / growth
    w_old = (b1 - b2) / (1 - ratio)
    w_new = b1 - w_old
    data = middle + (w_old / ratio) * (past[-3] - middle) + w_new * (newest - middle)
    return _move(x, data, origin, target)


def _move(x: Latents, data: Latents, origin: _Level, target: _Level) -> Latents:
    """The exact solution from `origin` to `target` if the clean data were `data` all the way.

    With h the growth of l: (s' / s) x - a' (exp(-h) - 1) data. This is the first step of Lu et al. 2022b,
    algorithm 2, and DDIM.
    """
    growth = math.expm1(origin.log_ratio - target.log_ratio)
    return (target.noise / origin.noise) * x - (target.signal * growth) * data
