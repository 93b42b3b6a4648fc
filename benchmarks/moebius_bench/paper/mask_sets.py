"""The paper's mask sets, drawn from their published procedures: `moebius-bench masks`. White, True, is masked.

MAT: Li, Lin, Zhou, Qi, Wang and Jia, "MAT: Mask-Aware Transformer for Large Hole Image Inpainting" (CVPR 2022): brush
strokes with sharp turns and rectangles, large or small. LaMa: Suvorov et al., "Resolution-robust Large Mask Inpainting
with Fourier Convolutions" (WACV 2022): polylines or boxes, thick, medium or thin, at most half of the picture. Both are
drawn here with the settings that their authors publish for 512 pixels; lengths scale with the size. LaMa's kind of
mask also serves in training, so `moebius.data.masks` draws it. The 40-50 % set
keeps those of MAT's large masks that cover that much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from moebius.data.masks import REFERENCE_SIDE, Mask, Point, Rng, StrokeSettings, brush, stroke_mask
from moebius_runtime.errors import InputError
from moebius_runtime.files import atomic_write

_TRIES = 10_000


@dataclass(frozen=True)
class MatSettings:
    """Upper bounds, exclusive, on the number of rectangles up to half the side, up to the side, and of strokes."""

    half_boxes: int
    full_boxes: int
    strokes: int


_MAT_LARGE, _MAT_SMALL = MatSettings(5, 3, 9), MatSettings(3, 2, 4)
_LAMA_THICK = StrokeSettings((1, 5), 250, 450, (1, 4), (30, 300), 10)
_LAMA_MEDIUM = StrokeSettings((4, 10), 100, 200, (1, 5), (30, 150), 0)
_LAMA_THIN = StrokeSettings((4, 70), 20, 100)


def mat_mask(rng: Rng, size: int, settings: MatSettings) -> Mask:
    """One of MAT's masks: rectangles that may reach over the edge, and brush strokes, all together."""
    mask = np.zeros((size, size), dtype=np.bool_)
    for bound, longest in ((settings.half_boxes, size // 2), (settings.full_boxes, size)):
        for _ in range(rng.integers(bound)):
            width, height = (int(side) for side in rng.integers(longest, size=2))
            x = int(rng.integers(-(width // 2), size - width + width // 2))
            y = int(rng.integers(-(height // 2), size - height + height // 2))
            mask[max(y, 0) : y + height, max(x, 0) : x + width] = True
    strokes = Image.new("1", (size, size))
    draw = ImageDraw.Draw(strokes)
    for _ in range(rng.integers(settings.strokes)):
        _zigzag(rng, draw, size)
    flips = rng.random(2) > 0.5
    mask |= np.asarray(strokes)[:: -1 if flips[0] else 1, :: -1 if flips[1] else 1]
    return mask


def _zigzag(rng: Rng, draw: ImageDraw.ImageDraw, size: int) -> None:
    """A stroke of 4 to 17 segments whose direction turns back at each: about 72 degrees, then about -72."""
    mean = math.hypot(size, size) / 8
    angles = 2 * math.pi / 5 + np.array([-1.0, 1.0]) * rng.uniform(0, 2 * math.pi / 15, 2)
    points: list[Point] = [(float(rng.integers(size)), float(rng.integers(size)))]
    for index in range(int(rng.integers(4, 18))):
        angle = rng.uniform(*angles) * (-1 if index % 2 == 0 else 1)
        length = float(np.clip(rng.normal(mean, mean // 2), 0, 2 * mean))
        x, y = points[-1][0] + length * math.cos(angle), points[-1][1] + length * math.sin(angle)
        points.append((float(np.clip(x, 0, size)), float(np.clip(y, 0, size))))
    brush(draw, points, round(rng.uniform(12, 48) * size / REFERENCE_SIDE))


@dataclass(frozen=True)
class MaskSet:
    """How a set is drawn, and the least (exclusive) and greatest share of the picture that a mask may cover."""

    draw: Callable[[Rng, int], Mask]
    least: float = 0.0
    most: float = 1.0


SETS = {
    "mat-large": MaskSet(partial(mat_mask, settings=_MAT_LARGE), most=1 - 1e-9),
    "mat-small": MaskSet(partial(mat_mask, settings=_MAT_SMALL), most=1 - 1e-9),
    "lama-thick": MaskSet(partial(stroke_mask, settings=_LAMA_THICK), most=0.5),
    "lama-medium": MaskSet(partial(stroke_mask, settings=_LAMA_MEDIUM), most=0.5),
    "lama-thin": MaskSet(partial(stroke_mask, settings=_LAMA_THIN), most=0.5),
    "ratio-40-50": MaskSet(partial(mat_mask, settings=_MAT_LARGE), least=0.4, most=0.5),
}


def draw_mask(kind: str, index: int, size: int, seed: int) -> Mask:
    """Mask number `index` of a set, bool [size, size], the same for every number of masks drawn.

    Raises:
        InputError: there is no such set.
    """
    if kind not in SETS:
        raise InputError(f"--kind {kind}: expected one of {', '.join(SETS)}")
    chosen = SETS[kind]
    rng = np.random.default_rng([seed, index])
    for _ in range(_TRIES):
        mask = chosen.draw(rng, size)
        if chosen.least < mask.mean() <= chosen.most:
            return mask
    raise InputError(f"--kind {kind} --size {size}: no mask of its range in {_TRIES} draws; choose another size")


def draw_masks(kind: str, count: int, size: int, seed: int) -> Iterator[Mask]:
    """The first `count` masks of a set."""
    return (draw_mask(kind, index, size, seed) for index in range(count))


def write_masks(folder: Path, kind: str, count: int, size: int, seed: int) -> list[float]:
    """Writes masks as `000000.png` and on, white on black, and returns the masked share of each.

    Raises:
        InputError: no such set, or the folder is not empty.
        OutputError: the folder cannot be written.
    """
    if kind not in SETS:
        raise InputError(f"--kind {kind}: expected one of {', '.join(SETS)}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--out {folder} exists and is not an empty folder; choose a new one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {folder}: {error.strerror}; choose another --out") from error
    ratios = []
    for index, mask in enumerate(draw_masks(kind, count, size, seed)):
        with atomic_write(folder / f"{index:06d}.png") as stream:
            Image.fromarray(mask).convert("L").save(stream, format="PNG", optimize=True)
        ratios.append(float(mask.mean()))
    return ratios
