"""Blending a generated square into the picture (step 8 of the pipeline)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from moebius_runtime.images import blend as blending
from moebius_runtime.images.masks import BoolArray
from moebius_runtime.images.pictures import Picture
from moebius_runtime.regions import network_input
from moebius_runtime.regions.crop import window
from moebius_runtime.regions.resampling import from_network
from moebius_runtime.regions.squares import Square
from moebius_runtime.settings.modes import Settings

_LANCZOS = 3  # pixels on both sides that the resampling to the picture reads, more where it shrinks


def pasted_box(
    square: Square,
    shape: tuple[int, int],
    unknown: BoolArray,
    size: int,
    settings: Settings,
    *,
    compensate_colour: bool,
) -> tuple[slice, slice]:
    """Rows and columns of a square at the network's size that `paste` reads.

    Args:
        square: the square.
        shape: height and width of the picture.
        unknown: bool [H, W], the pixels that no square has filled yet.
        size: S, the network's side in pixels.
        settings: how to blend.
        compensate_colour: whether `paste` will.
    """
    view, area = window(square.crop, shape), square.own(unknown)
    scale = square.crop.side / size
    used = blending.weights_of(area, settings.blend, scale, original=settings.mode.original) > 0
    reach = math.ceil(_LANCZOS * max(1.0, 1 / scale)) + 1
    parts = []
    for axis, (part, corner) in enumerate(zip(view, (square.crop.top, square.crop.left), strict=True)):
        lines = np.flatnonzero(used.any(axis=1 - axis))
        first, last = int(lines[0]), int(lines[-1]) + 1
        if compensate_colour:  # it compares the colours around the mask's bounding box
            own = np.flatnonzero(area.any(axis=1 - axis))
            ring = blending.ring_width(scale)
            first, last = min(first, int(own[0]) - ring), max(last, int(own[-1]) + 1 + ring)
        start = part.start - corner
        low = math.floor((first + start) / scale) - reach
        high = math.ceil((last + start) / scale) + reach
        parts.append(slice(max(0, low), min(size, high)))
    return parts[0], parts[1]


def paste(
    generated: npt.NDArray[np.uint8],
    square: Square,
    picture: Picture,
    unknown: BoolArray,
    settings: Settings,
    *,
    compensate_colour: bool,
) -> None:
    """Blends the part of the mask that a square owns into the picture, and marks it as known. Both change in place.

    Args:
        generated: uint8 [S, S, 3], at the network's size S.
        square: the square that it fills.
        picture: the picture, whose pixels are overwritten.
        unknown: bool [H, W], the pixels that no square has filled yet.
        settings: how to blend.
        compensate_colour: shift the filling towards the colours around it.
    """
    original = settings.mode.original
    view = window(square.crop, picture.shape)
    part, area = picture.part(view), square.own(unknown)
    scale = square.crop.side / len(generated)
    filling = part.native_from_rgb(from_network(generated, square.crop, picture.shape))
    if compensate_colour:
        unseen = unknown[view] if original else network_input.unknown_pixels(picture, unknown, view)
        filling = blending.compensate_colour(filling, part.pixels, area, unseen, blending.ring_width(scale))
    weights = blending.weights_of(area, settings.blend, scale, original=original)
    hidden = None if original else network_input.invisible(picture, view)
    if hidden is not None:
        weights = np.where(hidden & ~area, np.uint8(0), weights)  # invisible pixels stay bit-exact
    picture.pixels[view] = blending.blend(part.pixels, filling, weights)
    unknown[view] &= ~area
