"""A small decoder of the same latents: diffusers' `AutoencoderTiny`, as `madebyollin/taesdxl` publishes it (TAESD)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny


def build_tiny_vae() -> AutoencoderTiny:
    """An `AutoencoderTiny` of the published sizes with fresh weights, which are diffusers' defaults.

    64 channels throughout, 8 pixels per latent cell; 1.2 million parameters in the decoder.
    """
    from diffusers import AutoencoderTiny  # takes seconds to import

    return AutoencoderTiny()


class TinyDecoder(nn.Module):
    """Decodes a scaled latent to a picture, with a fraction of the full decoder's MACs and of its detail."""

    def __init__(self, vae: AutoencoderTiny) -> None:
        super().__init__()
        self.decoder = vae.decoder

    def forward(self, latent: Tensor) -> Tensor:
        """Scaled latent [B, 4, S, S] -> image [B, 3, 8S, 8S] in about [-1, 1], not clamped.

        It was trained on latents times the full autoencoder's scaling factor, so that its own factor is 1.
        """
        return self.decoder(latent)
