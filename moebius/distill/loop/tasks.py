"""Training tasks: the loss of a batch for student, teacher or VAE, and the modules that it needs.

A task owns the trained network (`network`), wrapped as `module` so that distributed wrappers see one `forward`, and the
frozen modules: teacher, VAE, perceptual distance. Random numbers are drawn for the global batch, identically in every
process, and each process takes its rows: sample i of the global batch is row i // world of process i % world.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.data.datasets import Batch
from moebius.data.encoded import LatentBatch
from moebius.distill.loop.context import TrainContext
from moebius.distill.loop.crops import crop_place, crop_to_hole
from moebius.distill.loop.decoded import DecodedLoss
from moebius.distill.loop.sharding import gathered_by_forward
from moebius.distill.objectives.balance import balance, coarse_parameter, fine_parameter
from moebius.distill.objectives.losses import Distance, LossOptions, Prediction, distillation_losses
from moebius.distill.objectives.timesteps import (
    Noised,
    add_noise,
    alphas_cumprod,
    predict_clean,
    sample_noise,
    sample_timesteps,
    snr_weights,
    target_for,
    velocity,
)
from moebius.distill.settings import Settings, StartSettings, TimestepSettings, VaeLosses
from moebius.network.config import VaeConfig
from moebius.network.lambda_layers import set_crop
from moebius.network.student import Moebius
from moebius.network.teacher import Teacher
from moebius.network.vae import VaeDecoder, VaeEncoder


class Outcome(NamedTuple):
    """The loss to call `backward` on, and detached scalars for the log."""

    total: Tensor
    values: dict[str, Tensor]


class Task(ABC):
    """A kind of training. The trainer calls `module` through its distributed wrapper."""

    network: nn.Module
    module: nn.Module

    @abstractmethod
    def outcome(self, module: nn.Module, batch: Batch | LatentBatch, context: TrainContext) -> Outcome:
        """Computes the loss of a batch. `module` is `self.module` in its distributed wrapper."""

    @abstractmethod
    def forward(self, network: nn.Module, batch: Batch | LatentBatch, context: TrainContext) -> None:
        """Runs a forward pass as in training, to update the batch norm statistics of `network`."""

    frozen: tuple[nn.Module, ...] = ()
    """Modules that are not trained; the trainer moves them to its device."""

    vae_sha256: str | None = None
    """SHA-256 of the VAE's weights where the task encodes pictures."""

    average: nn.Module | None = None
    """The averaged network (EMA), on the trainer's device, in eval mode. The trainer sets it."""


