"""Runs Moebius bundles on a device, without torch."""

from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import (
    BundleError,
    CancelledError,
    InputError,
    MoebiusError,
    OutputError,
    RuntimeUnavailableError,
)
from moebius_runtime.pictures import Picture, load_picture, save_picture
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
