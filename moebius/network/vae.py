"""The latent autoencoder: diffusers' `AutoencoderKL` with the scaling factor applied inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from moebius.network.config import VaeConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """An `AutoencoderKL` of the given sizes with fresh weights. Its state-dict names are the released ones."""
    from diffusers import AutoencoderKL  # takes seconds to import, so only when a VAE is built

    return AutoencoderKL(**config.to_diffusers())


class VaeEncoder(nn.Module):
    """Encodes a picture to the scaled mode of the posterior. Deterministic: nothing is sampled."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, 8S, 8S] in [-1, 1] -> latent [B, 4, S, S], already times the scaling factor."""
        moments = self.quant_conv(self.encoder(image))  # [B, 8, S, S]: mean and log-variance
        return moments.chunk(2, dim=1)[0] * self.scaling_factor


class VaeDecoder(nn.Module):
    """Decodes a scaled latent to a picture."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latent: Tensor) -> Tensor:
        """Scaled latent [B, 4, S, S] -> image [B, 3, 8S, 8S] in about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latent / self.scaling_factor))
