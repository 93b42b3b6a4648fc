"""Moebius, the 0.22B latent-diffusion inpainting network, in plain PyTorch.

PyTorch is imported with the first name that needs it: `moebius.errors` serves commands that run where there is none.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moebius._moved import MOVED
from moebius_runtime.moved import keep_old_paths

if TYPE_CHECKING:
    from moebius.network.config import PRESETS, Preset, StudentConfig, TeacherConfig, VaeConfig, preset
    from moebius.network.student import Moebius
    from moebius.network.teacher import Teacher
    from moebius.network.vae import VaeDecoder, VaeEncoder, build_vae

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
    "moebius.network.config": ("PRESETS", "Preset", "StudentConfig", "TeacherConfig", "VaeConfig", "preset"),
    "moebius.network.student": ("Moebius",),
    "moebius.network.teacher": ("Teacher",),
    "moebius.network.vae": ("VaeDecoder", "VaeEncoder", "build_vae"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


keep_old_paths(__name__, MOVED)
