"""Filled pictures against the truth, a network's beside those of classical methods: `moebius-bench inpaint`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from moebius_runtime import regions
from moebius_runtime.errors import InputError, RuntimeUnavailableError
from moebius_runtime.masks import load_mask
from moebius_runtime.metrics import psnr, ssim
from moebius_runtime.pictures import load_picture

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Fill = Callable[[Picture, Mask], Picture]
_MARGIN = 24  # pixels around the hole on the sheet
_TELEA_RADIUS = 5.0


class Case(NamedTuple):
    """A picture with a hole: `kind` is a scene's kind, photographs or what its source is called."""

    name: str
    kind: str
    picture: Picture
    mask: Mask


class Method(NamedTuple):
    """A name and how it fills.

    Attributes:
        name: of the method, unlike all others'.
        fill: called with uint8 RGB [H, W, 3] and bool [H, W], True in the hole; gives uint8 RGB [H, W, 3].
        sees_truth: whether it is handed the true picture, as an upper bound needs, or one whose hole was emptied.
    """

    name: str
    fill: Fill
    sees_truth: bool = False


@dataclass(frozen=True)
class Score:
    """One picture filled by one method: inside of the hole PSNR in dB, SSIM, and the mean error in grey levels."""

    case: str
    kind: str
    method: str
    psnr: float
    ssim: float
    mae: float
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
    from moebius.data.scenes import scene_kind
    from moebius.data.sources import SceneSource

    if holes not in HOLES:
        raise InputError(f"--holes {holes}: expected {' or '.join(HOLES)}")
    cases = []
    for text in texts:
        own = text == "photographs" or text.startswith("scenes:")
        source = open_source(text, size, held_out=own)
        kinds: dict[str, str] = {}
        if isinstance(source, SceneSource):
            for index in range(len(source)):
                kinds[source.entry(index, 0).name] = scene_kind(index, source.seed, held_out=True)
        with SampleStream(source, size, masks=HOLES[holes], crops=PLAIN_CROP, seed=seed, epochs=1) as stream:
            cases += [Case(one.name, kinds.get(one.name, text), one.image, one.mask) for one in stream]
    if not cases:
        raise InputError(f"{', '.join(texts)} hold no pictures; name another --data")
    return sorted(cases, key=lambda case: (case.kind, case.name))


def folder_cases(real: Path, mask: Path) -> list[Case]:
    """Pictures of their own sizes and their masks, white in the hole, from two folders that pair by stem.

    Raises:
        InputError: the folders do not pair, a file is no picture, a mask has another size, or it marks nothing or all.
    """
    from moebius_bench.quality import paired

    cases = []
    for stem, (picture_file, mask_file) in paired(real, mask):
        picture = load_picture(picture_file).to_rgb()
        hole = load_mask(mask_file, (picture.shape[0], picture.shape[1]))
        cases.append(Case(stem, real.resolve().name, picture, hole))
    return cases


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
    """A bundle's pipeline (`moebius_runtime.InpaintPipeline`), pasted hard, so that only the hole is its own.

    The hole is exact, so the mask is not grown. `options` are those of `InpaintOptions`.
    """
    options = {"blend": "hard", "mask_dilate": 0, **options}

    def fill(picture: Picture, mask: Mask) -> Picture:
        area = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(pipeline(Image.fromarray(picture), area, **options).convert("RGB"))

    return fill


def autoencoder(pipeline: Any) -> Fill:
    """The squares around the hole through a bundle's VAE and nothing else: use it with `Method.sees_truth`.

    Squares and scaling are the pipeline's, so this is what its network would reach with perfect latents.
    """
    backend, size = pipeline.backend, pipeline.manifest.geometry.image_size

    def run(graph: Any, **inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        try:
            output: npt.NDArray[np.float32] = backend.run(graph, inputs)
            return output
        finally:
            backend.release(graph)

    def fill(picture: Picture, mask: Mask) -> Picture:
        filled, shape = picture.copy(), (mask.shape[0], mask.shape[1])
        for part in regions.find_squares(mask, size):
            crop = part.crop
            view, own = regions.window(crop, shape), part.own(mask)
            square = regions.to_network(picture[view], crop, shape, size).astype(np.float32) / 127.5 - 1
            latent = run("vae_encoder", image=np.ascontiguousarray(square.transpose(2, 0, 1)[None]))
            decoded = run("vae_decoder", latent=latent)[0].transpose(1, 2, 0)  # [S, S, 3] in [-1, 1], not clamped
            generated = (np.clip((decoded + 1) / 2, 0, 1) * 255).astype(np.uint8)
            filled[view][own] = regions.from_network(np.ascontiguousarray(generated), crop, shape)[own]
        return filled

    return fill


def evaluate(
    cases: Sequence[Case],
    methods: Sequence[Method],
    reference: str | None = None,
    on_picture: Callable[[str, str], None] = lambda case, method: None,
) -> tuple[list[Score], dict[str, list[Picture]]]:
    """Fills every hole by every method; scores against the truth, or against the pictures of the method `reference`.

    Everything outside of the hole is the true picture, whatever a method made of it. A method gets the picture with the
    hole in the mean colour of the rest, so that it cannot know the truth: in mode `reference` a pipeline starts from
    the whole picture with noise on it, hole included. Only one with `sees_truth` gets the true picture.

    Returns:
        the scores, and each method's pictures in the order of the cases.

    Raises:
        InputError: `reference` is no method, two methods have one name, or one gives another shape or type.
    """
    names = [method.name for method in methods]
    if double := [name for index, name in enumerate(names) if name in names[:index]]:
        raise InputError(f"two methods are called {double[0]}; give each a name of its own (a bundle's is its folder)")
    if reference is not None and reference not in names:
        raise InputError(f"--reference {reference}: expected one of {', '.join(names)}")
    ordered = sorted(methods, key=lambda method: method.name != reference)
    scores: list[Score] = []
    pictures: dict[str, list[Picture]] = {name: [] for name in names}
    for index, case in enumerate(cases):
        emptied = mean_colour(case.picture, case.mask)
        for method in ordered:
            given = (case.picture if method.sees_truth else emptied).copy()
            started = time.perf_counter()
            filled = method.fill(given, case.mask)
            seconds = time.perf_counter() - started
            if filled.shape != case.picture.shape or filled.dtype != np.uint8:
                raise InputError(
                    f"{method.name} gave {filled.dtype} {list(filled.shape)}; expected uint8 {list(case.picture.shape)}"
                )
            pasted = np.where(case.mask[:, :, None], filled, case.picture)
            pictures[method.name].append(pasted)
            truth = case.picture if reference is None else pictures[reference][index]
            if method.name != reference:
                error = float(np.abs(truth[case.mask].astype(int) - pasted[case.mask]).mean())
                values = psnr(truth, pasted, case.mask), ssim(truth, pasted, case.mask), error
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
    ssim_median: float
    mae: float
    seconds: float


def summaries(scores: Sequence[Score]) -> Iterator[Summary]:
    """Means (and medians) by method and kind, in the order in which methods appear."""
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
                statistics.median(score.ssim for score in own),
                statistics.fmean(score.mae for score in own),
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
