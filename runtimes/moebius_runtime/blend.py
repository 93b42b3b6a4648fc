"""Pasting the generated region into the picture (step 8 of the pipeline), in the picture's own numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from moebius_runtime.masks import dilated
from moebius_runtime.modes import Blend

_STRIP_PIXELS = 1 << 18
_FEATHER_RADIUS = 3.0  # pixels of the network's picture
_RING = 10  # pixels of the network's picture around the mask's bounding box
_STRENGTH = 1.1  # of the colour compensation


def feather(mask: npt.NDArray[np.bool_], radius: float = 3.0) -> npt.NDArray[np.uint8]:
    """Weights of the generated picture, uint8 [h, w], 255 = all: the mask under Pillow's Gaussian blur.

    `radius` is in pixels of the mask: the reference's 3, times the crop's scale.
    """
    return np.asarray(_as_image(mask).filter(ImageFilter.GaussianBlur(radius)))


def outward_feather(mask: npt.NDArray[np.bool_], width: int) -> npt.NDArray[np.uint8]:
    """Weights of the generated picture, uint8 [h, w]: 255 on the mask, falling to 0 over `width` pixels around it.

    The mask, grown by half of the width (in each direction, diagonally too), is blurred by a kernel that reaches as
    far: two box blurs, whose slope has no corner.
    """
    inner = width // 2
    boxes = (inner // 2, inner - inner // 2)
    weights = _as_image(dilated(mask, inner))
    for reach in boxes:
        weights = weights.filter(ImageFilter.BoxBlur(reach))
    # At the window's edge Pillow's blur repeats the last pixel, which may be outside of the grown mask.
    highest: npt.NDArray[np.uint8] = np.maximum(np.asarray(weights), hard(mask))
    return highest


def weights_of(mask: npt.NDArray[np.bool_], blend: Blend, scale: float, *, original: bool) -> npt.NDArray[np.uint8]:
    """Weights of the generated picture, uint8 [h, w], of a square of `scale` picture pixels per network pixel."""
    if blend == "hard":
        return hard(mask)
    return feather(mask, _FEATHER_RADIUS * scale) if original else outward_feather(mask, feather_width(scale))


def ring_width(scale: float) -> int:
    """Pixels of the picture that the colour compensation looks at: the original's 10 network pixels, at least 10."""
    return max(_RING, round(_RING * scale))


def feather_width(scale: float) -> int:
    """Width of the outward feather in pixels of the picture, for squares shrunk by `scale`: 8, wider where the filling
    comes from fewer pixels, at most 24."""
    return int(np.clip(round(8 * scale), 8, 24))


def hard(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint8]:
    """Weights 255 inside the mask and 0 outside, uint8 [h, w]: every unmasked pixel stays bit-exact."""
    return np.asarray(_as_image(mask))


def _as_image(mask: npt.NDArray[np.bool_]) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * np.uint8(255))


def blend(original: npt.NDArray[Any], generated: npt.NDArray[Any], weights: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """generated * m + (1 - m) * original, m = weights / 255, in float64, truncated to the original's type.

    Where a weight is 0 the original's numbers come through untouched.

    Args:
        original: uint8 or uint16 [h, w, C].
        generated: [h, w, C] in the original's range (0..255 or 0..65535), of any real type; clipped to it.
        weights: uint8 [h, w].

    Returns:
        A new array, [h, w, C] of the original's type.
    """
    if original.shape != generated.shape or original.shape[:2] != weights.shape:
        raise ValueError(f"shapes differ: {original.shape}, {generated.shape}, weights {weights.shape}")
    top = np.iinfo(original.dtype).max
    result: npt.NDArray[Any] = original.copy()
    step = max(1, _STRIP_PIXELS // original.shape[1])
    for start in range(0, len(original), step):
        rows = slice(start, start + step)
        share = weights[rows, :, None] / 255  # [n, w, 1]
        if not share.any():
            continue
        mixed = np.clip(generated[rows], 0, top) * share + (1 - share) * original[rows]
        np.copyto(result[rows], mixed.astype(original.dtype), where=share > 0)
    return result


def compensate_colour(
    generated: npt.NDArray[Any],
    original: npt.NDArray[Any],
    mask: npt.NDArray[np.bool_],
    unknown: npt.NDArray[np.bool_] | None = None,
    ring: int = _RING,
) -> npt.NDArray[np.float32]:
    """The generated picture shifted towards the colours around the hole, float32 [h, w, C], not clipped.

    The shift of each channel is 1.1 times the mean of `original - generated` over the known pixels of the
    mask's bounding box grown by `ring` pixels. `blend` clips the result.

    Args:
        generated: [h, w, C], in the original's range.
        original: uint8 or uint16 [h, w, C].
        mask: bool [h, w], True = generated.
        unknown: bool [h, w], the pixels that do not count: the mask's, and more. None: the mask's.
        ring: pixels of the picture. The original's 10 are pixels of the network's picture, as its feather's 3 are.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    shifted = generated.astype(np.float32)
    if not len(rows):
        return shifted
    box = (
        slice(max(0, rows[0] - ring), rows[-1] + 1 + ring),
        slice(max(0, columns[0] - ring), columns[-1] + 1 + ring),
    )
    known = ~(mask if unknown is None else mask | unknown)[box]
    if known.any():
        around = original[box][known].mean(axis=0, dtype=np.float64)
        shifted += np.float32(_STRENGTH) * (around - generated[box][known].mean(axis=0, dtype=np.float64)).astype(
            np.float32
        )
    return shifted
