"""Builds the networks, the data stream and the task of a training run from its settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch

from moebius.data.datasets import Batch, SampleStream, batches
from moebius.data.encoded import EncodedStream, LatentBatch
from moebius.data.opening import open_source
from moebius.data.shards import Encoding
from moebius.data.sources import IndexedSource, JoinedSource, Source
from moebius.distill.loop.decoded import DecodedLoss
from moebius.distill.loop.few_steps import ConsistencyTask, GuidanceTask
from moebius.distill.loop.guided_teachers import check_known_vaes, load_guided_teacher, other_vae, starting_student
from moebius.distill.loop.tasks import DiffusionTask, Encoder, Task, VaeTask, encoding, halves
from moebius.distill.objectives.losses import LossOptions
from moebius.distill.objectives.perceptual import ELatentLpips
from moebius.distill.settings import DataSettings, PerceptualSettings, Settings
from moebius.errors import TrainingError
from moebius.network.config import Preset
from moebius.network.student import Moebius
from moebius.network.teacher import Teacher
from moebius.network.vae import VaeDecoder, build_vae
from moebius.weights.checkpoint import Checkpoint
from moebius.weights.load import check_prediction_type, load_student, load_teacher, load_vae
from moebius.weights.sources import Progress

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

Say = Progress  # the name of version 0.1
_ONLY_TASK = LossOptions(coarse=0.0, fine=0.0, perceptual=0.0)


class Stream(Protocol):
    """Batches of one process, with a position that can be saved."""

    def __iter__(self) -> Iterator[Batch | LatentBatch]:
        """Yields batches endlessly."""

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch returned."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position."""

    def close(self) -> None:
        """Stops its threads."""


