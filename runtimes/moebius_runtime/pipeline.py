"""The inpainting pipeline: fills the mask of a picture with the graphs of a bundle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime import graph_choice, regions
from moebius_runtime.backends import Backend, create_backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.errors import BundleError, InputError
from moebius_runtime.filling import Filling, SquareWork, Work, cancellable, check_batch, measured, paste_square
from moebius_runtime.filling import Memory as Memory
from moebius_runtime.images.masks import BoolArray, Orientation, grown_mask, mask_from_picture
from moebius_runtime.images.pictures import Picture, picture_from_image
from moebius_runtime.images.pillow_info import lost_in_pillow
from moebius_runtime.regions import network_input
from moebius_runtime.regions.plan import Plan
from moebius_runtime.sampling.choice import timesteps_of
from moebius_runtime.sampling.samplers import Cancelled
from moebius_runtime.sampling.schedule import Latents
from moebius_runtime.settings.distilled import distilled_notes, distilled_settings
from moebius_runtime.settings.modes import Settings
from moebius_runtime.settings.options import InpaintOptions as InpaintOptions
from moebius_runtime.settings.options import check_noise as check_noise
from moebius_runtime.settings.options import make_options as make_options
from moebius_runtime.settings.options import option_notes, settings_of, starting_noises

OnStep = Callable[[int, int], None]
"""Called with (steps done, total steps) after every denoising step, over all squares of a picture."""

OnPlan = Callable[[Plan], None]
"""Called once before the work with the squares and steps that it takes."""

Request = tuple[Picture, BoolArray, InpaintOptions]
"""A picture, its mask (bool [H, W], True = fill) and its options."""


@dataclass(frozen=True)
class InpaintResult:
    """The filled picture, notes for the user, and seconds per stage.

    `seconds` has a list for each of `load`, `preprocess`, `encode`, `step`, `decode` and `paste`, an entry per run.
    """

    picture: Picture
    notes: tuple[str, ...]
    seconds: dict[str, list[float]]


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
        self._filling = Filling(backend, memory)
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

    def check(self, options: InpaintOptions, batch: int = 1) -> None:
        """Refuses options and a batch that this bundle cannot serve, and damaged graphs, before any picture is opened.

        `inpaint` and `inpaint_many` raise the same errors, but only when they reach the stage concerned.
        """
        check_batch(self.manifest, batch, self.backend.bundle.path)
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
        with cancellable(cancelled):
            return self._inpaint([(picture, mask, options)], 1, on_step, on_plan)[0]

    def inpaint_many(
        self, requests: Sequence[Request], *, batch: int, cancelled: Cancelled | None = None
    ) -> list[InpaintResult]:
        """Fills the masks of several pictures, `batch` squares of any of them in one run of a graph.

        Takes a bundle with an open batch (`moebius-export onnx --dynamic-batch`) for a batch over 1. On ONNX Runtime's
        CPU provider a picture gets the bytes that `inpaint` gives it; on a GPU the last bits can differ. The work
        ends at the first picture that `inpaint` would refuse; pictures that fail can be told apart by filling them
        alone.

        Args:
            requests: pictures with their masks and options, which are equal but for the seed and the noise.
            batch: squares of one run.
            cancelled: as of `inpaint`.

        Returns:
            The results in the order of the requests. Each has the seconds of the whole call; notes of the runtime are
            with the first.

        Raises:
            InputError: the options differ, or the bundle's batch is fixed; and as `inpaint`.
            CancelledError, BundleError, OutputError: as `inpaint`.
        """
        if not requests:
            return []
        common = {replace(options, seed=0, noise=None) for _, _, options in requests}
        if len(common) > 1:
            raise InputError("the options of the pictures differ; expected equal ones, but for the seed and the noise")
        with cancellable(cancelled):
            return self._inpaint(requests, batch, None, None)

    def _inpaint(
        self, requests: Sequence[Request], batch: int, on_step: OnStep | None, on_plan: OnPlan | None
    ) -> list[InpaintResult]:
        check_batch(self.manifest, batch, self.backend.bundle.path)
        with measured() as seconds:
            works = [self._work(*request) for request in requests]
            options = works[0].options
            timesteps, settings = self._timesteps(options), self._settings(options)
            if on_plan is not None:
                on_plan(works[0].plan)
            total = sum(work.plan.total_steps for work in works)
            steps = 0

            def step(squares: int) -> None:
                nonlocal steps
                steps += squares
                if on_step is not None:
                    on_step(steps, total)

            for runs in zip_longest(*(work.plan.runs for work in works), fillvalue=[]):
                squares = [
                    SquareWork(work, area, next(work.noises), work.done + index)
                    for work, areas in zip(works, runs, strict=True)
                    for index, area in enumerate(areas)
                ]
                self._filling.fill(squares, settings, timesteps, batch, step)
                for square in squares:
                    paste_square(square, settings)
            own = self.backend.take_notes()
            return [
                InpaintResult(work.result, (*work.notes, *(own if work is works[0] else ())), seconds) for work in works
            ]

    def _work(self, picture: Picture, mask: BoolArray, options: InpaintOptions) -> Work:
        """A checked picture before its first square."""
        self._timesteps(options)  # refuses wrong values before the mask is looked at
        grown, notes = network_input.fillable(picture, mask, self._settings(options))
        notes += self.option_notes(options)
        noises = self._noises(options)
        result = replace(picture, pixels=picture.pixels.copy())
        return Work(options, result, grown.copy(), noises, self._plan(grown, options), notes)

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
