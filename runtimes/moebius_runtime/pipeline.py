"""From a picture and a mask to the filled picture: the reference pipeline around the graphs of a bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import repeat
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from moebius_runtime import blend as blending
from moebius_runtime import prepare, regions
from moebius_runtime.backends import Backend, create_backend
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import BundleError, InputError, OutputError
from moebius_runtime.manifest import GraphName, Precision
from moebius_runtime.masks import BoolArray, Orientation, grown_mask, mask_from_picture, reduce_mask
from moebius_runtime.modes import MODES, Blend, Dilation, Fit, ModeName, Reduce, Settings, Start, settings_of
from moebius_runtime.pictures import Picture, picture_from_image
from moebius_runtime.plan import Plan
from moebius_runtime.samplers import SAMPLERS, SPACINGS, Cancelled, check_cancelled
from moebius_runtime.schedule import Latents, initial_noise

OnStep = Callable[[int, int], None]
"""Told (steps done, steps in all) after every denoising step, over all squares of a picture."""

OnPlan = Callable[[Plan], None]
"""Called once before the work with the squares and steps that it takes."""

Memory = Literal["low", "fast"]
"""Whether the graphs of a picture are held one at a time, or all of them and for the next picture too."""

_seconds: ContextVar[dict[str, list[float]]] = ContextVar("seconds")  # of the `inpaint` call that is running
_cancelled: ContextVar[Cancelled | None] = ContextVar("cancelled", default=None)  # of the same call

_LITTLE_NOISE = 0.25  # a start whose signal is above 1 - this share decides the result
_CONSTANT = 0.01  # grey levels: a decoded picture whose values span less holds nothing
_REFUSED = "nothing was saved. Try the bundle on another picture, or export it again."


@dataclass(frozen=True)
class InpaintOptions:
    """How to fill. `None` takes the mode's default, and the bundle's where the mode has none.

    Attributes:
        mode: `best`: nothing under the mask influences the result, and every masked pixel is replaced. `reference`:
            the original's own procedure, for comparisons. See `moebius_runtime.modes`.
        steps: number of inference steps; `strength` drops the first (1 - strength) of them.
        guidance_scale: 1 or the bundle's 2.5 and the like; 1 runs the conditional branch alone.
        strength: above 0 to 1; the start is noise on smooth latents without the object, at the level of the first step
            kept. In `reference` it is noise on the picture's own latents, and pure noise at 1.
        sampler: `ddim` (reference), `dpmpp-2m` or `unipc` (8 to 12 steps).
        seed: of the starting noise; square i of a picture takes seed + i, in the order of `find_squares`.
        noise: the whole starting noise, float32 [1, 4, S, S], in place of the seed's; taken as it is.
        fit: `crop` fills the mask by squares near the network's size, `whole` shrinks the whole picture.
        blend: `soft` feathers the seam outside of the mask (in `reference` across its border, by 3 network pixels),
            `hard` keeps every unmasked pixel bit-exact.
        mask_reduce: `nearest` or `max`, see `moebius_runtime.masks.reduce_mask`.
        mask_dilate: pixels by which the mask is grown, or `auto`, see `moebius_runtime.masks.automatic_dilation`.
        start: what the noise is laid on in mode `best`: `pixels`, smooth values at every masked pixel, encoded, or
            `cells`, smooth values in latent space, which saves an encode.
        compensate_colour: shift the filled region towards the colours around it.
        max_squares: the most squares that a picture may take with fit `crop`, see `moebius_runtime.squares`.
    """

    mode: ModeName = "best"
    steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    sampler: str = "ddim"
    seed: int = 0
    noise: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    fit: Fit | None = None
    blend: Blend | None = None
    mask_reduce: Reduce | None = None
    mask_dilate: Dilation | None = None
    start: Start | None = None
    compensate_colour: bool = False
    max_squares: int = 64

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mode", self.mode, tuple(MODES)),
            ("sampler", self.sampler, tuple(SAMPLERS)),
            ("fit", self.fit, (*get_args(Fit), None)),
            ("blend", self.blend, (*get_args(Blend), None)),
            ("mask_reduce", self.mask_reduce, (*get_args(Reduce), None)),
            ("start", self.start, (*get_args(Start), None)),
        ):
            if value not in choices:
                names = ", ".join(filter(None, choices))
                raise InputError(f"{name.replace('_', '-')} {value!r}: expected one of {names}")
        if self.start is not None and MODES[self.mode].original:
            raise InputError(f"start {self.start!r}: mode {self.mode} starts from the picture itself; use mode best")
        pixels = self.mask_dilate
        whole = isinstance(pixels, Integral) and not isinstance(pixels, bool) and pixels >= 0
        if not (pixels is None or pixels == "auto" or whole):
            raise InputError(f"mask-dilate {pixels!r}: expected auto or a whole number of pixels, 0 or more")
        scale = self.guidance_scale
        if scale is not None and not (isinstance(scale, Real) and 0 <= scale <= 100):  # NaN is not in any range
            raise InputError(f"guidance scale {scale!r}: expected a number from 0 to 100")
        most = self.max_squares
        if not isinstance(most, Integral) or isinstance(most, bool) or most < 1:
            raise InputError(f"max-squares {most!r}: expected a whole number, 1 or more")


@dataclass(frozen=True)
class InpaintResult:
    """The filled picture, what the user should be told, and seconds per stage.

    `seconds` has lists under `load`, `preprocess`, `encode`, `step`, `decode` and `paste`, an entry per run of it.
    """

    picture: Picture
    notes: tuple[str, ...]
    seconds: dict[str, list[float]]


@dataclass
class _Square:
    """One square on its way through the graphs, of the network's size S and latent size s."""

    area: regions.Square
    latents: Latents  # [1, 4, s, s]: the noise, then what the steps start from, then the finished latents
    condition: Latents = field(init=False)  # [1, 1 + 4, s, s]
    generated: npt.NDArray[np.uint8] = field(init=False)  # [S, S, 3]
    note: str | None = None

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

    Threads can share a pipeline: one at a time runs a graph for its picture. A pickled pipeline opens its bundle again.

    All squares of a picture are encoded, then denoised, then decoded; only one that overlaps another waits until that
    one is pasted. With memory `low` a graph is loaded for its turn and released after it, so that no two
    are in memory; with `fast` it stays for the next picture. Results are the same.

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
    ) -> InpaintPipeline:
        """A pipeline over a bundle folder; runtime, threads, precision and trust are `create_backend`'s.

        Raises:
            BundleError: no bundle there, or a damaged one.
            InputError: an argument is not as expected.
            RuntimeUnavailableError: the runtime is unknown or not installed.
            EngineError: the runtime needs engines, and none of the bundle's fits.
        """
        backend = create_backend(Bundle.open(path), runtime, threads=threads, precision=precision, trust=trust)
        return cls(backend, memory=memory)

    def __call__(
        self, image: Image.Image, mask: Image.Image, *, mask_orientation: Orientation = "upright", **options: Any
    ) -> Image.Image:
        """The filled picture, as a Pillow image of the picture's own size.

        Args:
            image: any mode that `moebius_runtime.pictures` reads; EXIF rotation is applied.
            mask: of the same size; white is filled.
            mask_orientation: `stored` where the mask belongs to the pixels of a photograph before its EXIF rotation.
            options: fields of `InpaintOptions`.

        Raises:
            InputError: the picture, the mask or an option is not as expected.
            OutputError: the network's result is not a picture.
        """
        picture = picture_from_image(image)
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

        Errors as `inpaint`, which finds out each of these no sooner than it needs it.
        """
        self._timesteps(options)
        self._noises(options)
        for graph in ("vae_encoder", self._unet(options), "vae_decoder"):
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
        """What the options break, one sentence each: the same for every picture. `inpaint` notes it too."""
        settings = self._settings(options)
        first = int(self._timesteps(options)[0])
        share = 1 - float(self.schedule.alphas_cumprod[first]) ** 0.5
        notes = []
        if settings.mode.original and settings.strength < 1:
            notes.append(
                f"mode reference at strength {settings.strength:g} starts from the picture with what is to be removed "
                f"in it (at timestep {first}), which may show through; mode best does not"
            )
        elif not settings.mode.original and share < _LITTLE_NOISE:
            notes.append(
                f"the {len(self._timesteps(options))} steps start at timestep {first}, where little noise is left: the "
                "masked region stays close to a smooth gradient; more steps or strength 1 give it detail"
            )
        return notes

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
            picture: see `moebius_runtime.pictures.load_picture`.
            mask: bool [H, W], True = fill; neither empty nor full.
            options: see `InpaintOptions`.
            on_step: told of every step.
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
        mask, notes = prepare.fillable(picture, mask, settings)
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

            squares = [_Square(area, next(noises)) for area in several]
            self._fill_squares(squares, result, unknown, timesteps, options, step)
            for index, square in enumerate(squares, done + 1):
                if square.note:
                    notes.append(square.note if len(plan.squares) == 1 else f"square {index}: {square.note}")
                with self._timed("paste"):
                    self._paste(square, result, unknown, options)
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
        with self._turn("vae_encoder"):
            for square in squares:
                self._encode(square, picture, mask, timesteps, options)
        with self._turn(self._unet(options)):
            for index, square in enumerate(squares):

                def done(step: int, _t: int, _x: Latents, before: int = index * len(timesteps)) -> None:
                    on_step(before + step + 1)

                denoiser = self._denoiser(square.condition, options)
                sample = SAMPLERS[options.sampler]
                square.latents = sample(denoiser, square.latents, self.schedule, timesteps, done, _cancelled.get())
        with self._turn("vae_decoder"):
            for square in squares:
                square.generated = self._decode(square.latents)

    def _paste(self, square: _Square, picture: Picture, unknown: BoolArray, options: InpaintOptions) -> None:
        """Blends what a generated square owns into the picture, and takes it off what is unknown."""
        settings, original = self._settings(options), self._settings(options).mode.original
        view = regions.window(square.crop, picture.shape)
        part, area = picture.part(view), square.area.own(unknown)
        unseen = unknown[view] if original else prepare.unknown_pixels(picture, unknown, view)
        scale = square.crop.side / self.manifest.geometry.image_size
        generated = part.native_from_rgb(regions.from_network(square.generated, square.crop, picture.shape))
        if options.compensate_colour:
            ring = blending.ring_width(scale)
            generated = blending.compensate_colour(generated, part.pixels, area, unseen, ring)
        weights = blending.weights_of(area, settings.blend, scale, original=original)
        hidden = None if original else prepare.invisible(picture, view)
        if hidden is not None:
            weights = np.where(hidden & ~area, np.uint8(0), weights)  # what is invisible stays untouched
        picture.pixels[view] = blending.blend(part.pixels, generated, weights)
        unknown[view] &= ~area

    def _encode(
        self,
        square: _Square,
        picture: Picture,
        mask: BoolArray,
        timesteps: npt.NDArray[np.int64],
        options: InpaintOptions,
    ) -> None:
        """Brings a region to the network's size, and its noise to what the steps start from."""
        geometry, settings = self.manifest.geometry, self._settings(options)
        original = settings.mode.original
        with self._timed("preprocess"):
            view = regions.window(square.crop, picture.shape)
            see = prepare.seen_in_full if original else prepare.seen_by_network
            unknown = mask[view] if original else prepare.unknown_pixels(picture, mask, view)
            image, hole = see(picture, unknown, square.crop, geometry.image_size)
        small, square.note = reduce_mask(hole, (geometry.latent_size, geometry.latent_size), settings.mask_reduce)
        if hole.all():
            square.note = "nothing around it is known (masked or transparent), so its filling follows no surroundings"
        masked_latents = self._run("encode", "vae_encoder", image=image * ~hole)
        if not (original and settings.strength == 1):  # where the original starts from pure noise
            cells = settings.start == "cells"
            encode = prepare.smooth_cells if cells else lambda *_: self._run("encode", "vae_encoder", image=image)
            start = encode(masked_latents, hole)
            square.latents = self.schedule.add_noise(start, square.latents, int(timesteps[0]))
        square.condition = np.concatenate([small[None, None], masked_latents], axis=1)

    def _decode(self, latents: Latents) -> npt.NDArray[np.uint8]:
        """The generated square, [S, S, 3]."""
        decoded = self._run("decode", "vae_decoder", latent=latents)[0]
        scaled = np.clip((decoded + 1) / 2, 0, 1) * 255  # [3, S, S]
        if float(np.ptp(scaled)) < _CONSTANT:
            raise OutputError(f"the decoded picture is one flat colour; {_REFUSED}")
        return np.ascontiguousarray(scaled.astype(np.uint8).transpose(1, 2, 0))

    @contextmanager
    def _turn(self, graph: GraphName) -> Iterator[None]:
        """What runs a graph; after it, whether it went well or not, memory `low` gives the graph's back."""
        with self.backend.lock:
            try:
                yield
            finally:
                if self.memory == "low":
                    self.backend.release(graph)

    def _denoiser(self, condition: Latents, options: InpaintOptions) -> Callable[[Latents, int], Latents]:
        graph, scale = self._unet(options), self._settings(options).guidance_scale

        def denoise(latents: Latents, timestep: int) -> Latents:
            inputs: dict[str, npt.NDArray[Any]] = {
                "sample": np.concatenate([latents, condition], axis=1),  # [1, 9, s, s]
                "timestep": np.array([timestep], dtype=np.int64),
            }
            if graph == "unet":
                inputs["guidance_scale"] = np.array([scale], dtype=np.float32)
            return self._run("step", graph, **inputs)

        return denoise

    def _unet(self, options: InpaintOptions) -> GraphName:
        """The guided network, or at scale 1, where the guidance cancels out, the conditional branch alone."""
        alone = self._settings(options).guidance_scale == 1 and self.backend.has("unet_conditional")
        return "unet_conditional" if alone else "unet"

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
        return settings_of(options, self.manifest.defaults)

    def _timesteps(self, options: InpaintOptions) -> npt.NDArray[np.int64]:
        settings = self._settings(options)
        return self.schedule.inference_timesteps(settings.steps, settings.strength, SPACINGS[options.sampler])

    def _noises(self, options: InpaintOptions) -> Iterator[Latents]:
        """The starting noise of each region in turn. Checked before any work is done."""
        geometry = self.manifest.geometry
        shape = (1, geometry.latent_channels, geometry.latent_size, geometry.latent_size)
        if options.noise is not None:
            check_noise(options.noise, shape)
            return repeat(options.noise)
        first = initial_noise(options.seed, shape, self.manifest.defaults.noise_offset)

        def draw() -> Iterator[Latents]:
            yield first
            index = 1
            while True:
                seed = (options.seed + index) % (1 << 32)
                yield initial_noise(seed, shape, self.manifest.defaults.noise_offset)
                index += 1

        return draw()


def make_options(**options: Any) -> InpaintOptions:
    """`InpaintOptions` from keywords; `InputError` names an unknown one."""
    known = InpaintOptions.__dataclass_fields__
    if unknown := [name for name in options if name not in known]:
        raise InputError(f"unknown option {', '.join(unknown)}; expected some of {', '.join(known)}")
    return InpaintOptions(**options)


def check_noise(noise: npt.NDArray[Any], shape: tuple[int, ...]) -> None:
    """Refuses starting noise of another type or shape, or with values that are not finite."""
    if not isinstance(noise, np.ndarray):
        raise InputError(f"noise is a {type(noise).__name__}; this bundle expects an array, float32 {list(shape)}")
    if noise.dtype != np.float32 or noise.shape != shape:
        raise InputError(f"noise is {noise.dtype} {list(noise.shape)}; this bundle expects float32 {list(shape)}")
    if not np.isfinite(noise).all():
        raise InputError("noise holds NaN or infinity; expected finite numbers")
