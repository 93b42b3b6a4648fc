"""The inpainting pipeline: fills the mask of a picture with the graphs of a bundle."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime import decoding, graph_choice, regions
from moebius_runtime.backends import Backend, create_backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.errors import BundleError, InputError, OutputError
from moebius_runtime.images.masks import BoolArray, Orientation, grown_mask, mask_from_picture, reduce_mask
from moebius_runtime.images.pictures import Picture, picture_from_image
from moebius_runtime.images.pillow_info import lost_in_pillow
from moebius_runtime.regions import network_input
from moebius_runtime.regions.paste import paste, pasted_box
from moebius_runtime.regions.plan import Plan
from moebius_runtime.sampling.choice import sampler_of, timesteps_of
from moebius_runtime.sampling.samplers import Cancelled, check_cancelled
from moebius_runtime.sampling.schedule import Latents
from moebius_runtime.settings.distilled import distilled_notes, distilled_settings
from moebius_runtime.settings.modes import Settings
from moebius_runtime.settings.options import InpaintOptions as InpaintOptions
from moebius_runtime.settings.options import check_noise as check_noise
from moebius_runtime.settings.options import further_noises, option_notes, settings_of, starting_noises
from moebius_runtime.settings.options import make_options as make_options

OnStep = Callable[[int, int], None]
"""Called with (steps done, total steps) after every denoising step, over all squares of a picture."""

OnPlan = Callable[[Plan], None]
"""Called once before the work with the squares and steps that it takes."""

Memory = Literal["low", "fast"]
"""`low` keeps one graph in memory at a time; `fast` keeps all of them, for the next picture too."""

_seconds: ContextVar[dict[str, list[float]]] = ContextVar("seconds")  # of the `inpaint` call that is running
_cancelled: ContextVar[Cancelled | None] = ContextVar("cancelled", default=None)  # of the same call

_CONSTANT = 0.01  # grey levels: a decoded picture whose values span less holds nothing
_REFUSED = "nothing was saved. Try the bundle on another picture, or export it again."


@dataclass(frozen=True)
class InpaintResult:
    """The filled picture, notes for the user, and seconds per stage.

    `seconds` has a list for each of `load`, `preprocess`, `encode`, `step`, `decode` and `paste`, an entry per run.
    """

    picture: Picture
    notes: tuple[str, ...]
    seconds: dict[str, list[float]]


@dataclass
class _Square:
    """One square between the graphs, at the network's size S and latent size s."""

    area: regions.Square
    latents: Latents  # [1, 4, s, s]: the noise, then what the steps start from, then the finished latents
    condition: Latents = field(init=False)  # [1, 1 + 4, s, s]
    generated: npt.NDArray[np.uint8] = field(init=False)  # [S, S, 3]
    note: str | None = None
    number: int = 0  # in the order of the plan

    @property
    def crop(self) -> regions.Crop:
        return self.area.crop


@contextmanager
def _seconds_of_its_own() -> Iterator[None]:
    """Gives a call of `inpaint` its own seconds, beside calls of other threads and inside another call."""
    token = _seconds.set({})
    try:
        yield
    finally:
        _seconds.reset(token)


@contextmanager
def _asking(cancelled: Cancelled | None) -> Iterator[None]:
    """Makes every graph run of a call of `inpaint` check whether the call is cancelled."""
    token = _cancelled.set(cancelled)
    try:
        yield
    finally:
        _cancelled.reset(token)


