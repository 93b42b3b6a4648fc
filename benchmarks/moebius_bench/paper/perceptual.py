"""FID and LPIPS, with networks that the user brings as TorchScript archives.

No kept library has either network without torchvision, which many devices lack: torchmetrics takes FID's from
torch-fidelity and LPIPS's backbone from torchvision, and torch-fidelity, piq, lpips, clean-fid and pytorch-fid import
torchvision themselves. What torchmetrics does without it, the Fréchet distance, is taken from there. Networks come as
archives: FID's as `inception-2015-12-05.pt`, which StyleGAN's and MAT's evaluations download; LPIPS's traced once from
the `lpips` package. An archive is a program that torch runs, so its hash is part of the result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import InputError, OutputError, RuntimeUnavailableError

Pixels = npt.NDArray[np.uint8]
_INSTALL = 'install it with `pip install "moebius-edge[quality]"`'


class LpipsNetwork:
    """Distances by an archive that takes two pictures, float32 [1, 3, H, W] in [-1, 1], and returns one number each.

    Zhang et al. (2018). Made once, where the `lpips` package is installed, by tracing `lpips.LPIPS(net="alex")`.
    """

    def __init__(self, path: Path) -> None:
        self._torch = _torch()
        self._archive = _load(self._torch, path, "--lpips-weights")
        self._path = path

    def __call__(self, first: Pixels, second: Pixels) -> float:
        """The distance of two pictures uint8 [H, W, 3] of one size.

        Raises:
            InputError: the archive is not such a network.
            OutputError: the distance is not a finite number.
        """
        torch = self._torch
        with torch.inference_mode(), _Refusals("--lpips-weights", self._path):
            result = self._archive(*(_tensor(torch, p).float() / 127.5 - 1 for p in (first, second)))
            if result.numel() != 1:
                raise InputError(
                    f"--lpips-weights {self._path}: the archive gives {list(result.shape)} for two pictures, expected "
                    "one number; trace lpips.LPIPS without spatial=True"
                )
            distance = float(result)
        if not np.isfinite(distance):
            raise OutputError(f"LPIPS is {distance}; check the archive with two known pictures")
        return distance


class FidNetwork:
    """Features of pictures by an archive that takes uint8 [1, 3, H, W] and gives [1, F].

    Where the archive's `forward` has an argument `return_features`, that is set.
    """

    def __init__(self, path: Path) -> None:
        self._torch = _torch()
        archive = _load(self._torch, path, "--fid-weights")
        self._extract = _features(archive)
        self._path = path

    def __call__(self, picture: Pixels) -> npt.NDArray[np.float32]:
        """The features of a picture uint8 [H, W, 3], float32 [1, F]; `InputError` if the archive is no such network."""
        with self._torch.inference_mode(), _Refusals("--fid-weights", self._path):
            features = self._extract(_tensor(self._torch, picture)).float()
        if features.ndim != 2 or len(features) != 1:
            raise InputError(
                f"--fid-weights {self._path}: the archive gives {list(features.shape)} for one picture, expected "
                "features [1, F]"
            )
        return np.asarray(features.numpy())


class FidDistance:
    """Statistics of the features of two sets and their Fréchet distance (Heusel et al., 2017), by torchmetrics.

    Raises:
        RuntimeUnavailableError: torch or torchmetrics is not installed.
    """

    def __init__(self) -> None:
        self._torch = _torch()
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise RuntimeUnavailableError(f"FID needs torchmetrics ({error}); {_INSTALL}") from error
        self._kind: Any = FrechetInceptionDistance
        self._metric: Any = None
        self._counts = {True: 0, False: 0}

    def add(self, features: npt.NDArray[np.float32], real: bool) -> None:
        """Adds the features of one picture, [1, F], to the true pictures or to the filled ones."""
        self._counts[real] += 1
        with self._torch.inference_mode():
            if self._metric is None:
                # The features are handed on as they are: torchmetrics' own network needs torch-fidelity.
                identity = self._torch.nn.Identity()
                identity.num_features = features.shape[1]
                self._metric = self._kind(feature=identity, normalize=False, input_img_size=None).eval()
            self._metric.update(self._torch.from_numpy(features), real=real)

    def compute(self) -> float:
        """The distance; lower is nearer.

        Raises:
            InputError: a set has fewer than two pictures.
            OutputError: the distance is not a finite number.
        """
        if (fewest := min(self._counts.values())) < 2 or self._metric is None:
            raise InputError(f"FID needs two pictures or more in each folder, got {fewest}")
        with self._torch.inference_mode():
            distance = float(self._metric.compute())
        if not np.isfinite(distance):
            raise OutputError(f"FID is {distance}; the features of the pictures hold infinities")
        return distance


def fid(path: Path, real: Iterable[Pixels], fake: Iterable[Pixels]) -> float:
    """Fréchet Inception distance of two sets of pictures uint8 [H, W, 3]; errors as `FidNetwork` and `FidDistance`."""
    network, distance = FidNetwork(path), FidDistance()
    for is_real, pictures in ((True, real), (False, fake)):
        for picture in pictures:
            distance.add(network(picture), is_real)
    return distance.compute()


def _features(archive: Any) -> Callable[[Any], Any]:
    names = [argument.name for argument in archive.forward.schema.arguments]
    if "return_features" in names:
        return lambda images: archive(images, return_features=True)
    return lambda images: archive(images)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise RuntimeUnavailableError(f"FID and LPIPS need PyTorch ({error}); {_INSTALL}") from error
    return torch


def _load(torch: Any, path: Path, option: str) -> Any:
    if not path.is_file():
        raise InputError(f"{option} {path}: there is no such file; name a TorchScript archive")
    with _Refusals(option, path), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(str(path), map_location="cpu").eval()


class _Refusals:
    """Errors of an archive become the user's: torch reports all of them as RuntimeError."""

    def __init__(self, option: str, path: Path) -> None:
        self._option, self._path = option, path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (RuntimeError, ValueError, TypeError)):
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1][:200]
            raise InputError(
                f"{self._option} {self._path}: not a TorchScript archive of this network ({reason})"
            ) from error


def _tensor(torch: Any, picture: Pixels) -> Any:
    """uint8 [H, W, 3] -> [1, 3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None]
