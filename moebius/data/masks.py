"""Random training masks of brush strokes and boxes; True (white) is the masked region. Needs NumPy and Pillow only.

The masks follow LaMa: Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions" (WACV 2022):
polylines or boxes over at most half of the picture. `moebius_bench.paper.mask_sets` draws its test sets with the same
function. Settings are for 512 pixels; lengths scale with the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from moebius.errors import DataError

Mask = npt.NDArray[np.bool_]
Rng = np.random.Generator
Point = tuple[float, float]

REFERENCE_SIDE = 512  # pixels that the settings are for
_MARGIN = 10  # pixels between a box and the picture's edge, at 512 pixels
_BOX_SHARE = 0.3 / 1.3  # boxes three times in thirteen
_TRIES = 1000


@dataclass(frozen=True)
class StrokeSettings:
    """Bounds at 512 pixels: polylines (number, width, length of a segment) and boxes (number, side, margin)."""

    lines: tuple[int, int]
    width: int
    length: int
    boxes: tuple[int, int] = (0, 0)
    box_side: tuple[int, int] = (0, 0)
    margin: int = 0


def stroke_mask(rng: Rng, size: int, settings: StrokeSettings) -> Mask:
    """Draws one mask, bool [size, size]: polylines, or boxes with probability 3/13 if the settings have boxes."""
    scale = size / REFERENCE_SIDE
    picture = Image.new("1", (size, size))
    draw = ImageDraw.Draw(picture)
    if settings.boxes[1] and rng.random() < _BOX_SHARE:
        margin = round(settings.margin * scale)
        low, high = (round(side * scale) for side in settings.box_side)
        for _ in range(rng.integers(settings.boxes[0], settings.boxes[1] + 1)):
            width, height = (int(side) for side in rng.integers(low, high + 1, size=2))
            x = int(rng.integers(margin, size - margin - width + 1))
            y = int(rng.integers(margin, size - margin - height + 1))
            draw.rectangle((x, y, x + width - 1, y + height - 1), fill=1)
        return np.asarray(picture)
    for index in range(int(rng.integers(settings.lines[0], settings.lines[1] + 2))):
        point: Point = (float(rng.integers(size)), float(rng.integers(size)))
        for _ in range(rng.integers(1, 6)):
            angle = (0.01 + float(rng.integers(4))) * (-1 if index % 2 == 0 else 1)
            length = (10 + float(rng.integers(settings.length))) * scale
            end = (
                float(np.clip(point[0] + length * math.sin(angle), 0, size)),
                float(np.clip(point[1] + length * math.cos(angle), 0, size)),
            )
            thickness = (5 + float(rng.integers(settings.width))) * scale
            brush(draw, [point, end], round(thickness) + 1)  # OpenCV's lines, of the original, are that wide
            point = end
    return np.asarray(picture)


def brush(draw: ImageDraw.ImageDraw, points: list[Point], width: int) -> None:
    """A polyline with round ends and joints, `width` pixels wide."""
    width = max(width, 1)
    draw.line(points, fill=1, width=width)
    radius = width / 2
    for x, y in points:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=1)


@dataclass(frozen=True)
class MaskSettings:
    """Bounds of training masks. The defaults are the recipe's; a small network needs smaller masked regions.

    Attributes:
        strokes: most polylines in a mask, 1 or more.
        width: most pixels of a stroke's width, at 512 pixels, 6 or more.
        length: most pixels of a segment, at 512 pixels, 11 or more.
        boxes: most boxes in a mask; 0 for none.
        box_side: least and most pixels of a box's side, at 512 pixels.
        most: greatest share of the picture that may be masked, in (0, 1].
    """

    strokes: int = 5
    width: int = 250
    length: int = 459
    boxes: int = 4
    box_side: tuple[int, int] = (30, 300)
    most: float = 0.5

    def __post_init__(self) -> None:
        low, high = self.box_side
        if self.strokes < 1 or self.width < 6 or self.length < 11 or self.boxes < 0:
            raise DataError(
                f"masks of strokes={self.strokes}, width={self.width}, length={self.length}, boxes={self.boxes}: "
                "expected at least 1, 6, 11 and 0"
            )
        if not 1 <= low <= high <= REFERENCE_SIDE - 2 * _MARGIN:
            raise DataError(f"masks of box_side={low}, {high}: expected 1 <= least <= most <= 492")
        if not 0 < self.most <= 1:
            raise DataError(f"masks of most={self.most}: expected a share above 0 and up to 1")


HOLES = MappingProxyType(
    {
        "training": MaskSettings(),  # the recipe's
        "small": MaskSettings(strokes=2, width=80, length=160, boxes=2, box_side=(32, 128), most=0.15),
    }
)
"""Named settings. `small`: masked regions that a small network can learn to fill."""


def training_mask(rng: Rng, size: int, settings: MaskSettings | None = None) -> Mask:
    """Draws one mask, bool [size, size], neither empty nor larger than the settings allow.

    Raises:
        DataError: a thousand draws were all too large (`most` is too small for strokes and boxes of that size).
    """
    settings = settings or MaskSettings()
    bounds = StrokeSettings(  # `stroke_mask` draws up to one polyline more, and its integers end before the bound
        lines=(1, settings.strokes - 1),
        width=settings.width - 5,
        length=settings.length - 9,
        boxes=(1, settings.boxes) if settings.boxes else (0, 0),
        box_side=settings.box_side,
        margin=_MARGIN,
    )
    for _ in range(_TRIES):
        mask = stroke_mask(rng, size, bounds)
        if 0 < mask.mean() <= settings.most:
            return mask
    raise DataError(
        f"no mask of {size} pixels covers at most {settings.most} of the picture; allow more, or thinner strokes"
    )