class InpaintPipeline:
    """Fills masked parts of pictures with a bundle.

    Threads can share a pipeline: their graph runs are sequential. A pickled pipeline opens its bundle again.

    All squares of a picture are encoded, then denoised, then decoded; a square that overlaps another one waits until
    that one is pasted. With memory `low` each graph is loaded for its stage and released after it, so that one is in
    memory at a time; with `fast` it stays for the next picture. Results are the same.

    Example:
        >>> from PIL import Image
        >>> from moebius_runtime import InpaintPipeline
        >>> pipeline = InpaintPipeline.from_bundle("BUNDLE", runtime="ort-cpu")  # doctest: +SKIP
        >>> filled = pipeline(Image.open("photo.jpg"), Image.open("mask.png"), steps=20)  # doctest: +SKIP
    """

    def __init__(self, backend: Backend, *, memory: Memory = "low") -> None:
        if memory not in get_args(Memory):
            raise InputError(f"memory {memory!r}: expected one of {', '.join(get_args(Memory))}")
        self.backend = backend
        self.memory = memory
        self.manifest = backend.bundle.manifest
        self.schedule = self.manifest.schedule.build()
        for name, graph in self.manifest.graphs.items():
            batch = graph.inputs[0].shape[0]
            if batch != 1 and not isinstance(batch, str):
                raise BundleError(
                    f"{backend.bundle.path}: graph {name} takes {batch} pictures at once; the pipeline gives it one at "
                    "a time. Export the bundle again with `--batch 1` or `--dynamic-batch`."
                )

    def __reduce__(self) -> tuple[Callable[..., InpaintPipeline], tuple[Backend]]:
        return partial(type(self), memory=self.memory), (self.backend,)

    @classmethod
    def from_bundle(
        cls,
        path: str | Path,
        runtime: str = "ort-cpu",
        *,
        threads: int | None = None,
        memory: Memory = "low",
        precision: Precision | None = None,
        trust: bool = False,
        device: str | None = None,
    ) -> InpaintPipeline:
        """Opens a bundle; for runtime, threads, precision, trust and device see `create_backend`.

        Args:
            path: a folder, or `hub:OWNER/REPO[@REVISION]`. Of a hub's bundle the files that this runtime and precision
                need are fetched here, and no others; later calls need no network.

        Raises:
            BundleError: the bundle is missing or damaged, or cannot be fetched.
            InputError: an argument has a wrong type or value.
            RuntimeUnavailableError: the runtime is unknown or not installed.
            EngineError: the runtime needs engines, and none of the bundle's fits.
        """
        backend = create_backend(
            Bundle.open(path), runtime, threads=threads, precision=precision, trust=trust, device=device
        )
        backend.fetch()
        return cls(backend, memory=memory)

    def __call__(
        self, image: Image.Image, mask: Image.Image, *, mask_orientation: Orientation = "upright", **options: Any
    ) -> Image.Image:
        """Returns the filled picture, a Pillow image of the picture's own size, with its metadata in `info`.

        What cannot be kept of the picture or its metadata is issued as a `UserWarning`; `inpaint` returns such notes.

        Args:
            image: any mode that `moebius_runtime.images.pictures` reads; EXIF rotation is applied.
            mask: of the same size; white pixels are filled.
            mask_orientation: `stored` where the mask was drawn on a photograph's pixels without its EXIF rotation.
            options: fields of `InpaintOptions`.

        Raises:
            InputError: the picture, the mask or an option has a wrong type, size or value.
            OutputError: the network's result is not a picture.
        """
        picture = picture_from_image(image)
        for note in (*picture.notes, *lost_in_pillow(picture.metadata)):
            warnings.warn(note, stacklevel=2)
        area = mask_from_picture(
            picture_from_image(mask, "the mask"),
            picture.shape,
            orientation=mask_orientation,
            rotation=picture.orientation,
            hints="arguments",
        )
        return self.inpaint(picture, area, make_options(**options)).picture.to_image()

    def check(self, options: InpaintOptions) -> None:
        """Refuses options that this bundle cannot serve, and damaged graphs, before any picture is opened.

        `inpaint` raises the same errors, but only when it reaches the stage concerned.
        """
        self._timesteps(options)
        self._noises(options)
        for graph in dict.fromkeys(["vae_encoder", *self._unets(options), *self._decoders(options), "vae_decoder"]):
            self.backend.verify(graph)

    def plan(self, mask: BoolArray, options: InpaintOptions) -> Plan:
        """Returns the squares and steps that filling a mask takes, without any of the work.

        Args:
            mask: bool [H, W], True = fill; not empty. It is grown as the options say.
            options: see `InpaintOptions`.

        Raises:
            InputError: more than `max_squares` squares, or a picture too long for fit `whole`.
        """
        return self._plan(grown_mask(mask, self._settings(options).mask_dilate), options)

    def _plan(self, grown: BoolArray, options: InpaintOptions) -> Plan:
        size, shape = self.manifest.geometry.image_size, (grown.shape[0], grown.shape[1])
        if self._settings(options).fit == "whole":
            squares = [regions.whole_square(regions.whole_crop(shape, size), shape)]
        else:
            squares = regions.find_squares(grown, size, options.max_squares)
        return Plan(tuple(squares), shape, size, len(self._timesteps(options)))

    def option_notes(self, options: InpaintOptions) -> list[str]:
        """Notes on options with side effects, the same for every picture. The notes of `inpaint` include them."""
        settings = self._settings(options)
        notes = option_notes(settings, self._timesteps(options), self.schedule)
        notes += distilled_notes(settings, self.manifest)
        note = graph_choice.decoder_note(self.backend, settings, options)
        return [*notes, note] if note else notes

    @_seconds_of_its_own()
    def inpaint(
        self,
        picture: Picture,
        mask: BoolArray,
        options: InpaintOptions,
        on_step: OnStep | None = None,
        on_plan: OnPlan | None = None,
        *,
        cancelled: Cancelled | None = None,
    ) -> InpaintResult:
        """Fills the mask of a picture: squares that do not overlap go through one graph after the other.

        Args:
            picture: see `moebius_runtime.images.pictures.load_picture`.
            mask: bool [H, W], True = fill; neither empty nor full.
            options: see `InpaintOptions`.
            on_step: called after every step.
            on_plan: called with the plan before the work begins.
            cancelled: asked before every step and every run of a graph, in this thread. Once it returns True the call
                raises `CancelledError`, at the latest after the step that runs. The pipeline can be used again.

        Raises:
            CancelledError: `cancelled` returned True.
            InputError: the mask is not as described or needs more than `max_squares` squares, or the options do not
                fit the bundle.
            BundleError: a graph's file is missing or damaged, or cannot be run.
            OutputError: a result of the network is NaN or infinite, or the picture constant.
        """
        with _asking(cancelled):
            return self._inpaint(picture, mask, options, on_step, on_plan)

    def _inpaint(
        self,
        picture: Picture,
        mask: BoolArray,
        options: InpaintOptions,
        on_step: OnStep | None,
        on_plan: OnPlan | None,
    ) -> InpaintResult:
        timesteps = self._timesteps(options)
        settings = self._settings(options)
        mask, notes = network_input.fillable(picture, mask, settings)
        notes += self.option_notes(options)
        noises = self._noises(options)
        plan = self._plan(mask, options)
        if on_plan is not None:
            on_plan(plan)
        result = replace(picture, pixels=picture.pixels.copy())
        unknown = mask.copy()  # what no square has filled yet
        done = 0
        for several in plan.runs:

            def step(number: int, before: int = done) -> None:
                if on_step is not None:
                    on_step(before * len(timesteps) + number, plan.total_steps)

            squares = [_Square(area, next(noises), number=done + index) for index, area in enumerate(several)]
            self._fill_squares(squares, result, unknown, timesteps, options, step)
            for index, square in enumerate(squares, done + 1):
                if square.note:
                    notes.append(square.note if len(plan.squares) == 1 else f"square {index}: {square.note}")
                with self._timed("paste"):
                    paste(
                        *(square.generated, square.area, result, unknown, settings),
                        compensate_colour=options.compensate_colour,
                    )
            done += len(squares)
        return InpaintResult(result, (*notes, *self.backend.take_notes()), _seconds.get())

    def _fill_squares(
        self,
        squares: list[_Square],
        picture: Picture,
        mask: BoolArray,
        timesteps: npt.NDArray[np.int64],
        options: InpaintOptions,
        on_step: Callable[[int], None],
    ) -> None:
        """Steps 1 to 7 of the pipeline: every square through one graph before any goes through the next."""
        with self._using("vae_encoder"):
            for square in squares:
                self._encode(square, picture, mask, timesteps, options)
        settings = self._settings(options)
        with self._using(*self._unets(options)):
            for index, square in enumerate(squares):

                def done(step: int, _t: int, _x: Latents, before: int = index * len(timesteps)) -> None:
                    on_step(before + step + 1)

                denoiser = self._denoiser(square.condition, settings)
                noises = further_noises(options, square.number, self.manifest.geometry, self.manifest.defaults)
                sample = sampler_of(settings.sampler, noises)
                square.latents = sample(denoiser, square.latents, self.schedule, timesteps, done, _cancelled.get())
        graphs = self._decoders(options)
        with self._using(*graph_choice.FULL, *graphs):
            for square in squares:
                square.generated = self._decode(square, graphs, picture, mask, options)

    def _encode(
        self,
        square: _Square,
        picture: Picture,
        mask: BoolArray,
        timesteps: npt.NDArray[np.int64],
        options: InpaintOptions,
    ) -> None:
        """Resamples a square to the network's size, encodes it, and adds the noise that the steps start from."""
        geometry, settings = self.manifest.geometry, self._settings(options)
        original = settings.mode.original
        with self._timed("preprocess"):
            view = regions.window(square.crop, picture.shape)
            see = network_input.seen_in_full if original else network_input.seen_by_network
            unknown = mask[view] if original else network_input.unknown_pixels(picture, mask, view)
            image, masked = see(picture, unknown, square.crop, geometry.image_size)
        small, square.note = reduce_mask(masked, (geometry.latent_size, geometry.latent_size), settings.mask_reduce)
        if masked.all():
            square.note = "all pixels around it are masked or transparent, so its filling has no context"
        masked_latents = self._run("encode", "vae_encoder", image=image * ~masked)
        if not (original and settings.strength == 1):  # where the original starts from pure noise
            cells = settings.start == "cells"
            encode = network_input.smooth_cells if cells else lambda *_: self._run("encode", "vae_encoder", image=image)
            start = encode(masked_latents, masked)
            square.latents = self.schedule.add_noise(start, square.latents, int(timesteps[0]))
        square.condition = np.concatenate([small[None, None], masked_latents], axis=1)

    def _decode(
        self,
        square: _Square,
        graphs: tuple[GraphName, ...],
        picture: Picture,
        mask: BoolArray,
        options: InpaintOptions,
    ) -> npt.NDArray[np.uint8]:
        """The generated square, [S, S, 3]; with the graphs `MASKED` only what is pasted, or all where that is quick."""
        window = None
        if graphs == decoding.MASKED:
            size, settings = self.manifest.geometry.image_size, self._settings(options)
            colour = options.compensate_colour
            box = pasted_box(square.area, picture.shape, mask, size, settings, compensate_colour=colour)
            window = decoding.window_of(box, self.manifest)
        whole = graph_choice.FULL[0] if len(graphs) > 1 else graphs[0]
        decoded, shown = decoding.decode(self._run, square.latents, whole, window, self.manifest)
        if float(np.ptp(np.clip(shown, -1, 1))) * 127.5 < _CONSTANT:
            raise OutputError(f"the decoded picture is one flat colour; {_REFUSED}")
        scaled = np.clip((decoded + 1) / 2, 0, 1) * 255  # [3, S, S]
        return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 0))

    @contextmanager
    def _using(self, *graphs: GraphName) -> Iterator[None]:
        """Reserves the backend for a stage's graphs; afterwards, also on an error, memory `low` releases them."""
        with self.backend.lock:
            try:
                yield
            finally:
                if self.memory == "low":
                    for graph in graphs:
                        self.backend.release(graph)

    def _denoiser(self, condition: Latents, settings: Settings) -> Callable[[Latents, int], Latents]:
        def denoise(latents: Latents, timestep: int) -> Latents:
            graph, scale = graph_choice.branches(self.backend, settings, timestep)
            inputs: dict[str, npt.NDArray[Any]] = {
                "sample": np.concatenate([latents, condition], axis=1),  # [1, 9, s, s]
                "timestep": np.array([timestep], dtype=np.int64),
            }
            if graph == "unet" and self.manifest.guidance is None:
                inputs["guidance_scale"] = np.array([scale], dtype=np.float32)
            return self._run("step", graph, **inputs)

        return denoise

    def _run(self, stage: str, graph: GraphName, **inputs: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        check_cancelled(_cancelled.get())
        if not self.backend.is_loaded(graph):
            with self._timed("load"):
                self.backend.load(graph)
        with self._timed(stage):
            output = self.backend.run(graph, inputs)
        if not np.isfinite(output).all():
            raise OutputError(f"the output of {graph} holds NaN or infinity; {_REFUSED}")
        if output.min() == output.max():
            raise OutputError(f"the output of {graph} is one constant; {_REFUSED}")
        return output

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        _seconds.get().setdefault(stage, []).append(time.perf_counter() - started)

    def _settings(self, options: InpaintOptions) -> Settings:
        settings = settings_of(options, self.manifest.defaults, self.manifest.modes)
        return distilled_settings(settings, options, self.manifest)

    def _timesteps(self, options: InpaintOptions) -> npt.NDArray[np.int64]:
        settings = self._settings(options)
        return timesteps_of(self.schedule, settings.sampler, settings.steps, settings.strength)

    def _noises(self, options: InpaintOptions) -> Iterator[Latents]:
        return starting_noises(options, self.manifest.geometry, self.manifest.defaults)

    def _unets(self, options: InpaintOptions) -> tuple[GraphName, ...]:
        return graph_choice.unets(self.backend, self._settings(options), self._timesteps(options).tolist())

    def _decoders(self, options: InpaintOptions) -> tuple[GraphName, ...]:
        return graph_choice.decoders(self.backend, self._settings(options), options)
