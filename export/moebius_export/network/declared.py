"""What a manifest declares of a network's sizes and of the noise schedule that it was trained with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moebius_runtime.bundle.manifest import Geometry, ScheduleInfo

if TYPE_CHECKING:
    from moebius.network.config import Preset


def geometry_of(sizes: Preset) -> Geometry:
    """The sides of pictures and latents, the latents' channels and their factor."""
    return Geometry(
        image_size=sizes.student.sample_size * sizes.vae.downscale,
        latent_size=sizes.student.sample_size,
        latent_channels=sizes.vae.latent_channels,
        scaling_factor=sizes.vae.scaling_factor,
    )


def schedule_of(sizes: Preset) -> ScheduleInfo:
    """The schedule of the original's training, with the preset's prediction type."""
    return ScheduleInfo(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=sizes.prediction_type,
    )
