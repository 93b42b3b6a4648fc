"""Pieces that several rules share: batch norms as constants, and 1x1 convolutions as matrix products."""

from __future__ import annotations

from torch import Tensor, nn

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def batch_norm_affine(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a batch norm in eval mode: norm(x) = scale * x + shift."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


def frozen(norm: BatchNorm) -> str | None:
    """Why a batch norm has no constants to fold, or None."""
    if norm.training:
        return "its batch norm is in training mode"
    if norm.running_mean is None or norm.weight is None:
        return "its batch norm keeps no statistics or has no gain"
    return None


def pointwise(conv: nn.Conv2d, scale: Tensor | None = None) -> Tensor:
    """The matrix [out, in] of a 1x1 convolution, its rows times `scale`; a new tensor."""
    matrix = conv.weight[:, :, 0, 0]  # [out, in, 1, 1] -> [out, in]
    return matrix.clone() if scale is None else matrix * scale[:, None]


def constant(tensor: Tensor) -> nn.Parameter:
    """A parameter that is not trained, contiguous and sharing nothing."""
    return nn.Parameter(tensor.detach().clone().contiguous(), requires_grad=False)


def no_matrix(conv: nn.Conv2d, *, bias: bool) -> str | None:
    """Why a convolution is no matrix with (without) a bias, or None."""
    if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.groups != 1 or conv.padding != (0, 0):
        return f"a {conv.kernel_size} convolution of stride {conv.stride} in {conv.groups} groups is no matrix"
    if (conv.bias is not None) != bias:
        return f"a bias was {'expected' if bias else 'not expected'}"
    return None