class PictureStream:
    """Adapts a `SampleStream` to `Stream`: batches of pictures."""

    def __init__(self, stream: SampleStream, batch: int, num_categories: int) -> None:
        self._stream, self._batch, self._categories = stream, batch, num_categories

    def __iter__(self) -> Iterator[Batch | LatentBatch]:
        return iter(batches(self._stream, self._batch, self._categories))

    def state_dict(self) -> dict[str, Any]:
        """See `Stream`."""
        return self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Stream`."""
        self._stream.load_state_dict(state)

    def close(self) -> None:
        """See `Stream`."""
        self._stream.close()


def build_task(settings: Settings, progress: Progress = lambda text: None) -> Task:
    """Builds the task of a run: its networks, with weights, and its losses.

    Fresh weights are drawn from torch's global generator, so seed that first.

    Raises:
        TrainingError, CheckpointError: weights are missing or do not fit.
    """
    sizes, init = settings.network.build(), settings.init
    if settings.train == "vae":
        vae = build_vae(sizes.vae) if init is None else load_vae(init, sizes.vae, progress)[0]
        return VaeTask(vae.requires_grad_(True), sizes.vae, settings.vae_losses)
    encode: Encoder | None = None
    vae_sha256: str | None = None
    if settings.data.latents is None:
        vae, checkpoint = _vae(settings, sizes, progress)
        encode, vae_sha256 = encoding(halves(vae)[0], sizes.vae), checkpoint.sha256
        if settings.objective != "diffusion":
            check_known_vaes(settings, f"`vae: {settings.vae}`", vae_sha256)
    task = _diffusion_task(settings, sizes, encode, progress)
    task.vae_sha256 = vae_sha256
    return task


def _diffusion_task(settings: Settings, sizes: Preset, encode: Encoder | None, progress: Progress) -> DiffusionTask:
    init = settings.init
    if settings.train == "teacher":
        teacher = Teacher(sizes.teacher) if init is None else load_teacher(init, sizes.teacher, progress)[0]
        if settings.gradient_checkpointing:
            teacher.diff_model.enable_gradient_checkpointing()
        return DiffusionTask(
            teacher.requires_grad_(True), _ONLY_TASK, settings, encode=encode, pixels=_pixels(settings, progress)
        )
    if settings.objective != "diffusion":
        return _few_step_task(settings, sizes, encode, progress)
    student = Moebius(sizes.student) if init is None else load_student(init, sizes.student, progress)[0]
    student.set_lambda_form(settings.lambda_form)
    student.diff_model.gradient_checkpointing = settings.gradient_checkpointing
    frozen = None
    if settings.teacher is not None and settings.losses.needs_teacher:
        check_prediction_type(settings.teacher, sizes.prediction_type, progress)
        frozen = load_teacher(settings.teacher, sizes.teacher, progress)[0].requires_grad_(False)
    return DiffusionTask(
        student.requires_grad_(True),
        settings.losses,
        settings,
        teacher=frozen,
        encode=encode,
        perceptual=_perceptual(settings.perceptual) if settings.losses.perceptual else None,
        pixels=_pixels(settings, progress),
    )


def _pixels(settings: Settings, progress: Progress) -> DecodedLoss | None:
    return None if settings.pixels is None else DecodedLoss(decoder(settings, progress), settings.pixels)


def _few_step_task(settings: Settings, sizes: Preset, encode: Encoder | None, progress: Progress) -> DiffusionTask:
    teacher = load_guided_teacher(settings, sizes, progress)
    student = starting_student(settings, sizes, teacher, progress)
    student.set_lambda_form(settings.lambda_form)
    student.diff_model.gradient_checkpointing = settings.gradient_checkpointing
    kind = GuidanceTask if settings.objective == "guidance" else ConsistencyTask
    return kind(student.requires_grad_(True), settings, teacher, encode)


def decoder(settings: Settings, progress: Progress = lambda text: None) -> VaeDecoder:
    """Loads the decoder of the run's VAE, for sample pictures and the pixel loss."""
    return halves(_vae(settings, settings.network.build(), progress)[0])[1]


def _vae(settings: Settings, sizes: Preset, progress: Progress) -> tuple[AutoencoderKL, Checkpoint]:
    assert settings.vae is not None, "settings without a VAE where one is needed are refused"
    return load_vae(settings.vae, sizes.vae, progress)


def _perceptual(settings: PerceptualSettings | None) -> ELatentLpips:
    assert settings is not None, "settings without the weights' file are refused"
    return ELatentLpips(
        settings.weights, encoder=settings.encoder, augment=settings.augment, normalize=settings.normalize
    )


def build_stream(settings: Settings, rank: int = 0, world: int = 1, on_skip: Any = None) -> Stream:
    """Builds the sample stream of one process.

    Raises:
        DataError: the data is missing or unusable.
    """
    data, sizes = settings.data, settings.network.build()
    categories = sizes.teacher.num_categories if settings.train == "teacher" else sizes.student.num_categories
    if data.latents is not None:
        encoded = EncodedStream(data.latents, batch=settings.batch, seed=settings.seed, rank=rank, world=world)
        _check_latents(encoded, settings, sizes, categories)
        return encoded
    size = data.size or sizes.student.sample_size * sizes.vae.downscale
    if size % sizes.vae.downscale:
        raise TrainingError(
            f"samples of {size} pixels; expected a multiple of {sizes.vae.downscale}, as the VAE halves"
        )
    stream = SampleStream(
        joined(data, size),
        size,
        masks=data.masks,
        crops=data.crops,
        seed=settings.seed,
        rank=rank,
        world=world,
        broken=data.broken,
        threads=data.threads,
        on_skip=on_skip,
    )
    return PictureStream(stream, settings.batch, categories)


def _check_latents(stream: EncodedStream, settings: Settings, sizes: Preset, categories: int) -> None:
    """Checks that latents fit the network. A teacher takes any size, a student crops of its size."""
    made = stream.index.encoding
    wanted = sizes.student.sample_size
    crop = settings.data.latent_crop
    if settings.train == "student" and crop is not None:
        coarsest = 1 << (len(sizes.student.block_out_channels) - 1)
        if crop % coarsest or not crop <= min(made.latent_size, wanted):
            raise TrainingError(
                f"latent_crop {crop} of latents of {made.latent_size}x{made.latent_size} for a student of "
                f"{wanted}x{wanted}; expected a multiple of {coarsest} up to {min(made.latent_size, wanted)}"
            )
    elif settings.train == "student" and made.latent_size != wanted:
        raise TrainingError(
            f"{settings.data.latents} holds latents of {made.latent_size}x{made.latent_size}; the student takes "
            f"{wanted}x{wanted}, so encode pictures of {wanted * made.downscale} pixels"
        )
    if settings.pixels is not None and settings.pixels.crop > (seen := crop or made.latent_size):
        raise TrainingError(
            f"`pixels: {{crop: {settings.pixels.crop}}}` of latents of {seen}x{seen}; expected a crop of {seen} or less"
        )
    if settings.start is not None and not made.starts:
        raise TrainingError(
            f"{settings.data.latents} holds no latents of the filled start, which `start` needs; encode with --starts"
        )
    if made.num_categories != categories:
        raise TrainingError(
            f"{settings.data.latents} was encoded for {made.num_categories} categories and the network has "
            f"{categories}; encode again with the network's --preset"
        )
    _check_vae_of(settings, sizes, made)


def _check_vae_of(settings: Settings, sizes: Preset, made: Encoding) -> None:
    """Checks that latents are those of the run's VAE, and of the VAE that its starting weights know.

    A fine-tuned VAE has the same sizes and other latents, so the weights' hashes are compared where they are known.
    """
    folder, vae = settings.data.latents, sizes.vae
    wanted = (vae.latent_channels, vae.downscale, vae.scaling_factor)
    if (made.latent_channels, made.downscale, made.scaling_factor) != wanted:
        raise TrainingError(
            f"{folder} was encoded by another VAE: {made.latent_channels} channels, 1/{made.downscale} of the "
            f"picture's side, scaling factor {made.scaling_factor:g}; this network's VAE has {wanted[0]} channels, "
            f"1/{wanted[1]} and {wanted[2]:g}"
        )
    compared = settings.objective != "diffusion" or settings.pixels is not None
    if compared and settings.vae is not None:
        ours = _vae(settings, sizes, lambda text: None)[1].sha256
        if ours != made.vae_sha256:
            raise other_vae(str(folder), made.vae_sha256, "vae", ours)
    if settings.objective != "diffusion":
        check_known_vaes(settings, str(folder), made.vae_sha256)


def joined(data: DataSettings, size: int) -> Source:
    """Combines the picture sources of a run into one."""
    parts = [(open_source(part.source, data.scene_size or size), part.times) for part in data.pictures]
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    indexed: list[tuple[IndexedSource, int]] = []
    for (source, times), part in zip(parts, data.pictures, strict=True):
        if not isinstance(source, IndexedSource):
            raise TrainingError(
                f"{part.source}: tars are read in order and cannot be joined with others; give them alone"
            )
        indexed.append((source, times))
    return JoinedSource(indexed)


def device_of(network: torch.nn.Module) -> torch.device:
    """Device of a network's parameters."""
    return next(network.parameters()).device
