"""Compares inpainted pictures with true ones: `moebius-bench quality`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from moebius_runtime.commands.pairing import SUFFIXES
from moebius_runtime.errors import InputError
from moebius_runtime.files import sha256_file
from moebius_runtime.images.masks import load_mask
from moebius_runtime.images.metrics import psnr, ssim, ssim_map
from moebius_runtime.images.pictures import load_picture

_EDGE = 5  # how far the window of SSIM reaches to each side; pictures are 64 pixels or more
_FEW = 2048  # features of FID's network: with fewer pictures its covariance is not of full rank


class PairQuality(BaseModel):
    """Scores of one pair. PSNR is None for pictures that are equal there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stem: str
    psnr: float | None
    ssim: float
    psnr_in_mask: float | None = None
    ssim_in_mask: float | None = None
    lpips: float | None = None


class Quality(BaseModel):
    """Means over all pairs. A metric without a value is in `not_computed`, with the reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = 1
    pairs: int
    identical: int
    psnr: float | None
    ssim: float
    psnr_in_mask: float | None
    ssim_in_mask: float | None
    lpips: float | None
    fid: float | None
    not_computed: dict[str, str]
    networks: dict[str, str]
    pictures: list[PairQuality]


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster of `--engine ray`: its address, and the number of workers, None for as many as fit."""

    address: str = "auto"
    workers: int | None = None


Features = npt.NDArray[np.float32]


class PairComparison:
    """Compares pairs, with the networks that are given; errors as `measure_quality`."""

    def __init__(self, fid_weights: Path | None, lpips_weights: Path | None) -> None:
        self._lpips = self._fid = None
        if lpips_weights is not None:
            from moebius_bench.paper.perceptual import LpipsNetwork

            self._lpips = LpipsNetwork(lpips_weights)
        if fid_weights is not None:
            from moebius_bench.paper.perceptual import FidNetwork

            self._fid = FidNetwork(fid_weights)

    def __call__(self, stem: str, files: Sequence[Path]) -> tuple[PairQuality, tuple[Features, Features] | None]:
        """The scores of a pair, and FID's features, [1, F] each, of the true and the filled picture."""
        scores = _pair(stem, files, self._lpips)
        if self._fid is None:
            return scores, None
        return scores, (self._fid(_rgb(files[0])), self._fid(_rgb(files[1])))


def measure_quality(
    real: Path,
    fake: Path,
    mask: Path | None,
    fid_weights: Path | None,
    lpips_weights: Path | None,
    announce: Callable[[str], None] = lambda text: None,
    cluster: Cluster | None = None,
) -> Quality:
    """All metrics whose networks are given, for two folders paired by stem.

    Args:
        real: the true pictures.
        fake: the filled pictures: one per true picture and no more, of its size.
        mask: masks of the same stems and sizes, white where filled; None leaves the masked metrics out.
        fid_weights: FID's network, see `moebius_bench.paper.perceptual`; without it FID is in `not_computed`.
        lpips_weights: LPIPS's network, likewise.
        announce: called with each stage.
        cluster: the Ray cluster to compare on; None compares in this process. The result is the same.

    Raises:
        InputError: folders that do not pair, pictures of different sizes, an unusable network.
        RuntimeUnavailableError: a network was given but its library is not installed.
    """
    pairs = paired(real, fake, mask)
    not_computed = {
        name: f"its network was not given ({option})"
        for name, option, path in (("LPIPS", "--lpips-weights", lpips_weights), ("FID", "--fid-weights", fid_weights))
        if path is None
    }
    distance = None
    if fid_weights is not None:
        from moebius_bench.paper.perceptual import FidDistance

        distance = FidDistance()
    announce(f"comparing {len(pairs)} pairs")
    pictures = []
    compared: Iterator[tuple[PairQuality, tuple[Features, Features] | None]]
    if cluster is None:
        compare = PairComparison(fid_weights, lpips_weights)
        compared = (compare(stem, files) for stem, files in pairs)
    else:
        from moebius_bench.paper.quality_ray import compare_on_ray

        compared = compare_on_ray(cluster, pairs, fid_weights, lpips_weights, announce)
    for picture, features in compared:
        pictures.append(picture)
        if distance is not None and features is not None:
            for one, is_real in zip(features, (True, False), strict=True):
                distance.add(one, is_real)
    networks = {
        name: sha256_file(path) for name, path in (("LPIPS", lpips_weights), ("FID", fid_weights)) if path is not None
    }
    if mask is None:
        not_computed["PSNR and SSIM inside the mask"] = "the masks were not given (--mask)"
    return Quality(
        pairs=len(pairs),
        identical=sum(picture.psnr is None for picture in pictures),
        psnr=_mean([p.psnr for p in pictures]),
        ssim=float(np.mean([p.ssim for p in pictures])),
        psnr_in_mask=_mean([p.psnr_in_mask for p in pictures]),
        ssim_in_mask=_mean([p.ssim_in_mask for p in pictures]),
        lpips=_mean([p.lpips for p in pictures]),
        fid=None if distance is None else distance.compute(),
        not_computed=not_computed,
        networks=networks,
        pictures=pictures,
    )


