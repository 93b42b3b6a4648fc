"""Moebius, the 0.22B latent-diffusion inpainting network, in plain PyTorch.

PyTorch is imported with the first name that needs it: `moebius.errors` serves commands that run where there is none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moebius.config import PRESETS, Preset, StudentConfig, TeacherConfig, VaeConfig, preset
    from moebius.student import Moebius
    from moebius.teacher import Teacher
    from moebius.vae import VaeDecoder, VaeEncoder, build_vae

__all__ = [
    "PRESETS",
    "Moebius",
    "Preset",
    "StudentConfig",
    "Teacher",
    "TeacherConfig",
    "VaeConfig",
    "VaeDecoder",
    "VaeEncoder",
    "build_vae",
    "preset",
]

_HOMES = {
    "moebius.config": ("PRESETS", "Preset", "StudentConfig", "TeacherConfig", "VaeConfig", "preset"),
    "moebius.student": ("Moebius",),
    "moebius.teacher": ("Teacher",),
    "moebius.vae": ("VaeDecoder", "VaeEncoder", "build_vae"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
