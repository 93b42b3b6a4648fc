"""Moebius, the 0.22B latent-diffusion inpainting network, in plain PyTorch."""

from moebius.config import PRESETS, Preset, StudentConfig, VaeConfig, preset
from moebius.student import Moebius
from moebius.vae import VaeDecoder, VaeEncoder, build_vae

__all__ = [
    "PRESETS",
    "Moebius",
    "Preset",
    "StudentConfig",
    "VaeConfig",
    "VaeDecoder",
    "VaeEncoder",
    "build_vae",
    "preset",
]
