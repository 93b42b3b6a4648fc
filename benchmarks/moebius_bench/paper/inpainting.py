"""Held-out evaluation: pictures inpainted by networks and by classical methods against the truth."""

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
from moebius_runtime.images.masks import load_mask
from moebius_runtime.images.metrics import psnr, ssim
from moebius_runtime.images.pictures import load_picture

Picture = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Fill = Callable[[Picture, Mask], Picture]
_MARGIN = 24  # pixels around the masked region on the sheet
_TELEA_RADIUS = 5.0


class Case(NamedTuple):
    """A picture and its mask; `kind` is the kind of the scene, `photographs`, or the name of the source."""

    name: str
    kind: str
    picture: Picture
    mask: Mask


class Method(NamedTuple):
    """A method that inpaints.

    Attributes:
        name: unique name of the method.
        fill: from uint8 RGB [H, W, 3] and bool [H, W], True in the masked region, to uint8 RGB [H, W, 3].
        sees_truth: whether it gets the true picture, as an upper bound needs, and not one with the region emptied.
    """

    name: str
    fill: Fill
    sees_truth: bool = False


@dataclass(frozen=True)
class Score:
    """Scores of one picture by one method inside the masked region: PSNR in dB, SSIM, mean error in grey levels."""

    case: str
    kind: str
    method: str
    psnr: float
    ssim: float
    mae: float
    seconds: float


def held_out_cases(texts: Sequence[str], size: int, masks: str, seed: int) -> list[Case]:
    """Pictures that nothing was trained on, each with a mask drawn from `seed`.

    Args:
        texts: as `moebius.data.opening.open_source` reads them; scenes and photographs give their held-out part, files
            are taken as they are.
        size: pixels of a side.
        masks: a name of `moebius.data.masks.HOLES`.
        seed: of the masks.

    Raises:
        InputError: an unknown kind of masks, or a source without pictures.
        DataError: a source is not available.
    """
    from moebius.data.datasets import SampleStream
    from moebius.data.masks import HOLES
    from moebius.data.opening import has_held_out, open_source
    from moebius.data.pictures import PLAIN_CROP
    from moebius.data.scenes import scene_kind
    from moebius.data.sources import SceneSource

    if masks not in HOLES:
        raise InputError(f"--masks {masks}: expected {' or '.join(HOLES)}")
    cases = []
    for text in texts:
        source = open_source(text, size, held_out=has_held_out(text))
        kinds: dict[str, str] = {}
        if isinstance(source, SceneSource):
            for index in range(len(source)):
                kinds[source.entry(index, 0).name] = scene_kind(index, source.seed, held_out=True)
        with SampleStream(source, size, masks=HOLES[masks], crops=PLAIN_CROP, seed=seed, epochs=1) as stream:
            cases += [Case(one.name, kinds.get(one.name, text), one.image, one.mask) for one in stream]
    if not cases:
        raise InputError(f"{', '.join(texts)} hold no pictures; name another --data")
    return sorted(cases, key=lambda case: (case.kind, case.name))


def folder_cases(real: Path, mask: Path) -> list[Case]:
    """Pictures of any size and their masks (white is masked), from two folders paired by stem.

    Raises:
        InputError: the folders do not pair, a file is no picture, a mask has another size, or it marks nothing or all.
    """
    from moebius_bench.paper.quality import paired

    cases = []
    for stem, (picture_file, mask_file) in paired(real, mask):
        picture = load_picture(picture_file).to_rgb()
        hole = load_mask(mask_file, (picture.shape[0], picture.shape[1]))
        cases.append(Case(stem, real.resolve().name, picture, hole))
    return cases


def mean_colour(picture: Picture, mask: Mask) -> Picture:
    """The picture with its masked region in the mean colour of the known pixels."""
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
            f"the method {name} needs OpenCV, which cannot be imported ({error}); install the extra `quality`"
        ) from error
    flag = {"telea": cv2.INPAINT_TELEA, "ns": cv2.INPAINT_NS}[name]

    def fill(picture: Picture, mask: Mask) -> Picture:
        bgr = np.ascontiguousarray(picture[:, :, ::-1])
        filled = cv2.inpaint(bgr, mask.astype(np.uint8) * 255, _TELEA_RADIUS, flag)
        return np.ascontiguousarray(np.asarray(filled, np.uint8)[:, :, ::-1])

    return fill


def network(pipeline: Any, **options: Any) -> Fill:
    """A method that runs a `moebius_runtime.InpaintPipeline` with a hard blend: only the masked region changes.

    The mask is exact, so it is not dilated. `options` are those of `InpaintOptions`.
    """
    options = {"blend": "hard", "mask_dilate": 0, **options}

    def fill(picture: Picture, mask: Mask) -> Picture:
        area = Image.fromarray(mask.astype(np.uint8) * 255)
        return np.asarray(pipeline(Image.fromarray(picture), area, **options).convert("RGB"))

    return fill


def autoencoder(pipeline: Any) -> Fill:
    """A method that encodes and decodes the squares around the masked region; use it with `Method.sees_truth`.

    Squares and scaling are those of the pipeline, so this is the result of perfect latents.
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
    """Inpaints every case by every method, and scores it against the truth or the pictures of the method `reference`.

    Pixels outside the masked region are replaced by the true ones before the comparison. A method gets the picture with
    the masked region in the mean colour of the rest, because a pipeline in mode `reference` starts from the whole
    picture with noise. Only a method with `sees_truth` gets the true picture.

    Returns:
        the scores, and the pictures of each method in the order of the cases.

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
    """The scores of one method over the pictures of one kind, or over all pictures for the kind "all"."""

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
    """Means and medians by method and kind, in the order in which methods appear."""
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
    """A sheet of the truth, the mask and each method, cut around the masked region: a row a case, labelled columns."""
    shown = np.linspace(0, len(cases) - 1, min(rows, len(cases))).round().astype(int)
    columns = ["truth", "masked", *pictures]
    sheet = Image.new("RGB", (len(columns) * (tile + 4), 20 + len(shown) * (tile + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, name in enumerate(columns):
        draw.text((column * (tile + 4) + 4, 4), name, fill="black")
    for row, index in enumerate(shown):
        case = cases[index]
        emptied = np.where(case.mask[:, :, None], np.uint8(255), case.picture)
        views = [case.picture, emptied, *(made[index] for made in pictures.values())]
        box = _square(case.mask)
        for column, view in enumerate(views):
            part = Image.fromarray(np.ascontiguousarray(view)).crop(box).resize((tile, tile), Image.Resampling.BICUBIC)
            sheet.paste(part, (column * (tile + 4), 20 + row * (tile + 4)))
    return sheet


def _square(mask: Mask) -> tuple[int, int, int, int]:
    """A square with the masked region and a margin: left, upper, right, lower."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    height, width = mask.shape
    side = min(max(rows[-1] - rows[0], columns[-1] - columns[0]) + 2 * _MARGIN, height, width)
    top = int(np.clip((rows[0] + rows[-1] - side) // 2, 0, height - side))
    left = int(np.clip((columns[0] + columns[-1] - side) // 2, 0, width - side))
    return left, top, left + int(side), top + int(side)