class _Predictor(nn.Module):
    """A network's `forward_features` as `forward`."""

    def __init__(self, network: Moebius | Teacher) -> None:
        super().__init__()
        self.network = network

    def forward(self, sample: Tensor, timesteps: Tensor, input_ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        noise, features = self.network.forward_features(sample, timesteps, input_ids)
        return noise, tuple(features)


class Encoder(Protocol):
    """Encodes pictures to latents."""

    def __call__(self, batch: Batch) -> LatentBatch:
        """Encodes a batch."""


def encoding(encoder: VaeEncoder, config: VaeConfig) -> Encoder:
    """An `Encoder` that matches `moebius_runtime`'s pipeline.

    Latents are the mode of the posterior; the mask is sampled at the top-left pixel of each block.
    """

    @torch.no_grad()
    def encode(batch: Batch) -> LatentBatch:
        device = next(encoder.parameters()).device
        image, mask = batch.image.to(device), batch.mask.to(device)
        both = encoder(torch.cat([image, image * (1 - mask)]))  # [2B, 4, S, S]
        latents, masked = both.chunk(2)
        step = config.downscale
        return LatentBatch(latents, masked, mask[:, :, ::step, ::step], batch.categories.to(device))

    return encode


TaskSampler = Literal["ddim", "lcm"]


class DiffusionTask(Task):
    """Trains student or teacher on noisy latents; the student with a teacher, or on the true noise alone.

    `sampler` is the one that the network is trained for; sample pictures use it.
    """

    sampler: TaskSampler = "ddim"

    def __init__(
        self,
        network: Moebius | Teacher,
        losses: LossOptions,
        settings: Settings,
        *,
        teacher: Teacher | None = None,
        encode: Encoder | None = None,
        perceptual: Distance | None = None,
        pixels: DecodedLoss | None = None,
    ) -> None:
        self.network, self.module = network, _Predictor(network)
        self._losses, self._balance = losses, settings.balance
        self.prediction_type = settings.network.build().prediction_type
        self._timesteps: TimestepSettings = settings.timesteps
        self._teacher, self._encode, self._perceptual = teacher, encode, perceptual
        self._pixels = pixels
        frozen = (teacher, perceptual, None if pixels is None else pixels.decoder)
        self.frozen = tuple(module for module in frozen if isinstance(module, nn.Module))
        self._crop, self._hole_weight, self._snr = settings.data.latent_crop, settings.hole_weight, settings.snr
        self._start = settings.start
        self._bars = alphas_cumprod()

    def samples(self, batch: Batch | LatentBatch) -> LatentBatch:
        """The batch as latents."""
        if isinstance(batch, LatentBatch):
            return batch
        assert self._encode is not None, "settings without a VAE and with pictures are refused"
        return self._encode(batch)

    def _noised(
        self, network: nn.Module, batch: Batch | LatentBatch, context: TrainContext
    ) -> tuple[LatentBatch, Noised]:
        """The batch as latents, and noised at randomly drawn timesteps. Crops tell a student where they are from."""
        sample = self.samples(batch).to(context.device)
        count = sample.latents.shape[0]
        if self._crop:
            drawn_places = torch.rand(count * context.world, 3, generator=context.generator)
            sample = crop_to_hole(sample, self._crop, context.own(drawn_places))
            if isinstance(network, Moebius):
                self._set_place(network, crop_place(network, self._crop, context.generator))
        shape = (count * context.world, *sample.latents.shape[1:])
        timesteps = context.own(self._draw_timesteps(shape[0], context))
        noise = context.own(sample_noise(shape, context.generator, offset=self._timesteps.noise_offset))
        if self._start is not None:
            return sample, self._noised_start(sample, noise, timesteps, context)
        target = noise
        if self.prediction_type == "v_prediction":
            target = velocity(sample.latents, noise, timesteps, self._bars)
        seen_latents = add_noise(sample.latents, noise, timesteps, self._bars)
        return sample, Noised(seen_latents, target, timesteps, self.prediction_type)

    def _set_place(self, network: Moebius, place: tuple[float, float]) -> None:
        """Tells the networks that see the batch where its crops are from."""
        set_crop(network, place)

    def _draw_timesteps(self, count: int, context: TrainContext) -> Tensor:
        """Timesteps of the global batch, int64 [count]."""
        drawn = self._timesteps
        return sample_timesteps(count, context.generator, sampling=drawn.sampling, mean=drawn.mean, std=drawn.std)

    def _draw_start_timesteps(self, options: StartSettings, count: int, context: TrainContext) -> Tensor:
        """Timesteps of the samples of the global batch that are noised from the start, int64 [count]."""
        return torch.randint(options.least, options.most + 1, (count,), generator=context.generator)

    def _noised_start(self, sample: LatentBatch, noise: Tensor, timesteps: Tensor, context: TrainContext) -> Noised:
        """A batch in which a share of samples is noise on the filled start; the target is the true picture."""
        assert self._start is not None
        assert sample.start is not None, "latents without starts are refused"
        options, count = self._start, len(timesteps) * context.world
        chosen = context.own(torch.rand(count, generator=context.generator)) < options.share
        early = context.own(self._draw_start_timesteps(options, count, context))
        timesteps = torch.where(chosen, early, timesteps)
        clean = torch.where(chosen[:, None, None, None], sample.start, sample.latents)  # [B, 4, S, S]
        noisy = add_noise(clean, noise, timesteps, self._bars)
        target = target_for(noisy, sample.latents, timesteps, self._bars, self.prediction_type)
        return Noised(noisy, target, timesteps, self.prediction_type)

    def forward(self, network: nn.Module, batch: Batch | LatentBatch, context: TrainContext) -> None:
        """See `Task`."""
        sample, noisy = self._noised(network, batch, context)
        with context.autocast():
            network(torch.cat([noisy.latents, sample.mask, sample.masked], dim=1), noisy.timesteps, sample.categories)

    def outcome(self, module: nn.Module, batch: Batch | LatentBatch, context: TrainContext) -> Outcome:
        """Computes and balances the enabled losses."""
        sample, noisy = self._noised(self.network, batch, context)
        timesteps = noisy.timesteps
        seen = torch.cat([noisy.latents, sample.mask, sample.masked], dim=1)  # [B, 9, S, S]
        predicted = Prediction(*module(seen, timesteps, sample.categories))
        wanted = None
        if self._teacher is not None and self._losses.needs_teacher:
            with torch.no_grad(), context.autocast():
                wanted = Prediction(*self._teacher.forward_features(seen, timesteps, sample.categories))
        values = distillation_losses(
            self._losses,
            predicted,
            noisy,
            self._bars,
            teacher=wanted,
            perceptual=self._perceptual,
            weight=self._weight(sample, timesteps),
        )
        shown = {f"loss/{name}": value.detach() for name, value in values.items()}
        decoded = self._decoded(predicted.output, sample, noisy, context)
        extra: Tensor | float = 0.0
        if decoded is not None and self._pixels is not None:
            extra = self._pixels.weight * decoded
            shown["loss/pixels"] = decoded.detach()
        if len(values) == 1:
            ((name, value),) = values.items()
            return Outcome(self._losses.multiplier(name) * value + extra, shown)
        assert isinstance(self.network, Moebius)  # a teacher has the one loss
        tap = self._losses.taps[-1].student if self._losses.coarse else 0
        fine, coarse = fine_parameter(self.network), coarse_parameter(self.network, tap)
        if self._balance.enabled:
            fine, coarse = gathered_by_forward(fine, "θ_F"), gathered_by_forward(coarse, "θ_C")
        balanced = balance(
            values,
            self._losses,
            self._balance,
            fine=fine,
            coarse=coarse,
            scale=context.scale,
            reduce=context.mean if context.world > 1 else None,
        )
        shown |= {f"weight/{name}": value for name, value in balanced.weights.items()}
        shown |= {f"norm/{name}": value for name, value in balanced.norms.items()}
        return Outcome(balanced.total + extra, shown)

    def _decoded(self, output: Tensor, sample: LatentBatch, noisy: Noised, context: TrainContext) -> Tensor | None:
        """The pixel loss without its weight; None where it is off."""
        if self._pixels is None:
            return None
        clean = predict_clean(noisy.latents, output, noisy.timesteps, self._bars, noisy.prediction_type)
        return self._pixels(clean, sample, noisy.timesteps, context)

    def _weight(self, sample: LatentBatch, timesteps: Tensor) -> Tensor | None:
        """Weights of squared errors by region and timestep, [B, 1, S, S] or [B, 1, 1, 1]; None is uniform."""
        weight = None if self._hole_weight == 1 else hole_weights(sample.mask, self._hole_weight)
        if self._snr is None:
            return weight
        by_time = snr_weights(timesteps, self._bars, self._snr.least, self._snr.most, self.prediction_type)
        by_time = by_time.to(sample.mask.device)
        return by_time if weight is None else weight * by_time


_BLOCK = 8  # pixels of a side over which colours are averaged


class _Autoencoder(nn.Module):
    """Encodes a picture, samples the posterior with the given noise, and decodes the sample."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, image: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(image).latent_dist  # type: ignore[operator]
        sample = posterior.mean + posterior.std * noise
        return self.vae.decode(sample).sample, posterior.mean, posterior.logvar  # type: ignore[operator]


class VaeTask(Task):
    """Trains the autoencoder on pictures: absolute errors of pixels, edges and colours, and a small KL term."""

    def __init__(self, vae: nn.Module, config: VaeConfig, losses: VaeLosses) -> None:
        self.network, self.module = vae, _Autoencoder(vae)
        self._config, self._losses = config, losses

    def forward(self, network: nn.Module, batch: Batch | LatentBatch, context: TrainContext) -> None:
        """Does nothing: the autoencoder has no batch norms."""

    def outcome(self, module: nn.Module, batch: Batch | LatentBatch, context: TrainContext) -> Outcome:
        """Reconstruction losses. For a share of the pictures the masked region is 0, in input and target."""
        assert isinstance(batch, Batch), "settings that train a VAE on latents are refused"
        count, options = batch.image.shape[0] * context.world, self._losses
        image = batch.image.to(context.device)
        emptied = context.own(torch.rand(count, generator=context.generator)) < options.masked
        mask = batch.mask.to(context.device) * emptied[:, None, None, None]
        image = image * (1 - mask)
        side = image.shape[-1] // self._config.downscale
        shape = (count, self._config.latent_channels, side, side)
        noise = context.own(torch.randn(shape, generator=context.generator))
        decoded, mean, logvar = module(image, noise)
        decoded, mean, logvar = decoded.float(), mean.float(), logvar.float()
        values = {
            "pixels": (decoded - image).abs().mean(),
            "edges": edge_loss(decoded, image),
            "colours": F.avg_pool2d(decoded - image, _BLOCK).abs().mean(),
            "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
        }
        total = torch.stack([getattr(options, name) * value for name, value in values.items()]).sum()
        shown = {f"loss/{name}": value.detach() for name, value in values.items()}
        return Outcome(total, shown | {"latents/std": mean.detach().std()})


def edge_loss(image: Tensor, wanted: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute error of differences between adjacent pixels at full, half, quarter, ... size; penalizes blur.

    Both [B, C, H, W], sides divisible by 2^(scales - 1).
    """
    difference, terms = image - wanted, []
    for scale in range(scales):
        if scale:
            difference = F.avg_pool2d(difference, 2)
        terms += [difference.diff(dim=axis).abs().mean() for axis in (2, 3)]
    return torch.stack(terms).mean()


def hole_weights(mask: Tensor, weight: float) -> Tensor:
    """Loss weights: `weight` in the masked region, 1 elsewhere, scaled to a mean of 1 per sample. [B, 1, S, S]."""
    counts = 1 + (weight - 1) * mask
    return counts / counts.mean(dim=(1, 2, 3), keepdim=True)


def freeze_statistics(network: nn.Module) -> None:
    """Freezes batch norm statistics; gains and shifts still train. Call after each `train()`."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def statistics(network: nn.Module) -> list[Tensor]:
    """The statistics buffers of all batch norms, with their counts: not copies."""
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return [buffer for norm in norms for buffer in norm.buffers(recurse=False)]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Puts a network into eval mode within the block and restores the mode of each module afterwards.

    `network.train()` would unfreeze batch norms that `freeze_statistics` froze.
    """
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def halves(vae: nn.Module) -> tuple[VaeEncoder, VaeDecoder]:
    """Splits an autoencoder into a frozen encoder and decoder."""
    vae.requires_grad_(False).eval()
    return VaeEncoder(vae), VaeDecoder(vae)
