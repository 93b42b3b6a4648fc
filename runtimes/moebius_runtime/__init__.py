"""Runs Moebius bundles on a device, without torch.

A name is imported when it is first used, so that `import moebius_runtime` and the commands' `--help` load no library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moebius_runtime._moved import MOVED
from moebius_runtime.moved import keep_old_paths

if TYPE_CHECKING:
    from moebius_runtime.bundle.bundle import Bundle
    from moebius_runtime.errors import (
        BundleError,
        CancelledError,
        InputError,
        MoebiusError,
        OutputError,
        RuntimeUnavailableError,
    )
    from moebius_runtime.images.pictures import Picture, load_picture, save_picture
    from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline, InpaintResult

__all__ = [
    "Bundle",
    "BundleError",
    "CancelledError",
    "InpaintOptions",
    "InpaintPipeline",
    "InpaintResult",
    "InputError",
    "MoebiusError",
    "OutputError",
    "Picture",
    "RuntimeUnavailableError",
    "load_picture",
    "save_picture",
]

_HOMES = {
    "moebius_runtime.bundle.bundle": ("Bundle",),
    "moebius_runtime.errors": (
        "BundleError",
        "CancelledError",
        "InputError",
        "MoebiusError",
        "OutputError",
        "RuntimeUnavailableError",
    ),
    "moebius_runtime.images.pictures": ("Picture", "load_picture", "save_picture"),
    "moebius_runtime.pipeline": ("InpaintOptions", "InpaintPipeline", "InpaintResult"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


keep_old_paths(__name__, MOVED)
