"""The noise schedule: signal and noise at each timestep, the timesteps of a run, and the starting noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import InputError

Latents = npt.NDArray[np.float32]
Spacing = Literal["leading", "logsnr"]
PredictionType = Literal["epsilon", "v_prediction"]

# A manifest is read from outside: without a bound, one number in it could ask for all the memory.
_MAX_TRAIN_TIMESTEPS = 10_000
_MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class NoiseSchedule:
    """The forward process x_t = sqrt(a_t) * data + sqrt(1 - a_t) * noise, a_t being `alphas_cumprod[t]`.

    Ho et al. 2020, equation 4; "scaled_linear" (betas whose square roots are evenly spaced) is that of latent
    diffusion, Rombach et al. 2022. `beta_schedule` has one legal value: it is a field so that a bundle made for
    another process is refused instead of being run wrongly. `prediction_type` is what the network predicts, see
    `predicted_noise`.

    Raises:
        InputError: an argument is of the wrong type, out of range, or names a process that is not run here.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: PredictionType = "epsilon"

    def __post_init__(self) -> None:
        """Refuse what cannot be a schedule."""
        _require_integer("num_train_timesteps", self.num_train_timesteps, 2, _MAX_TRAIN_TIMESTEPS)
        start = _finite("beta_start", self.beta_start)
        end = _finite("beta_end", self.beta_end)
        if not 0 < start <= end < 1:
            raise InputError(
                f"beta_start is {start} and beta_end is {end}; expected 0 < beta_start <= beta_end < 1. "
                "Moebius was trained with 0.00085 and 0.012."
            )
        for name, received, known in (
            ("beta_schedule", self.beta_schedule, ("scaled_linear",)),
            ("prediction_type", self.prediction_type, get_args(PredictionType)),
        ):
            if received not in known:
                listed = " and ".join(map(repr, known))
                raise InputError(f"{name} is {received!r}; only {listed} can be run here. Export the bundle again.")
        bars = self.alphas_cumprod
        # The samplers divide by sqrt(a), sqrt(1 - a) and by differences of log(a / (1 - a)).
        if not (bars[0] < 1 and bars[-1] > 0 and np.all(np.diff(bars) < 0)):
            raise InputError(
                f"beta_start {start} and beta_end {end} over {self.num_train_timesteps} steps leave no "
                "usable noise level at some timestep. Moebius was trained with 0.00085, 0.012 and 1000."
            )

    @cached_property
    def alphas_cumprod(self) -> Latents:
        """The cumulative products of (1 - beta), float32 [num_train_timesteps], read-only, falling from below 1.

        The network was trained, and the reference sampled, with betas rounded to float32, which moves the
        products by up to 1e-6 of themselves. Hence the same roundings as torch's: the square roots of the
        betas spaced from both ends with one rounding each (torch fuses the multiplication and the addition),
        squares and differences in float32, the product accumulated in float64 and rounded once per entry.
        """
        count = self.num_train_timesteps
        first, last = np.float32(math.sqrt(self.beta_start)), np.float32(math.sqrt(self.beta_end))
        step = float((last - first) / np.float32(count - 1))
        index = np.arange(count)
        # In float64 the product of a float32 and an index is exact: only the cast to float32 rounds.
        roots = np.where(
            index < count // 2, float(first) + step * index, float(last) - step * (count - 1 - index)
        ).astype(np.float32)
        alphas = np.float32(1) - roots * roots
        bars: Latents = np.cumprod(alphas, dtype=np.float64).astype(np.float32)
        bars.setflags(write=False)
        return bars

    def inference_timesteps(
        self, num_inference_steps: int, strength: float = 1.0, spacing: Spacing = "leading"
    ) -> npt.NDArray[np.int64]:
        """The timesteps to evaluate, int64 [min(int(S * strength), S)], falling.

        "leading", the reference's, without offset: i * (num_train_timesteps // S) for i = S - 1 down to 0.
        "logsnr": S steps of equal length in log(signal / noise) from the last training timestep towards the
        first, each at the nearest timestep; the spacing for which solvers of higher order are made (Lu et al.
        2022a, section 3.3). `strength` drops the first (noisiest) S - min(int(S * strength), S) of them. The
        product S * strength is truncated as it comes out in binary, like the reference's: 50 * 0.58 keeps 28.

        Args:
            num_inference_steps: S, from 1 to num_train_timesteps. 1 with "leading" gives timestep 0 alone,
                which hardly changes the latents.
            strength: above 0, at most 1.
            spacing: "leading" or "logsnr".

        Raises:
            InputError: an argument is out of range, or no timestep remains.
        """
        _require_integer("the number of steps", num_inference_steps, 1, self.num_train_timesteps)
        share = _finite("strength", strength)
        if not 0 < share <= 1:
            raise InputError(f"strength is {share}; expected a number above 0 and at most 1 (default 0.99).")
        steps = int(num_inference_steps)
        kept = min(int(steps * share), steps)
        if kept == 0:
            raise InputError(
                f"strength {share} keeps none of {steps} step{'s' if steps > 1 else ''}; at least one is "
                f"needed. Use a strength of at least {least_strength(steps):g}, or more steps."
            )
        if spacing == "leading":
            every = np.arange(steps - 1, -1, -1, dtype=np.int64) * (self.num_train_timesteps // steps)
        elif spacing == "logsnr":
            every = self._even_log_snr(steps)
        else:
            raise InputError(f"spacing is {spacing!r}; expected 'leading' or 'logsnr'.")
        return every[steps - kept :]

    def _even_log_snr(self, steps: int) -> npt.NDArray[np.int64]:
        """The start of each of `steps` equal steps in half log-SNR, int64 [steps], strictly falling."""
        bars = self.alphas_cumprod.astype(np.float64)
        rising = 0.5 * np.log(bars / (1 - bars))[::-1]  # from the last timestep to the first
        wanted = np.linspace(rising[0], rising[-1], steps + 1)[:-1]
        right = np.searchsorted(rising, wanted).clip(1, len(rising) - 1)
        nearest = right - (wanted - rising[right - 1] < rising[right] - wanted)
        timesteps: npt.NDArray[np.int64] = (len(rising) - 1 - nearest).astype(np.int64)
        # Near timestep 0 the steps are shorter than a timestep: there each takes the next free one.
        rank = np.arange(steps - 1, -1, -1)
        return np.maximum.accumulate((timesteps - rank)[::-1])[::-1] + rank

    def predicted_noise(self, predicted: Latents, latents: Latents, timestep: int) -> Latents:
        """The noise in `latents` according to what the network predicted from them.

        With `prediction_type` "epsilon" that is the prediction itself; with "v_prediction" (Salimans and Ho 2022,
        appendix D: v = sqrt(a) * noise - sqrt(1 - a) * data) it is sqrt(a) * v + sqrt(1 - a) * latents.

        Args:
            predicted: the network's output, float32 [B, 4, h, w].
            latents: noisy latents that it was given, of the same shape.
            timestep: of the latents, from 0 to num_train_timesteps - 1.

        Returns:
            float32 [B, 4, h, w].
        """
        if self.prediction_type == "epsilon":
            return predicted
        bar = float(self.alphas_cumprod[timestep])
        noise: Latents = math.sqrt(bar) * predicted + math.sqrt(1 - bar) * latents
        return noise

    def add_noise(self, latents: Latents, noise: Latents, timestep: int) -> Latents:
        """Adds noise: latents at `timestep` of the forward process (Ho et al. 2020, equation 4).

        Args:
            latents: clean, scaled latents [B, 4, h, w].
            noise: N(0, 1) of the same shape.
            timestep: from 0 to num_train_timesteps - 1.

        Returns:
            float32 [B, 4, h, w].

        Raises:
            InputError: the shapes differ, or the timestep is out of range.
        """
        _require_integer("timestep", timestep, 0, self.num_train_timesteps - 1)
        clean, added = np.asarray(latents, np.float32), np.asarray(noise, np.float32)
        if clean.shape != added.shape:
            raise InputError(
                f"noise has shape {list(added.shape)} and the latents {list(clean.shape)}; give noise of the "
                "latents' shape."
            )
        bar = float(self.alphas_cumprod[timestep])
        # Python floats keep float32 arrays float32 under NumPy 1 and 2 alike; NumPy's own float64 would not.
        noisy: Latents = math.sqrt(bar) * clean + math.sqrt(1 - bar) * added
        return noisy


def least_strength(steps: int) -> float:
    """The least strength that keeps one of `steps` steps (at least 1), rounded up to four decimals."""
    return math.ceil(10_000 / steps) / 10_000


def initial_noise(seed: int, shape: tuple[int, int, int, int], noise_offset: float = 0.0357) -> Latents:
    """N(0, 1) noise plus `noise_offset` * N(0, 1) per channel: the same for a seed on every device.

    `RandomState` is NumPy's frozen generator: NEP 19 keeps its stream for all versions, which it does not
    promise for `default_rng`. The stream is not torch's: to repeat a torch run, hand over its noise.

    Args:
        seed: 0 to 2**32 - 1.
        shape: [B, channels, h, w]. Its elements are drawn first, in row-major order, then the offsets.
        noise_offset: standard deviation of the offset, 0 or more; 0 leaves the noise unchanged.

    Returns:
        float32 of `shape`.

    Raises:
        InputError: an argument is of the wrong type or out of range.
    """
    return next(noise_stream(seed, shape, noise_offset))


def noise_stream(seed: int, shape: tuple[int, int, int, int], noise_offset: float = 0.0357) -> Iterator[Latents]:
    """Noise without end from one seed. The first array is `initial_noise`, the others follow in the same stream.

    Arguments and errors are those of `initial_noise`; the errors are raised by the call itself.
    """
    _require_integer("seed", seed, 0, _MAX_SEED)
    if len(shape) != 4:
        raise InputError(f"the noise's shape is {list(shape)}; expected four sizes: [batch, channels, height, width].")
    for size in shape:
        _require_integer("a size of the noise", size, 1, 2**31 - 1)
    offset = _finite("noise_offset", noise_offset)
    if offset < 0:
        raise InputError(f"noise_offset is {offset}; expected 0 or more (the reference's is 0.0357).")
    return _drawn(np.random.RandomState(int(seed)), shape, offset)


def _drawn(stream: np.random.RandomState, shape: tuple[int, int, int, int], offset: float) -> Iterator[Latents]:
    while True:
        noise = stream.standard_normal(shape)
        noise += offset * stream.standard_normal((shape[0], shape[1], 1, 1))
        yield noise.astype(np.float32)


def _require_integer(name: str, value: object, low: int, high: int) -> None:
    """Raise InputError unless `value` is a whole number (not a bool) from `low` to `high`."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; expected a whole number from {low} to {high}.")
    if not low <= int(value) <= high:
        raise InputError(f"{name} is {int(value)}; expected a whole number from {low} to {high}.")


def _finite(name: str, value: object) -> float:
    """`value` as a Python float; InputError unless it is a finite number (not a bool)."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}; expected a number.")
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}; expected a finite number.")
    return number
