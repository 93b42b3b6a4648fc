"""Runs Moebius bundles on a device, without torch."""

from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.errors import BundleError, InputError, MoebiusError, OutputError, RuntimeUnavailableError
from moebius_runtime.images.pictures import Picture, load_picture, save_picture
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline, InpaintResult

__all__ = [
    "Bundle",
    "BundleError",
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

from moebius_runtime._moved import MOVED
from moebius_runtime.moved import keep_old_paths

keep_old_paths(__name__, MOVED)
