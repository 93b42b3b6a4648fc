"""Ways to decode latents: the whole square by the full or the tiny decoder, or only the part that is pasted.

The decoder's upper levels take nearly all of its work, and outside of the feather the original's pixels are kept. For
a masked decode the bundle has the decoder in two graphs. The lower one, up to features at a quarter of the picture's
size, sees the whole square. The upper one sees a window of these features: what is pasted, and `MARGIN` around it.

Group norms in the upper levels couple all pixels of the square. The upper graph therefore also decodes an overview, the
one cell of every block of the square's features, and takes from it how the statistics of the window differ from those
of the square; see `moebius_export.network.masked_decoder`. The errors that remain are in docs/speed.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moebius_runtime.bundle.manifest import DecoderName, GraphName, Manifest
from moebius_runtime.sampling.schedule import Latents

MARGIN = 12
"""Cells of the features around what is pasted: the upper levels' receptive field (46 pixels of the square)."""

SMALLEST = 48
"""Side of a window in cells, if the square has them: in fewer cells the overview's statistics are too uncertain."""

LARGEST = 0.75
"""Share of the square from which on the whole is decoded: the window and the overview would cost as much."""

MASKED: tuple[DecoderName, ...] = ("vae_decoder_lower", "vae_decoder_upper")

Box = tuple[slice, slice]
"""Rows and columns of a square at the network's size."""


class Run(Protocol):
    """Runs a graph of the bundle as part of a stage and returns its one output."""

    def __call__(self, stage: str, graph: GraphName, **inputs: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The output of `graph`, whose time counts for `stage`."""


@dataclass(frozen=True)
class Window:
    """The part of the features that is decoded, in cells.

    Attributes:
        rows, columns: the cells.
        cell: side of a cell in pixels of the square.
    """

    rows: slice
    columns: slice
    cell: int

    @property
    def cells(self) -> int:
        """How many cells it has."""
        return len(range(self.rows.start, self.rows.stop)) * len(range(self.columns.start, self.columns.stop))

    @property
    def pixels(self) -> Box:
        """The rows and columns of the square that it covers."""
        return _scaled(self.rows, self.cell), _scaled(self.columns, self.cell)


def window_of(box: Box, manifest: Manifest) -> Window | None:
    """The window that a masked decode of a box takes, or None where the whole square is as quick.

    Its edges are multiples of the overview's blocks, so that a window covers whole blocks.

    Args:
        box: what is needed of the square.
        manifest: of a bundle with the graphs `MASKED`.
    """
    side, block = _sides(manifest)
    cell = manifest.geometry.image_size // side

    def reach(part: slice) -> slice:
        first, last = part.start // cell - MARGIN, -(-part.stop // cell) + MARGIN
        missing = max(0, min(SMALLEST, side) - (last - first))
        first = min(max(0, first - missing // 2), side - min(SMALLEST, side))
        last = max(min(side, last + missing - missing // 2), first + min(SMALLEST, side))
        return slice(first // block * block, min(side, -(-last // block) * block))

    window = Window(reach(box[0]), reach(box[1]), cell)
    return window if window.cells < LARGEST * side * side else None


def decode(
    run: Run, latents: Latents, whole: GraphName, window: Window | None, manifest: Manifest
) -> tuple[Latents, Latents]:
    """The square, float32 [3, S, S] in about [-1, 1] and not clamped, and its part that holds a picture.

    Args:
        run: runs the graphs.
        latents: finished latents, float32 [1, C, s, s].
        whole: the graph that decodes all of them, where there is no window.
        window: what to decode; None decodes all.
        manifest: of the bundle.
    """
    if window is None:
        square = run("decode", whole, latent=latents)[0]
        return square, square
    square = decode_masked(run, latents, window, manifest)
    rows, columns = window.pixels
    return square, square[:, rows, columns]


def decode_masked(run: Run, latents: Latents, window: Window, manifest: Manifest) -> Latents:
    """The square with a window of it decoded, float32 [3, S, S] in about [-1, 1]; 0 elsewhere.

    Args:
        run: runs the graphs.
        latents: finished latents, float32 [1, C, s, s].
        window: what to decode.
        manifest: of the bundle.
    """
    side, block = _sides(manifest)
    features = run("decode", "vae_decoder_lower", latent=latents)  # [1, F, side, side]
    part = np.ascontiguousarray(features[:, :, window.rows, window.columns])
    small = side // block
    overview = np.ascontiguousarray(features[:, :, block // 2 :: block, block // 2 :: block])  # [1, F, small, small]
    inside = np.zeros((1, 1, small, small), np.float32)
    inside[:, :, _scaled(window.rows, 1, block), _scaled(window.columns, 1, block)] = 1
    decoded = run("decode", "vae_decoder_upper", features=part, overview=overview, inside=inside)
    size = manifest.geometry.image_size
    square = np.zeros((3, size, size), np.float32)
    rows, columns = window.pixels
    square[:, rows, columns] = decoded[0]
    return square


def _sides(manifest: Manifest) -> tuple[int, int]:
    """Side of the features in cells, and side of the overview's blocks in cells of the features."""
    side = int(manifest.decoders["vae_decoder_lower"].outputs[0].shape[2])
    return side, side // int(manifest.decoders["vae_decoder_upper"].inputs[1].shape[2])


def _scaled(part: slice, by: int, over: int = 1) -> slice:
    return slice(part.start * by // over, part.stop * by // over)
