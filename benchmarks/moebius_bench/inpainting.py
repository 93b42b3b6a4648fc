"""Filled pictures against the truth, a network's beside those of classical methods: `moebius-bench inpaint`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from moebius_runtime.errors import InputError, RuntimeUnavailableError
from moebius_runtime.metrics import psnr, ssim

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Fill = Callable[[Picture, Mask], Picture]
_MARGIN = 24  # pixels around the hole on the sheet
_TELEA_RADIUS = 5.0


class Case(NamedTuple):
    """A picture with a hole: `kind` is scenes, photographs or what its source is called."""

    name: str
    kind: str
    picture: Picture
    mask: Mask


class Method(NamedTuple):
    """A name and how it fills."""

    name: str
    fill: Fill


@dataclass(frozen=True)
class Score:
    """One picture filled by one method; PSNR in dB and SSIM inside of the hole."""

    case: str
    kind: str
    method: str
    psnr: float
    ssim: float
    seconds: float


def held_out_cases(texts: Sequence[str], size: int, holes: str, seed: int) -> list[Case]:
    """Pictures that nothing was trained on, each with a hole drawn from `seed`.

    Args:
        texts: as `moebius.data.opening.open_source` reads them; scenes and photographs give their held-out part, files
            are taken as they are.
        size: pixels of a side.
        holes: a name of `moebius.data.masks.HOLES`.
        seed: of the holes.

    Raises:
        InputError: an unknown kind of holes, or a source without pictures.
        DataError: a source that cannot be had.
    """
    from moebius.data.datasets import SampleStream
    from moebius.data.masks import HOLES
    from moebius.data.opening import open_source
    from moebius.data.pictures import PLAIN_CROP

    if holes not in HOLES:
        raise InputError(f"--holes {holes}: expected {' or '.join(HOLES)}")
    cases = []
    for text in texts:
        own = text == "photographs" or text.startswith("scenes:")
        source = open_source(text, size, held_out=own)
        with SampleStream(source, size, masks=HOLES[holes], crops=PLAIN_CROP, seed=seed, epochs=1) as stream:
            kind = text.partition(":")[0]
            cases += [Case(sample.name, kind, sample.image, sample.mask) for sample in stream]
    if not cases:
        raise InputError(f"{', '.join(texts)} hold no pictures; name another --data")
    return sorted(cases, key=lambda case: (case.kind, case.name))


def mean_colour(picture: Picture, mask: Mask) -> Picture:
    """The hole in the mean colour of the known pixels."""
    filled = picture.copy()
    filled[mask] = picture[~mask].mean(axis=0).round().astype(np.uint8)
    return filled


def classical(name: str) -> Fill:
    """OpenCV's `telea` (Telea 2004, fast marching) or `ns` (Bertalmio et al. 2001, Navier-Stokes), radius 5.

    Raises:
        RuntimeUnavailableError: OpenCV is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"the method {name} is OpenCV's, which is not here ({error}); install the extra `quality`"
        ) from error
    flag = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}[name]

    def fill(picture: Picture, mask: Mask) -> Picture:
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        filled = cv2.inpaint(bgr, mask.astype(np.uint8) * 255, _TELEA_RADIUS, flag)
        return np.ascontiguousarray(np.asarray(filled, np.uint8)[:, :, ::-1])

    return fill


def network(pipeline: Any, **options: Any) -> Fill:
    """A bundle's pipeline (`moebius_runtime.InpaintPipeline`), pasted hard, so that only the hole is its own."""

    def fill(picture: Picture, mask: Mask) -> Picture:
        area = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(pipeline(Image.fromarray(picture), area, blend="hard", **options).convert("RGB"))

    return fill


def evaluate(
    cases: Sequence[Case],
    methods: Sequence[Method],
    reference: str | None = None,
    on_picture: Callable[[str, str], None] = lambda case, method: None,
) -> tuple[list[Score], dict[str, list[Picture]]]:
    """Fills every hole by every method; scores against the truth, or against the pictures of the method `reference`.

    Everything outside of the hole is the true picture, whatever a method made of it.

    Returns:
        the scores, and each method's pictures in the order of the cases.

    Raises:
        InputError: `reference` is no method.
    """
    names = [method.name for method in methods]
    if reference is not None and reference not in names:
        raise InputError(f"--reference {reference}: expected one of {', '.join(names)}")
    ordered = sorted(methods, key=lambda method: method.name != reference)
    scores: list[Score] = []
    pictures: dict[str, list[Picture]] = {name: [] for name in names}
    for index, case in enumerate(cases):
        for method in ordered:
            started = time.perf_counter()
            filled = method.fill(case.picture, case.mask)
            seconds = time.perf_counter() - started
            pasted = np.where(case.mask[:, :, None], filled, case.picture)
            pictures[method.name].append(pasted)
            truth = case.picture if reference is None else pictures[reference][index]
            if method.name != reference:
                values = psnr(truth, pasted, case.mask), ssim(truth, pasted, case.mask)
                scores.append(Score(case.name, case.kind, method.name, *values, seconds))
            on_picture(case.name, method.name)
    return scores, pictures


class Summary(NamedTuple):
    """Of one method over the pictures of one kind ("all": over all)."""

    method: str
    kind: str
    pictures: int
    psnr: float
    psnr_median: float
    ssim: float
    seconds: float


def summaries(scores: Sequence[Score]) -> Iterator[Summary]:
    """Means (and the median of PSNR) by method and kind, in the order in which methods appear."""
    methods = list(dict.fromkeys(score.method for score in scores))
    kinds = [*dict.fromkeys(score.kind for score in scores), "all"]
    for method in methods:
        for kind in kinds if len(kinds) > 2 else ["all"]:
            own = [score for score in scores if score.method == method and kind in ("all", score.kind)]
            yield Summary(
                method,
                kind,
                len(own),
                statistics.fmean(score.psnr for score in own),
                statistics.median(score.psnr for score in own),
                statistics.fmean(score.ssim for score in own),
                statistics.fmean(score.seconds for score in own),
            )


def contact_sheet(
    cases: Sequence[Case], pictures: dict[str, list[Picture]], rows: int = 12, tile: int = 192
) -> Image.Image:
    """Truth, hole and each method's picture, cut to the hole: rows are cases, columns are labelled."""
    shown = np.linspace(0, len(cases) - 1, min(rows, len(cases))).round().astype(int)
    columns = ["truth", "hole", *pictures]
    sheet = Image.new("RGB", (len(columns) * (tile + 4), 20 + len(shown) * (tile + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((column * (tile + 4) + 4, 4), name, fill="black")
    for row, index in enumerate(shown):
        case = cases[index]
        emptied = np.where(case.mask[:, :, None], np.uint8(255), case.picture)
        views = [case.picture, emptied, *(made[index] for made in pictures.values())]
        box = _around(case.mask)
        for column, view in enumerate(views):
            part = Image.fromarray(np.ascontiguousarray(view)).crop(box).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(part, (column * (tile + 4), 20 + row * (tile + 4)))
    return sheet


def _around(mask: Mask) -> tuple[int, int, int, int]:
    """A square that holds the hole and a margin: left, upper, right, lower."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    side = min(max(rows[-1] - rows[0], columns[-1] - columns[0]) + 2 * _MARGIN, height, width)
    top = int(np.clip((rows[0] + rows[-1] - side) // 2, 0, height - side))
    left = int(np.clip((columns[0] + columns[-1] - side) // 2, 0, width - side))
    return left, top, left + int(side), top + int(side)
