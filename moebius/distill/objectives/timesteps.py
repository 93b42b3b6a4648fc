"""The forward diffusion process in training: draws timesteps and noise, adds noise, estimates clean latents.

The noise levels are those of the runtime's schedule, `moebius_runtime.sampling.schedule.NoiseSchedule`.
A generator draws on its own device and results are moved to the requested one, so a CPU generator gives the same batch
on every device.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moebius.errors import TrainingError
from moebius.network.config import PredictionType
from moebius_runtime.sampling.schedule import NoiseSchedule

TimestepSampling = Literal["uniform", "lognorm"]


class Noised(NamedTuple):
    """A noised batch: noisy latents and prediction target [B, C, h, w], timesteps [B]."""

    latents: Tensor
    target: Tensor
    timesteps: Tensor
    prediction_type: PredictionType = "epsilon"


def alphas_cumprod(count: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """Products of (1 - beta), float32 [count] on the CPU: `NoiseSchedule.alphas_cumprod` as a tensor.

    Raises:
        InputError: fewer than 2 timesteps, or betas outside 0 < start <= end < 1.
    """
    return torch.from_numpy(NoiseSchedule(count, beta_start, beta_end).alphas_cumprod.copy())


def sample_timesteps(
    batch: int,
    generator: torch.Generator,
    *,
    sampling: TimestepSampling = "lognorm",
    count: int = 1000,
    mean: float = 0.0,
    std: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws timesteps from 0 to `count` - 1, int64 [batch].

    "uniform": all timesteps are equally likely. "lognorm": floor(count * sigmoid(x)), x ~ N(mean, std²), which prefers
    the middle; P(t < k) = Φ((logit(k / count) - mean) / std). This is the logit-normal distribution of Esser et al.
    2024, "Scaling Rectified Flow Transformers", section 3.1. Moebius' released command has a flag `lognorm_t` whose
    code was not published; this interpretation is ours.

    Raises:
        TrainingError: an unknown sampling, or std not above 0.
    """
    if sampling == "uniform":
        drawn = torch.randint(count, (batch,), generator=generator, device=generator.device)
    elif sampling == "lognorm":
        if not std > 0:
            raise TrainingError(f"the timesteps' std is {std}; expected a number above 0 (default 1)")
        normal = torch.randn(batch, generator=generator, device=generator.device, dtype=torch.float64)
        share = torch.sigmoid(normal * std + mean)
        drawn = (share * count).long().clamp_(max=count - 1)  # sigmoid rounds to 1 from 37 on
    else:
        raise TrainingError(f"timestep sampling is {sampling!r}; expected 'uniform' or 'lognorm'")
    return drawn.to(device or generator.device)


