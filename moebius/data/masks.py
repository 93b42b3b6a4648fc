"""Random training masks of brush strokes and boxes; True (white) is the masked region. Needs NumPy and Pillow only.

The masks follow LaMa: Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions" (WACV 2022):
polylines or boxes over at most half of the picture. `moebius_bench.paper.mask_sets` draws its test sets with the same
function. `painted_mask` draws what people paint with a round brush. Settings are for 512 pixels; lengths scale with the
picture.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
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
_LEAST_SIDE = 32
_PAINT_STEP = 6.0  # pixels between two points of a painted curve, at 512 pixels
_BLOB_POINTS = 48


@dataclass(frozen=True)
class StrokeSettings:
    """Bounds at 512 pixels: polylines (number, width, length of a segment) and boxes (number, side, margin)."""

    lines: tuple[int, int]
    width: int
    length: int
    boxes: tuple[int, int] = (0, 0)
    box_side: tuple[int, int] = (0, 0)
    margin: int = 0


def stroke_mask(rng: Rng, size: int, settings: StrokeSettings, side: int = REFERENCE_SIDE) -> Mask:
    """Draws one mask, bool [size, size]: polylines, or boxes with probability 3/13 if the settings have boxes.

    `side` is the side in pixels of the picture that the lengths are for.
    """
    scale = size / side
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


def painted_mask(rng: Rng, size: int, settings: MaskSettings) -> Mask:
    """Draws one mask, bool [size, size], as a person paints it: one to `strokes` curves, scribbles or filled blobs.

    A curve is a freehand stroke whose direction drifts. A scribble runs back and forth over an ellipse, as people
    cover an object. A blob is the filled outline of an object: an ellipse whose radius varies with the angle.
    """
    scale = size / settings.side
    picture = Image.new("1", (size, size))
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(1, settings.strokes + 1))):
        centre = float(rng.uniform(0.1, 0.9)) * size, float(rng.uniform(0.1, 0.9)) * size
        diameter = float(rng.uniform(*settings.box_side)) * scale
        kind = rng.random()
        if kind < 0.4:
            length = float(rng.uniform(10, settings.length)) * scale
            brush(draw, _curve(rng, centre, length, _PAINT_STEP * scale), round(_brush_width(rng, settings) * scale))
        elif kind < 0.65:
            width = max(float(rng.uniform(0.15, 0.4)) * diameter, 1.0)
            brush(draw, _scribble(rng, centre, diameter, width), round(width))
        else:
            draw.polygon(_blob(rng, centre, diameter), fill=1)
    return np.asarray(picture)


def _brush_width(rng: Rng, settings: MaskSettings) -> float:
    """Width in pixels of a stroke, at `side`: thin ones are as frequent as thick ones (uniform in its logarithm)."""
    return math.exp(float(rng.uniform(math.log(6), math.log(max(settings.width, 7)))))


def _curve(rng: Rng, start: Point, length: float, step: float) -> list[Point]:
    """Points of a curve of `length` pixels from `start`: its direction turns at a rate that drifts."""
    angle, rate = float(rng.uniform(0, 2 * math.pi)), 0.0
    points = [start]
    for _ in range(max(int(length / max(step, 1.0)), 1)):
        rate = 0.85 * rate + float(rng.normal(0, 0.08))
        angle += rate
        x, y = points[-1]
        points.append((x + max(step, 1.0) * math.cos(angle), y + max(step, 1.0) * math.sin(angle)))
    return points


def _scribble(rng: Rng, centre: Point, diameter: float, width: float) -> list[Point]:
    """Turning points of a stroke `width` pixels wide that runs back and forth over an ellipse of `diameter` pixels."""
    across = diameter * float(rng.uniform(0.4, 1.0))
    turn = float(rng.uniform(0, math.pi))
    rows = max(round(across / (0.8 * width)), 2)
    points = []
    for row in range(rows):
        height = (row + 0.5) / rows * 2 - 1  # -1 to 1 over the ellipse
        reach = math.sqrt(1 - height * height) * diameter / 2 * float(rng.uniform(0.8, 1.1))
        x, y = (reach if row % 2 else -reach), height * across / 2
        points.append(
            (
                centre[0] + x * math.cos(turn) - y * math.sin(turn),
                centre[1] + x * math.sin(turn) + y * math.cos(turn),
            )
        )
    return points


def _blob(rng: Rng, centre: Point, diameter: float) -> list[Point]:
    """Outline of an ellipse of `diameter` pixels whose radius varies with the angle by up to about a third."""
    across, turn = float(rng.uniform(0.35, 1.0)), float(rng.uniform(0, math.pi))
    waves = [(order, float(rng.normal(0, 0.25 / order)), float(rng.uniform(0, 2 * math.pi))) for order in (2, 3, 4, 5)]
    points = []
    for index in range(_BLOB_POINTS):
        angle = 2 * math.pi * index / _BLOB_POINTS
        radius = (
            diameter / 2 * max(1 + sum(size * math.cos(order * angle + phase) for order, size, phase in waves), 0.2)
        )
        x, y = radius * math.cos(angle), radius * across * math.sin(angle)
        points.append(
            (
                centre[0] + x * math.cos(turn) - y * math.sin(turn),
                centre[1] + x * math.sin(turn) + y * math.cos(turn),
            )
        )
    return points


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
        painted: share of masks that `painted_mask` draws, in [0, 1]. Its brush is up to `width` wide, its curves are
            up to `length` long, and its blobs and scribbles have the diameters `box_side`.
        side: side in pixels of the picture that the lengths are for. A crop of 256 pixels from a picture of 512 has
            `side=256`, so that its masks are as large as those of the whole picture.
    """

    strokes: int = 5
    width: int = 250
    length: int = 459
    boxes: int = 4
    box_side: tuple[int, int] = (30, 300)
    most: float = 0.5
    painted: float = 0.0
    side: int = REFERENCE_SIDE

    def __post_init__(self) -> None:
        low, high = self.box_side
        if self.strokes < 1 or self.width < 6 or self.length < 11 or self.boxes < 0:
            raise DataError(
                f"masks of strokes={self.strokes}, width={self.width}, length={self.length}, boxes={self.boxes}: "
                "expected at least 1, 6, 11 and 0"
            )
        if self.side < _LEAST_SIDE:
            raise DataError(f"masks of side={self.side}: expected {_LEAST_SIDE} pixels or more")
        if not 1 <= low <= high <= self.side - 2 * _MARGIN:
            raise DataError(
                f"masks of box_side={low}, {high}: expected 1 <= least <= most <= {self.side - 2 * _MARGIN}"
            )
        if not 0 < self.most <= 1:
            raise DataError(f"masks of most={self.most}: expected a share above 0 and up to 1")
        if not 0 <= self.painted <= 1:
            raise DataError(f"masks of painted={self.painted}: expected a share from 0 to 1")

    def drawing(self) -> str:
        """Describes the settings for a fingerprint: those of version 0.1, and later ones that are not defaults."""
        new = {"painted": 0.0, "side": REFERENCE_SIDE}
        return repr(sorted((name, value) for name, value in asdict(self).items() if new.get(name) != value))


HOLES = MappingProxyType(
    {
        "training": MaskSettings(),  # the recipe's
        "small": MaskSettings(strokes=2, width=80, length=160, boxes=2, box_side=(32, 128), most=0.15),
        "painted": MaskSettings(strokes=2, width=80, length=160, boxes=2, box_side=(32, 128), most=0.15, painted=0.7),
    }
)
"""Named settings. `small`: masked regions that a small network can learn to fill; `painted`: mostly painted ones."""


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
        painted = settings.painted > 0 and rng.random() < settings.painted
        mask = painted_mask(rng, size, settings) if painted else stroke_mask(rng, size, bounds, settings.side)
        if 0 < mask.mean() <= settings.most:
            return mask
    raise DataError(
        f"no mask of {size} pixels covers at most {settings.most} of the picture; allow more, or thinner strokes"
    )
