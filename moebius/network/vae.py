"""The latent autoencoder: diffusers' `AutoencoderKL`, with this project's scaling at its edges."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from moebius.network.config import VaeConfig

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


def build_vae(config: VaeConfig) -> AutoencoderKL:
    """An `AutoencoderKL` of the given sizes with fresh weights. Its state-dict names are the released ones."""
    from diffusers import AutoencoderKL  # seconds to import: only where a VAE is really built

    return AutoencoderKL(**config.to_diffusers())


class VaeEncoder(nn.Module):
    """Picture to scaled latent, the mode of the posterior: no sampling, so that one picture has one latent."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, image: Tensor) -> Tensor:
        """Image [B, 3, 8S, 8S] in [-1, 1] -> latent [B, 4, S, S], already times the scaling factor."""
        moments = self.quant_conv(self.encoder(image))  # [B, 8, S, S]: mean and log-variance
        return moments.chunk(2, dim=1)[0] * self.scaling_factor


class VaeDecoder(nn.Module):
    """Scaled latent to picture."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv
        self.scaling_factor = float(vae.config.scaling_factor)

    def forward(self, latent: Tensor) -> Tensor:
        """Scaled latent [B, 4, S, S] -> image [B, 3, 8S, 8S] in about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latent / self.scaling_factor))
