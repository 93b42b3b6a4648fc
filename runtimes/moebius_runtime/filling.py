"""Takes squares through the graphs: encode, denoise, decode. Squares of one or several pictures share a graph's run.

Where the first axis of a graph is open (`moebius-export onnx --dynamic-batch`), up to `batch` squares are one run of
it. On ONNX Runtime's CPU provider each square's bytes are the same in every batch; on a GPU they can differ in the last
bits, because libraries choose other kernels for other sizes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from moebius_runtime import decoding, graph_choice, regions
from moebius_runtime.backends import Backend
from moebius_runtime.bundle.manifest import GraphName, Manifest
from moebius_runtime.errors import InputError, OutputError
from moebius_runtime.images.masks import BoolArray, reduce_mask
from moebius_runtime.images.pictures import Picture
from moebius_runtime.regions import network_input
from moebius_runtime.regions.paste import paste, pasted_box
from moebius_runtime.regions.plan import Plan
from moebius_runtime.sampling.choice import sampler_of
from moebius_runtime.sampling.samplers import Cancelled, check_cancelled
from moebius_runtime.sampling.schedule import Latents
from moebius_runtime.settings.modes import Settings
from moebius_runtime.settings.options import InpaintOptions, further_noises

Memory = Literal["low", "fast"]
"""`low` keeps one graph in memory at a time; `fast` keeps all of them, for the next picture too."""

_seconds: ContextVar[dict[str, list[float]]] = ContextVar("seconds")  # of the call that is running
_cancelled: ContextVar[Cancelled | None] = ContextVar("cancelled", default=None)  # of the same call

_CONSTANT = 0.01  # grey levels: a decoded picture whose values span less holds nothing
_REFUSED = "nothing was saved. Try the bundle on another picture, or export it again."
_T = TypeVar("_T")


@dataclass
class Work:
    """A picture that is being filled.

    Attributes:
        options: as given; all pictures of a call share them, but for the seed and the noise.
        result: a copy of the picture, into which squares are pasted.
        unknown: bool [H, W], the pixels that no square has filled yet.
        noises: starting noise of each square, float32 [1, C, s, s].
        plan: its squares.
        notes: for the user.
        done: squares that are pasted.
    """

    options: InpaintOptions
    result: Picture
    unknown: BoolArray
    noises: Iterator[Latents]
    plan: Plan
    notes: list[str]
    done: int = 0


@dataclass
class SquareWork:
    """One square between the graphs, at the network's size S and latent size s.

    Attributes:
        area: where it lies in the picture of `work`.
        latents: float32 [1, C, s, s]: the noise, then what the steps start from, then the finished latents.
        number: in the order of the picture's plan.
        condition: float32 [1, 1 + C, s, s], mask and masked latents.
        generated: uint8 [S, S, 3].
        note: for the user.
    """

    work: Work
    area: regions.Square
    latents: Latents
    number: int
    condition: Latents = field(init=False)
    generated: npt.NDArray[np.uint8] = field(init=False)
    note: str | None = None


@contextmanager
def measured() -> Iterator[dict[str, list[float]]]:
    """Gives a call its own seconds by stage, beside calls of other threads and inside another call."""
    token = _seconds.set({})
    try:
        yield _seconds.get()
    finally:
        _seconds.reset(token)


@contextmanager
def cancellable(cancelled: Cancelled | None) -> Iterator[None]:
    """Makes every graph run of a call check whether the call is cancelled."""
    token = _cancelled.set(cancelled)
    try:
        yield
    finally:
        _cancelled.reset(token)


@contextmanager
def timed(stage: str) -> Iterator[None]:
    """Adds an entry to the seconds of a stage."""
    started = time.perf_counter()
    yield
    _seconds.get().setdefault(stage, []).append(time.perf_counter() - started)


def has_open_batch(manifest: Manifest, graph: GraphName) -> bool:
    """Whether one run of a graph takes any number of squares."""
    return isinstance(manifest.every_graph[graph].inputs[0].shape[0], str)


def check_batch(manifest: Manifest, batch: int, where: object) -> None:
    """Refuses a batch over 1 for a bundle whose encoder or U-Net takes one square a run.

    The graphs of a masked decode always do, so they do not count.

    Args:
        manifest: of the bundle.
        batch: squares of a run.
        where: the bundle, for the message.

    Raises:
        InputError: `batch` is no whole number over 0, or the bundle cannot serve it.
    """
    if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
        raise InputError(f"batch {batch!r}: expected a whole number, 1 or more")
    needed: tuple[GraphName, ...] = ("vae_encoder", "unet", "unet_conditional")
    fixed = [graph for graph in needed if graph in manifest.graphs and not has_open_batch(manifest, graph)]
    if batch > 1 and fixed:
        raise InputError(
            f"batch {batch}: {fixed[0]} of {where} takes one square at a time; export the bundle with --dynamic-batch, "
            "or fill with batch 1"
        )


def groups(values: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    """The values in their order, `size` at a time."""
    return (values[first : first + size] for first in range(0, len(values), size))


class Filling:
    """The graphs of a backend, and the stages that they make up.

    Args:
        backend: runs the graphs.
        memory: whether a graph stays in memory after its stage.
    """

    def __init__(self, backend: Backend, memory: Memory) -> None:
        self._backend = backend
        self._memory = memory
        self._manifest = backend.bundle.manifest
        self._schedule = self._manifest.schedule.build()

    def fill(
        self,
        squares: Sequence[SquareWork],
        settings: Settings,
        timesteps: npt.NDArray[np.int64],
        batch: int,
        on_steps: Callable[[int], None],
    ) -> None:
        """Fills `generated` of squares that do not overlap: every one through a graph before any enters the next.

        Args:
            squares: of any number of pictures with the same options.
            settings: of these options.
            timesteps: int64 [n], falling.
            batch: squares of one run of a graph, where its first axis is open.
            on_steps: called after every step with the squares that took it.
        """
        with self._using("vae_encoder"):
            for several in self._grouped(squares, batch, "vae_encoder"):
                self._encode(several, settings, timesteps)
        unets = graph_choice.unets(self._backend, settings, timesteps.tolist())
        with self._using(*unets):
            for several in self._grouped(squares, batch, *unets):
                self._denoise(several, settings, timesteps, on_steps)
        graphs = graph_choice.decoders(self._backend, settings, squares[0].work.options)
        with self._using(*graph_choice.FULL, *graphs):
            self._decode(squares, graphs, settings, batch)

    def _grouped(self, squares: Sequence[SquareWork], batch: int, *graphs: GraphName) -> Iterator[Sequence[SquareWork]]:
        whole = all(has_open_batch(self._manifest, graph) for graph in graphs)
        return groups(squares, batch if whole else 1)

    def _encode(self, squares: Sequence[SquareWork], settings: Settings, timesteps: npt.NDArray[np.int64]) -> None:
        """Resamples squares to the network's size, encodes them, and adds the noise that the steps start from."""
        geometry, original = self._manifest.geometry, settings.mode.original
        seen = []
        for square in squares:
            picture, mask = square.work.result, square.work.unknown
            with timed("preprocess"):
                view = regions.window(square.area.crop, picture.shape)
                see = network_input.seen_in_full if original else network_input.seen_by_network
                unknown = mask[view] if original else network_input.unknown_pixels(picture, mask, view)
                seen.append(see(picture, unknown, square.area.crop, geometry.image_size))
        masked_latents = self.run(
            "encode", "vae_encoder", image=np.concatenate([image * ~masked for image, masked in seen])
        )  # [B, C, s, s]
        starts: Iterable[Latents] = masked_latents[:, None]  # B of [1, C, s, s]
        if settings.start == "cells":
            starts = map(network_input.smooth_cells, masked_latents[:, None], (masked for _, masked in seen))
        elif not (original and settings.strength == 1):
            starts = self.run("encode", "vae_encoder", image=np.concatenate([image for image, _ in seen]))[:, None]
        for square, (_, masked), latents, start in zip(squares, seen, masked_latents[:, None], starts, strict=True):
            small, square.note = reduce_mask(masked, (geometry.latent_size, geometry.latent_size), settings.mask_reduce)
            if masked.all():
                square.note = "all pixels around it are masked or transparent, so its filling has no context"
            if not (original and settings.strength == 1):  # where the original starts from pure noise
                square.latents = self._schedule.add_noise(start, square.latents, int(timesteps[0]))
            square.condition = np.concatenate([small[None, None], latents], axis=1)

    def _denoise(
        self,
        squares: Sequence[SquareWork],
        settings: Settings,
        timesteps: npt.NDArray[np.int64],
        on_steps: Callable[[int], None],
    ) -> None:
        """The steps of some squares at once: from starting to finished latents."""
        condition = np.concatenate([square.condition for square in squares])  # [B, 1 + C, s, s]
        geometry, defaults = self._manifest.geometry, self._manifest.defaults
        noises = map(
            np.concatenate,
            zip(
                *(further_noises(square.work.options, square.number, geometry, defaults) for square in squares),
                strict=False,  # none of them ends
            ),
        )

        def done(_step: int, _t: int, _x: Latents) -> None:
            on_steps(len(squares))

        sample = sampler_of(settings.sampler, noises)
        start = np.concatenate([square.latents for square in squares])  # [B, C, s, s]
        latents = sample(self._denoiser(condition, settings), start, self._schedule, timesteps, done, _cancelled.get())
        for square, finished in zip(squares, latents[:, None], strict=True):
            square.latents = finished

    def _denoiser(self, condition: Latents, settings: Settings) -> Callable[[Latents, int], Latents]:
        def denoise(latents: Latents, timestep: int) -> Latents:
            graph, scale = graph_choice.branches(self._backend, settings, timestep)
            inputs: dict[str, npt.NDArray[Any]] = {
                "sample": np.concatenate([latents, condition], axis=1),  # [B, C + 1 + C, s, s]
                "timestep": np.array([timestep], dtype=np.int64),
            }
            if graph == "unet" and self._manifest.guidance is None:
                inputs["guidance_scale"] = np.array([scale], dtype=np.float32)
            return self.run("step", graph, **inputs)

        return denoise

    def _decode(
        self, squares: Sequence[SquareWork], graphs: tuple[GraphName, ...], settings: Settings, batch: int
    ) -> None:
        """Decodes squares; with the graphs `MASKED` only what is pasted of each, or all where that is as quick."""
        whole = graph_choice.FULL[0] if len(graphs) > 1 else graphs[0]
        in_full = []
        for square in squares:
            window = self._window(square, settings) if graphs == decoding.MASKED else None
            if window is None:
                in_full.append(square)
                continue
            decoded = decoding.decode_masked(self.run, square.latents, window, self._manifest)  # [3, S, S]
            rows, columns = window.pixels
            square.generated = _pixels(decoded, decoded[:, rows, columns])
        for several in self._grouped(in_full, batch, whole):
            latents = np.concatenate([square.latents for square in several])
            for square, decoded in zip(several, self.run("decode", whole, latent=latents), strict=True):
                square.generated = _pixels(decoded, decoded)

    def _window(self, square: SquareWork, settings: Settings) -> decoding.Window | None:
        work, size = square.work, self._manifest.geometry.image_size
        colour = work.options.compensate_colour
        box = pasted_box(square.area, work.result.shape, work.unknown, size, settings, compensate_colour=colour)
        return decoding.window_of(box, self._manifest)

    def run(self, stage: str, graph: GraphName, **inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Runs a graph, whose time counts for `stage`.

        Raises:
            CancelledError: the call is cancelled.
            OutputError: the result of a square holds NaN or infinity, or is one constant.
        """
        check_cancelled(_cancelled.get())
        if not self._backend.is_loaded(graph):
            with timed("load"):
                self._backend.load(graph)
        with timed(stage):
            output = self._backend.run(graph, inputs)
        if not np.isfinite(output).all():
            raise OutputError(f"the output of {graph} holds NaN or infinity; {_REFUSED}")
        values = output.reshape(len(output), -1)  # [B, ...] -> [B, values]
        if (values.min(axis=1) == values.max(axis=1)).any():
            raise OutputError(f"the output of {graph} is one constant; {_REFUSED}")
        return output

    @contextmanager
    def _using(self, *graphs: GraphName) -> Iterator[None]:
        """Reserves the backend for a stage's graphs; afterwards, also on an error, memory `low` releases them."""
        with self._backend.lock:
            try:
                yield
            finally:
                if self._memory == "low":
                    for graph in graphs:
                        self._backend.release(graph)


def paste_square(square: SquareWork, settings: Settings) -> None:
    """Pastes a filled square into its picture's result, and adds its note to the picture's."""
    work = square.work
    work.done += 1
    if square.note:
        alone = len(work.plan.squares) == 1
        work.notes.append(square.note if alone else f"square {work.done}: {square.note}")
    with timed("paste"):
        paste(
            *(square.generated, square.area, work.result, work.unknown, settings),
            compensate_colour=work.options.compensate_colour,
        )


def _pixels(decoded: npt.NDArray[np.float32], shown: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """The generated square, uint8 [S, S, 3], of values [3, S, S] in about [-1, 1], of which `shown` is a picture."""
    if float(np.ptp(np.clip(shown, -1, 1))) * 127.5 < _CONSTANT:
        raise OutputError(f"the decoded picture is one flat colour; {_REFUSED}")
    scaled = np.clip((decoded + 1) / 2, 0, 1) * 255
    return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 0))