def sample_noise(
    shape: tuple[int, int, int, int],
    generator: torch.Generator,
    *,
    offset: float = 0.0357,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draws N(0, 1) noise plus `offset` * N(0, 1) per sample and channel, float32 of `shape` [B, C, h, w].

    The offset is drawn after the noise and lets the network learn to move a picture's mean (Guttenberg 2023).

    Raises:
        TrainingError: a negative offset.
    """
    if not offset >= 0:
        raise TrainingError(f"the noise offset is {offset}; expected 0 or more (the released recipe's is 0.0357)")
    noise = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float32)
    if offset:
        noise += offset * torch.randn((*shape[:2], 1, 1), generator=generator, device=generator.device)
    return noise.to(device or generator.device)


def add_noise(latents: Tensor, noise: Tensor, timesteps: Tensor, bars: Tensor) -> Tensor:
    """Adds noise: sqrt(a) * latents + sqrt(1 - a) * noise, a = bars[t] (Ho et al. 2020, equation 4).

    Args:
        latents: clean, scaled latents [B, C, h, w].
        noise: of the same shape.
        timesteps: int64 [B].
        bars: `alphas_cumprod()`.

    Returns:
        [B, C, h, w], float32 at least.
    """
    signal, spread = _factors(timesteps, bars, latents)
    return signal * latents + spread * noise


def velocity(latents: Tensor, noise: Tensor, timesteps: Tensor, bars: Tensor) -> Tensor:
    """The target of "v_prediction" networks: sqrt(a) * noise - sqrt(1 - a) * latents.

    Salimans and Ho 2022, "Progressive Distillation for Fast Sampling of Diffusion Models", appendix D. Shapes and types
    as in `add_noise`.
    """
    signal, spread = _factors(timesteps, bars, latents)
    return signal * noise - spread * latents


def predict_clean(
    noisy: Tensor,
    predicted: Tensor,
    timesteps: Tensor,
    bars: Tensor,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """Estimates the clean latents in one step: the inverse of `add_noise`.

    From the noise, (noisy - sqrt(1 - a) * noise) / sqrt(a) (Ho et al. 2020, equation 15): an error in the noise is
    multiplied by sqrt((1 - a) / a), which is 14.6 at the last timestep. From the velocity, sqrt(a) * noisy -
    sqrt(1 - a) * velocity (Salimans and Ho 2022): an error is multiplied by at most 1. Shapes and dtypes as in
    `add_noise`; `predicted` is the true value or a prediction of it.
    """
    signal, spread = _factors(timesteps, bars, noisy)
    if prediction_type == "v_prediction":
        return signal * noisy - spread * predicted
    return (noisy - spread * predicted) / signal


def predict_noise(
    noisy: Tensor,
    predicted: Tensor,
    timesteps: Tensor,
    bars: Tensor,
    prediction_type: PredictionType = "epsilon",
) -> Tensor:
    """Estimates the noise in one step: the prediction itself, or sqrt(a) * velocity + sqrt(1 - a) * noisy.

    Salimans and Ho 2022, appendix D. Shapes and dtypes as in `predict_clean`.
    """
    signal, spread = _factors(timesteps, bars, noisy)
    if prediction_type == "v_prediction":
        return signal * predicted + spread * noisy
    return predicted.to(signal.dtype)


def target_for(
    noisy: Tensor, latents: Tensor, timesteps: Tensor, bars: Tensor, prediction_type: PredictionType = "epsilon"
) -> Tensor:
    """The target with which `predict_clean` gives `latents` from any `noisy`, also one that was made of others.

    (noisy - sqrt(a) * latents) / sqrt(1 - a) for the noise, (sqrt(a) * noisy - latents) / sqrt(1 - a) for the velocity.
    Where `noisy` is `add_noise` of the same latents, it is the noise, or `velocity`. Shapes and dtypes as in
    `add_noise`.
    """
    signal, spread = _factors(timesteps, bars, noisy)
    if prediction_type == "v_prediction":
        return (signal * noisy - latents) / spread
    return (noisy - signal * latents) / spread


def snr_weights(
    timesteps: Tensor, bars: Tensor, least: float, most: float, prediction_type: PredictionType = "epsilon"
) -> Tensor:
    """Loss weights with which the error of the clean latents counts clamp(SNR, least, most) times; [B, 1, 1, 1].

    SNR = a / (1 - a). An error of the noise is the error of the clean latents times SNR, an error of the velocity times
    SNR + 1, so the weights are clamp(SNR, least, most) / SNR and / (SNR + 1). `most` alone is min-SNR (Hang et al.
    2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy"); `least` 1 is the truncated SNR of Salimans and
    Ho (2022), which keeps the last timesteps: they decide what a masked region shows.
    """
    snr = _snr(timesteps, bars)
    return snr.clamp(least, most) / (snr + 1 if prediction_type == "v_prediction" else snr)


def clamped_snr(timesteps: Tensor, bars: Tensor, least: float, most: float) -> Tensor:
    """clamp(SNR, least, most), [B, 1, 1, 1]: `snr_weights` for losses on the clean latents themselves."""
    return _snr(timesteps, bars).clamp(least, most)


def _snr(timesteps: Tensor, bars: Tensor) -> Tensor:
    """a / (1 - a), [B, 1, 1, 1]."""
    signal, spread = _factors(timesteps, bars, bars)
    return (signal / spread).square()


def _factors(timesteps: Tensor, bars: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """sqrt(a) and sqrt(1 - a), each [B, 1, 1, 1]: in float64 up to the one rounding, to float32 at least."""
    chosen = bars.to(timesteps.device)[timesteps].double()[:, None, None, None]
    dtype = torch.promote_types(like.dtype, torch.float32)
    return tuple(value.to(device=like.device, dtype=dtype) for value in (chosen.sqrt(), (1 - chosen).sqrt()))  # type: ignore[return-value]