def quality_lines(result: Quality) -> Iterator[str]:
    """The result as lines of text."""
    equal = f" ({result.identical} equal pairs left out of the mean)" if result.identical else ""
    yield f"{result.pairs} pairs"
    yield "PSNR " + ("infinite: every pair is equal" if result.psnr is None else f"{result.psnr:.2f} dB{equal}")
    yield f"SSIM {result.ssim:.4f}"
    if result.ssim_in_mask is not None:
        inside = "infinite" if result.psnr_in_mask is None else f"{result.psnr_in_mask:.2f} dB"
        yield f"inside the mask: PSNR {inside}, SSIM {result.ssim_in_mask:.4f}"
    for name, value in (("LPIPS", result.lpips), ("FID", result.fid)):
        if value is not None:
            few = f"; unreliable below {_FEW} pictures" if name == "FID" and result.pairs < _FEW else ""
            yield f"{name} {value:.4f} (network {result.networks[name][:16]}{few})"
    for name, reason in result.not_computed.items():
        yield f"{name}: not computed, {reason}"
    worst = min(result.pictures, key=lambda picture: picture.ssim)
    yield f"least similar: {worst.stem}, SSIM {worst.ssim:.4f}"


def paired(real: Path, fake: Path, mask: Path | None = None) -> list[tuple[str, tuple[Path, ...]]]:
    """Stems, sorted, and the file of each folder that has it; `InputError` unless all folders have the same stems."""
    folders = [real, fake] if mask is None else [real, fake, mask]
    found = [_by_stem(folder) for folder in folders]
    for folder, files in zip(folders[1:], found[1:], strict=True):
        if odd := sorted(found[0].keys() ^ files.keys()):
            listed = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
            raise InputError(f"{real} and {folder} do not pair: {listed} in one of them only")
    return [(stem, tuple(files[stem] for files in found)) for stem in sorted(found[0])]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; expected a folder of pictures")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in SUFFIXES or path.name.startswith("."):
            continue
        if path.stem in found:
            raise InputError(f"{folder}: {found[path.stem].name} and {path.name} have one stem; remove one")
        found[path.stem] = path
    if not found:
        raise InputError(f"{folder} holds no picture ({', '.join(SUFFIXES)})")
    return found


def _pair(
    stem: str,
    files: Sequence[Path],
    lpips: Callable[[npt.NDArray[np.uint8], npt.NDArray[np.uint8]], float] | None,
) -> PairQuality:
    truth, filled = _rgb(files[0]), _rgb(files[1])
    if truth.shape != filled.shape:
        raise InputError(
            f"{stem}: the true picture is {truth.shape[1]}x{truth.shape[0]}, the filled one "
            f"{filled.shape[1]}x{filled.shape[0]}; bring them to one size"
        )
    inside = {}
    if len(files) > 2:
        area = load_mask(files[2], (truth.shape[0], truth.shape[1]))
        inside = {"psnr_in_mask": _finite(psnr(truth, filled, area)), "ssim_in_mask": ssim(truth, filled, area)}
    return PairQuality(
        stem=stem,
        psnr=_finite(psnr(truth, filled)),
        # Over the whole picture, only places where the window lies inside count, as is usual.
        ssim=float(ssim_map(truth, filled)[_EDGE:-_EDGE, _EDGE:-_EDGE].mean()),
        lpips=None if lpips is None else lpips(truth, filled),
        **inside,
    )


def _rgb(path: Path) -> npt.NDArray[np.uint8]:
    return load_picture(path).to_rgb()


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _mean(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(np.mean(numbers)) if numbers else None
