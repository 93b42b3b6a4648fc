"""The pixel loss of a batch: draws squares, decodes them, and compares them with the decoded truth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.data.encoded import LatentBatch
from moebius.distill.loop.context import TrainContext
from moebius.distill.loop.crops import squares_on_mask
from moebius.distill.objectives.pixels import PixelOptions, inner_region, pixel_loss
from moebius.network.vae import VaeDecoder


class DecodedLoss:
    """`moebius.distill.objectives.pixels` with a frozen decoder.

    Args:
        decoder: of the VAE that encoded the latents; it is not trained.
        options: see `PixelOptions`.

    Attributes:
        weight: multiplier of the loss, which the result does not have yet.
    """

    def __init__(self, decoder: VaeDecoder, options: PixelOptions) -> None:
        self.decoder, self._options = decoder.requires_grad_(False).eval(), options
        self.weight = options.weight

    def __call__(self, clean: Tensor, sample: LatentBatch, timesteps: Tensor, context: TrainContext) -> Tensor:
        """The mean of the pixel loss over the samples of a batch; a scalar, float32 at least.

        Samples at timesteps above `most` count as 0. Decodes in the dtype of `clean` outside of autocast.

        Args:
            clean: clean latents that the prediction implies, [B, 4, S, S], with their graph.
            sample: the true latents and the mask, on the device of `clean`.
            timesteps: int64 [B].
            context: its generator draws three numbers a sample, of the global batch, at every timestep.
        """
        options, count = self._options, len(timesteps)
        places = context.own(torch.rand(count * context.world, 3, generator=context.generator))
        squares = squares_on_mask(sample.mask, options.crop, places, options.margin)
        chosen = [index for index in range(count) if int(timesteps[index]) <= options.most]
        if not chosen:
            return clean.new_zeros(())
        side, crop = sample.mask.shape[-1], options.crop
        ours, theirs, regions = [], [], []
        for index in chosen:
            top, left = squares[index]
            square = (slice(index, index + 1), slice(None), slice(top, top + crop), slice(left, left + crop))
            ours.append(clean[square])
            theirs.append(sample.latents[square])
            inner = inner_region(crop, options.margin, top, left, side).to(sample.mask)
            regions.append(sample.mask[square] * inner)
        decoded = self.decoder(torch.cat(ours))  # [b, 3, 8 crop, 8 crop]
        with torch.no_grad():
            wanted = self.decoder(torch.cat(theirs).to(clean.dtype))
        region = F.interpolate(torch.cat(regions), size=decoded.shape[2:], mode="nearest")  # [b, 1, 8 crop, 8 crop]
        values = pixel_loss(decoded, wanted, region, options.gradient)  # [b]
        if options.log is not None:
            values = torch.log1p(values / options.log)
        return values.sum() / count
