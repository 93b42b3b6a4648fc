"""Draws pairs of pictures for both branches of the network: a scene with an object, and the same scene without it.

The masked region is the object's. With the object the sample trains the branch `foreground`, without it `background`;
guidance then leads from what would be an object to what lies behind it (docs/small.md, "Fewer evaluations").

    python scripts/object_pictures.py OUT --count 400    # OUT/pictures.jsonl, for moebius-distill encode
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from moebius.data.scenes import scene

_SCENE, _FINE = 512, 4  # side of the scenes; the outline is drawn so many times as large


def outline(rng: np.random.Generator, side: int) -> Image.Image:
    """An ellipse, a rounded box or a polygon, mode L [side, side], somewhere inside."""
    large = side * _FINE
    drawn = Image.new("L", (large, large))
    draw = ImageDraw.Draw(drawn)
    half = rng.uniform(0.06, 0.2, 2) * large
    centre = rng.uniform(0.25, 0.75, 2) * large
    box = (*(centre - half), *(centre + half))
    kind = rng.integers(3)
    if kind == 0:
        draw.ellipse(box, fill=255)
    elif kind == 1:
        draw.rounded_rectangle(box, float(half.min()) * rng.uniform(0, 0.9), fill=255)
    else:
        turns = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(5, 10)))
        radii = rng.uniform(0.6, 1.0, len(turns)) * half.mean()
        corners = [
            (float(centre[0] + r * np.cos(t)), float(centre[1] + r * np.sin(t)))
            for t, r in zip(turns, radii, strict=True)
        ]
        draw.polygon(corners, fill=255)
    return drawn.rotate(float(rng.uniform(0, 180))).resize((side, side), Image.Resampling.BOX)


def main() -> None:
    """Writes the pictures, the masks and the annotation file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--count", type=int, default=400, help="number of pairs")
    parser.add_argument("--side", type=int, default=256, help="of the pictures, in pixels")
    parser.add_argument("--seed", type=int, default=760)
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    lines = []
    for index in range(given.count):
        rng = np.random.Generator(np.random.PCG64([given.seed, index]))
        top, left = rng.integers(0, _SCENE - given.side + 1, 2)
        window = np.s_[top : top + given.side, left : left + given.side]
        behind = Image.fromarray(scene(index, _SCENE, seed=given.seed)[window])
        surface = Image.fromarray(scene(index, _SCENE, seed=given.seed + 1)[window])
        cover = outline(rng, given.side)
        colour = Image.new("RGB", cover.size, tuple(int(value) for value in rng.integers(0, 256, 3)))
        surface = Image.blend(surface, colour, float(rng.uniform(0.2, 1.0)))
        mask = cover.filter(ImageFilter.MaxFilter(2 * int(rng.integers(2, 9)) + 1)).point(lambda v: 255 * (v > 0))
        name = f"{index:05d}"
        behind.save(given.out / f"{name}-behind.png")
        Image.composite(surface, behind, cover).save(given.out / f"{name}-object.png")
        mask.save(given.out / f"{name}-mask.png")
        for what, task in (("object", "foreground"), ("behind", "background")):
            lines.append({"image": f"{name}-{what}.png", "mask": f"{name}-mask.png", "task": task})
    (given.out / "pictures.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
