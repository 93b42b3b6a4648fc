"""Squares of picture pixels, which may reach beyond the picture, and the part of them inside: the window."""

from __future__ import annotations

from dataclasses import dataclass

from moebius_runtime.errors import InputError

_MIN_PIXELS = 8  # of the network's picture: one latent cell


@dataclass(frozen=True)
class Crop:
    """A square of picture pixels. It may reach beyond the picture."""

    left: int
    top: int
    side: int


def whole_crop(shape: tuple[int, int], size: int = 512, advice: str = "Use --fit crop") -> Crop:
    """The square around a whole picture of `shape` (height, width), which lies in its middle.

    `advice` says in an error what to do.

    Raises:
        InputError: the picture would be reduced to less than one latent cell across.
    """
    height, width = shape
    side = max(height, width)
    crop = Crop(-((side - width) // 2), -((side - height) // 2), side)
    for part in inside(crop, shape):
        first, last = span(part, crop.side, size)
        if last - first < _MIN_PIXELS:
            raise InputError(
                f"a square of {crop.side} pixels, brought to {size}, would leave {max(0, last - first)} "
                f"pixels of the shorter side of a {shape[1]}x{shape[0]} picture; expected {_MIN_PIXELS} or "
                f"more. {advice}."
            )
    return crop


def largest_side(shape: tuple[int, int], size: int) -> int:
    """The largest side of a crop of a picture of `shape` of which one latent cell across the picture is left.

    The shorter side of the picture has to give 8 network pixels. A crop that is not of the network's size can lose
    one more pixel to rounding, hence 9.
    """
    shorter, longer = min(shape), max(shape)
    side = max(1, min(longer, shorter * size // (_MIN_PIXELS + 1)))
    return max(side, size) if shorter >= _MIN_PIXELS and longer >= size else side


def window(crop: Crop, shape: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a picture of `shape` that lie inside the crop."""
    (top, bottom), (left, right) = inside(crop, shape)
    return slice(crop.top + top, crop.top + bottom), slice(crop.left + left, crop.left + right)


def inside(crop: Crop, shape: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """The rows and columns of a crop that lie in the picture, (first, last exclusive), from its corner."""
    return (
        (max(0, -crop.top), min(crop.side, shape[0] - crop.top)),
        (max(0, -crop.left), min(crop.side, shape[1] - crop.left)),
    )


def span(part: tuple[int, int], side: int, size: int) -> tuple[int, int]:
    """First and last (exclusive) network pixel wholly inside the part of a crop that is in the picture."""
    return -(-part[0] * size // side), part[1] * size // side
