"""Runs every variant on every picture; time, and distances inside the mask to the truth and to two variants."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from moebius_bench.paper.inpainting import Case, mean_colour
from moebius_bench.tradeoff.variants import BASELINE, Variant
from moebius_runtime.images.metrics import psnr, ssim
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline

Pixels = npt.NDArray[np.uint8]
Perceptual = Callable[[Pixels, Pixels, npt.NDArray[np.bool_]], float]
STAGES = ("preprocess", "encode", "step", "decode", "paste")
CEILING = 99.0
"""In place of infinity, the PSNR of equal pictures in dB."""


class Distance(BaseModel):
    """PSNR in dB (99 for equal pictures), SSIM, and the perceptual distance or None, inside the mask."""

    model_config = ConfigDict(extra="forbid")

    psnr: float
    ssim: float
    perceptual: float | None


class Row(BaseModel):
    """A variant: medians of seconds over the pictures and means of distances.

    `seconds` leaves out the loading of graphs; `stages` are its parts. `front` is whether no other variant is both
    faster and nearer to the truth.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    seconds: float
    stages: dict[str, float]
    truth: Distance
    best: Distance
    reference: Distance | None
    brightness: float
    front: bool = False


class Tradeoff(BaseModel):
    """The whole measurement."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    bundle: str
    runtime: dict[str, str]
    machine: dict[str, str]
    data: dict[str, str]
    pictures: int
    quality: str
    rows: list[Row]
    notes: list[str]


def measure(
    pipeline: InpaintPipeline,
    cases: Sequence[Case],
    variants: Sequence[Variant],
    perceptual: Perceptual | None,
    progress: Callable[[str, str], None] = lambda case, variant: None,
) -> tuple[list[Row], dict[str, list[Pixels]]]:
    """Rows in the order of the variants, and the pictures of each.

    All variants run on a picture before the next picture: a slow moment of the machine meets all of them. Each variant
    runs one step unmeasured before, which loads its graphs. What lies under the mask is the mean colour of the rest,
    since mode `reference` starts from the picture. Pixels outside of the mask are the true ones in every comparison.

    Args:
        pipeline: with memory `fast`.
        cases: pictures with masks.
        variants: one of them is `best`.
        perceptual: distance of two pictures inside a mask; None leaves it out.
        progress: called before each run.
    """
    timed: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in variants}
    made: dict[str, list[Pixels]] = {variant.name: [] for variant in variants}
    for index, case in enumerate(cases):
        given = Picture(mean_colour(case.picture, case.mask), "RGB")
        for variant in variants:
            progress(case.name, variant.name)
            if index == 0:
                pipeline.inpaint(given, case.mask, replace(variant.options, steps=1, strength=1.0))
            result = pipeline.inpaint(given, case.mask, variant.options)
            timed[variant.name].append({stage: sum(result.seconds.get(stage, [])) for stage in STAGES})
            filled = result.picture.to_rgb()
            made[variant.name].append(np.where(case.mask[:, :, None], filled, case.picture))
    rows = []
    for variant in variants:
        own = made[variant.name]

        def to(others: Sequence[Pixels], own: Sequence[Pixels] = own) -> Distance:
            return distance(others, own, cases, perceptual)

        shift = [float((a[c.mask].astype(float) - c.picture[c.mask]).mean()) for a, c in zip(own, cases, strict=True)]
        rows.append(
            Row(
                name=variant.name,
                seconds=statistics.median(sum(stages.values()) for stages in timed[variant.name]),
                stages={stage: statistics.median(t[stage] for t in timed[variant.name]) for stage in STAGES},
                truth=to([case.picture for case in cases]),
                best=to(made[BASELINE]),
                reference=to(made["reference"]) if "reference" in made else None,
                brightness=statistics.fmean(shift),
            )
        )
    return marked(rows), made


def distance(
    first: Sequence[Pixels], second: Sequence[Pixels], cases: Sequence[Case], perceptual: Perceptual | None
) -> Distance:
    """Means over the pictures."""
    triples = [(one, other, case.mask) for one, other, case in zip(first, second, cases, strict=True)]
    ratios = [psnr(*triple) for triple in triples]
    return Distance(
        psnr=statistics.fmean(CEILING if math.isinf(value) else value for value in ratios),
        ssim=statistics.fmean(ssim(*triple) for triple in triples),
        perceptual=None if perceptual is None else statistics.fmean(perceptual(*triple) for triple in triples),
    )


def error_of(row: Row) -> float:
    """What the front minimises beside the time: the perceptual distance to the truth, or the negative PSNR."""
    return -row.truth.psnr if row.truth.perceptual is None else row.truth.perceptual


def marked(rows: Sequence[Row]) -> list[Row]:
    """The rows with those on the Pareto front marked: no other is at most as slow and as far, and better in one."""

    def beaten(row: Row) -> bool:
        mine = (row.seconds, error_of(row))
        others = ((other.seconds, error_of(other)) for other in rows if other is not row)
        return any(s <= mine[0] and e <= mine[1] and (s, e) != mine for s, e in others)

    return [row.model_copy(update={"front": not beaten(row)}) for row in rows]
