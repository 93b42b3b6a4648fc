"""The pixel loss: errors of the decoded picture inside the masked region.

The other losses measure latents. The same error of latents is small or large in the picture, depending on what the
VAE's decoder makes of it, and only the picture is seen. So the clean latents that a prediction implies are decoded in a
small square, and compared with the decoded true latents there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.errors import TrainingError

SCALES = 3
"""Sizes at which differences between adjacent pixels are compared: full, half and quarter."""


@dataclass(frozen=True)
class PixelOptions:
    """Options of the pixel loss.

    Attributes:
        weight: multiplier of the loss. It is added after the other losses are balanced.
        crop: side of the decoded square in latents. Its pixels number (8 crop)² with an 8-fold VAE.
        margin: latents at each side of the square that are decoded but not compared, because the decoder lacks what
            lies beyond; none at the edge of the picture, where nothing lies beyond.
        gradient: multiplier of the differences between adjacent pixels against the pixels themselves.
        log: with l0 above 0, the loss l of a sample counts log(1 + l / l0). A relative improvement then counts alike in
            easy and hard samples, as in a mean of PSNR. None counts l itself, which hard samples dominate.
        most: samples at later timesteps are left out: there one prediction is a mean of many pictures.

    Raises:
        TrainingError: a number is out of its range.
    """

    weight: float = 1.0
    crop: int = 16
    margin: int = 2
    gradient: float = 1.0
    log: float | None = None
    most: int = 300

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise TrainingError(f"the pixel loss's weight is {self.weight}; expected a number above 0, or no `pixels`")
        if not (math.isfinite(self.gradient) and self.gradient >= 0):
            raise TrainingError(f"the pixel loss's gradient is {self.gradient}; expected 0 (off) or a number above 0")
        if self.log is not None and not (math.isfinite(self.log) and self.log > 0):
            raise TrainingError(f"the pixel loss's log is {self.log}; expected a number above 0 (usual: 0.02), or none")
        if self.margin < 0 or self.crop <= 2 * self.margin:
            raise TrainingError(
                f"the pixel loss's crop is {self.crop} with a margin of {self.margin}; expected a margin of 0 or more, "
                f"and a crop above twice the margin"
            )
        if not 0 <= self.most <= 999:
            raise TrainingError(f"the pixel loss's last timestep (`most`) is {self.most}; expected 0 to 999")


def inner_region(crop: int, margin: int, top: int, left: int, side: int) -> Tensor:
    """What is compared in a square of latents: 1 inside of its margin, float32 [1, 1, crop, crop].

    A side of the square that lies on the edge of the picture has no margin.

    Args:
        crop: side of the square.
        margin: in latents.
        top, left: place of the square in the picture's latents.
        side: of the picture's latents.
    """
    region = torch.zeros(1, 1, crop, crop)
    rows, columns = (slice(margin if at > 0 else 0, crop - margin if at + crop < side else crop) for at in (top, left))
    region[:, :, rows, columns] = 1
    return region


def pixel_loss(decoded: Tensor, wanted: Tensor, region: Tensor, gradient: float = 1.0) -> Tensor:
    """Absolute errors of pixels in a region, and of the differences between adjacent pixels, of each sample.

    The picture outside of the region counts as true, as after pasting. So the difference between a pixel of the
    region and one beside it is compared, too, which penalizes a visible border. With the error e = decoded - wanted in
    the region and 0 elsewhere, and n pixels in the region:

        sum |e| / 3n + gradient * mean over scales s of (sum |dx e_s| + sum |dy e_s|) / (2 * 3n / 4^s)

    where e_s is e averaged over blocks of 2^s pixels, s = 0, 1, 2.

    Args:
        decoded: pictures in [-1, 1], [B, 3, H, W], with their graph; sides divisible by 4.
        wanted: of the same shape; detached.
        region: 1 where pixels count, [B, 1, H, W].
        gradient: multiplier of the second term.

    Returns:
        [B], float32 at least; 0 for a sample without a region.

    Raises:
        TrainingError: the shapes differ.
    """
    if decoded.shape != wanted.shape or region.shape != (decoded.shape[0], 1, *decoded.shape[2:]):
        raise TrainingError(
            f"decoded pictures {list(decoded.shape)}, true ones {list(wanted.shape)} and a region "
            f"{list(region.shape)}; expected equal shapes, and one channel in the region"
        )
    dtype = torch.promote_types(decoded.dtype, torch.float32)
    region = region.to(dtype)
    error = (decoded.to(dtype) - wanted.detach().to(dtype)) * region  # [B, 3, H, W]
    count = region.sum(dim=(1, 2, 3)).clamp(min=1) * error.shape[1]  # [B]
    total = error.abs().sum(dim=(1, 2, 3)) / count
    if not gradient:
        return total
    terms = []
    for scale in range(SCALES):
        if scale:
            error = F.avg_pool2d(error, 2)
        steps = error.diff(dim=2).abs().sum(dim=(1, 2, 3)) + error.diff(dim=3).abs().sum(dim=(1, 2, 3))
        terms.append(steps / (2 * count / 4**scale))
    return total + gradient * torch.stack(terms).mean(dim=0)
