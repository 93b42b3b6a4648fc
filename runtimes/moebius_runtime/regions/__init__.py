"""Squares of a picture that the network fills: found from the mask, resampled, and their unknown pixels."""

from moebius_runtime.regions.crop import Crop, whole_crop, window
from moebius_runtime.regions.resampling import from_network, mask_to_network, resize_rgb, to_network
from moebius_runtime.regions.squares import Square, apart, find_crops, find_squares, whole_square

__all__ = [
    "Crop",
    "Square",
    "apart",
    "find_crops",
    "find_squares",
    "from_network",
    "mask_to_network",
    "resize_rgb",
    "to_network",
    "whole_crop",
    "whole_square",
    "window",
]
