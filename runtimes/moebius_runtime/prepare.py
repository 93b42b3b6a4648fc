"""What the network sees of a square: known pixels at the network's size, the mask of the unknown ones, the start."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from moebius_runtime import regions
from moebius_runtime.errors import InputError
from moebius_runtime.mask_notes import mask_notes
from moebius_runtime.masks import BoolArray, dilated, grown_mask
from moebius_runtime.modes import Settings
from moebius_runtime.pictures import Picture
from moebius_runtime.schedule import Latents
from moebius_runtime.smooth_fill import fill_cells, fill_pixels

Window = tuple[slice, slice]


class Seen(NamedTuple):
    """A square at the network's size S.

    Attributes:
        image: float32 [1, 3, S, S] in [-1, 1].
        hole: bool [S, S], True where the network fills.
    """

    image: Latents
    hole: BoolArray


def fillable(picture: Picture, mask: BoolArray, settings: Settings) -> tuple[BoolArray, list[str]]:
    """The pixels to fill, bool [H, W], grown as the settings say, and notes on the mask.

    Raises:
        InputError: the mask is not a bool array of the picture's size, or it marks nothing, everything, or everything
            that is visible.
    """
    if not isinstance(picture, Picture):
        raise InputError(
            f"the picture is of type {type(picture).__name__}; expected a moebius_runtime.Picture, as load_picture "
            "and picture_from_image make it"
        )
    if not isinstance(mask, np.ndarray):
        raise InputError(f"the mask is of type {type(mask).__name__}; expected a NumPy array, bool [H, W]")
    if mask.dtype != np.bool_:
        raise InputError(f"the mask holds {mask.dtype}; expected bool, True where to fill")
    if mask.shape != picture.shape:
        sizes = "x".join(str(side) for side in mask.shape[::-1])
        raise InputError(f"the mask is {sizes}, the picture {picture.shape[1]}x{picture.shape[0]}; make them equal")
    if not mask.any():
        raise InputError("the mask marks nothing to fill; white pixels are filled")
    if mask.all():
        raise InputError("the mask marks every pixel, which leaves nothing to fill from; white pixels are filled")
    grown = grown_mask(mask, settings.mask_dilate)
    notes = mask_notes(picture, mask, grown)
    if picture.alpha is not None and not settings.mode.original:
        visible = picture.alpha > 0
        if not (visible & ~grown).any():
            raise InputError(
                "the mask marks every visible pixel of the picture, which leaves nothing to fill from; the rest is "
                "transparent. Mark less of it, or give the picture without its alpha channel"
            )
    return grown, notes


def invisible(picture: Picture, window: Window) -> BoolArray | None:
    """The fully transparent pixels of a window, bool [h, w]; None where the picture has no alpha."""
    return None if picture.alpha is None else picture.alpha[window] == 0


def unknown_pixels(picture: Picture, mask: BoolArray, window: Window) -> BoolArray:
    """The masked and the invisible pixels of a window, bool [h, w]: colours that nothing may depend on."""
    hidden = invisible(picture, window)
    return mask[window] if hidden is None else mask[window] | hidden


def seen_by_network(picture: Picture, unknown: BoolArray, crop: regions.Crop, size: int) -> Seen:
    """The square of a crop, independent of what its unknown pixels hold.

    Resampling mixes adjacent pixels. So the unknown ones get smooth values of the known ones first, at the picture's
    own resolution.

    Args:
        picture: the whole picture.
        unknown: bool [h, w], of the crop's window.
        crop: the square.
        size: S, the network's side in pixels.
    """
    rgb = picture.part(regions.window(crop, picture.shape)).to_rgb()
    return _seen(fill_pixels(rgb, unknown), unknown, crop, picture.shape, size)


def seen_in_full(picture: Picture, mask: BoolArray, crop: regions.Crop, size: int) -> Seen:
    """As `seen_by_network`, but resampled with all of its pixels, masked and invisible ones too: the original's way.

    `mask` bool [h, w] is the mask of the crop's window.
    """
    return _seen(picture.part(regions.window(crop, picture.shape)).to_rgb(), mask, crop, picture.shape, size)


def _seen(
    rgb: npt.NDArray[np.uint8], unknown: BoolArray, crop: regions.Crop, shape: tuple[int, int], size: int
) -> Seen:
    square = regions.to_network(rgb, crop, shape, size)
    hole = regions.mask_to_network(unknown, crop, shape, size)
    image = np.ascontiguousarray((square.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None])  # [1, 3, S, S]
    return Seen(image, hole)


def smooth_cells(masked_latents: Latents, hole: BoolArray) -> Latents:
    """Latents without an object: those of the masked picture, with smooth values in the cells at and beside the mask.

    The cells beside it saw the grey of the masked pixels. They stay as they are only where nothing else is known.

    Args:
        masked_latents: float32 [1, C, s, s].
        hole: bool [S, S], S a multiple of s.

    Returns:
        float32 [1, C, s, s].
    """
    cells = masked_latents.shape[2]
    block = len(hole) // cells
    blocks = hole.reshape(cells, block, cells, block)  # [S, S] -> [s, block, s, block]
    touched: BoolArray = np.asarray(blocks.any(axis=(1, 3)))  # [s, s]
    near = dilated(touched, 1)
    return fill_cells(masked_latents, touched if near.all() else near)
