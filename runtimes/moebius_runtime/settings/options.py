"""Options of a run with their checks, and the values that they give with the mode's and the bundle's defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice, repeat
from numbers import Integral, Real
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from moebius_runtime.bundle.manifest import Defaults, Geometry, ModeDefaults
from moebius_runtime.errors import InputError
from moebius_runtime.sampling.choice import SAMPLER_NAMES
from moebius_runtime.sampling.schedule import (
    Latents,
    NoiseSchedule,
    initial_noise,
    least_strength,
    noise_stream,
)
from moebius_runtime.settings.modes import (
    DEFAULT_MODE,
    MODES,
    Blend,
    Decode,
    Dilation,
    Fit,
    Mode,
    ModeName,
    Reduce,
    Settings,
    Start,
    VaeDecoder,
)

_LITTLE_NOISE = 0.25  # of 1: with less, the start decides the result


@dataclass(frozen=True)
class InpaintOptions:
    """How to fill a mask. `None` takes the mode's default, or the bundle's if the mode has none.

    Attributes:
        mode: `best`, `balanced` and `fast`: nothing under the mask influences the result, and every masked pixel is
            replaced; they differ in time. `reference`: the original's own procedure, for comparisons. See
            `moebius_runtime.settings.modes`.
        steps: number of inference steps; `strength` drops the first (1 - strength) of them.
        guidance_scale: scale of the classifier-free guidance, 0 to 100; 1 runs the conditional branch alone.
        strength: above 0 to 1; the start is noise on smooth latents without the object, at the level of the first step
            kept. In `reference` it is noise on the picture's own latents, and pure noise at 1.
        sampler: `ddim` (reference), `dpmpp-2m` or `unipc` (8 to 12 steps); `lcm` where the bundle was distilled for it.
        guidance_interval: lowest and highest timestep at which guidance applies, both included. The conditional branch
            alone runs elsewhere, at half the cost (Kynkäänniemi et al. 2024).
        seed: of the starting noise; square i of a picture takes seed + i, in the order of `find_squares`.
        noise: the whole starting noise, float32 [1, 4, S, S], which replaces the seed's and is used unchanged.
        fit: `crop` fills the mask by squares near the network's size, `whole` shrinks the whole picture.
        blend: `soft` feathers the seam outside of the mask (in `reference` across its border, by 3 network pixels),
            `hard` keeps every unmasked pixel bit-exact.
        mask_reduce: `nearest` or `max`, see `moebius_runtime.images.masks.reduce_mask`.
        mask_dilate: pixels by which the mask is grown, or `auto`, see
            `moebius_runtime.images.masks.automatic_dilation`.
        start: what the noise is laid on, except in mode `reference`: `pixels`, smooth values at every masked pixel,
            encoded, or `cells`, smooth values in latent space, which saves an encode.
        decode: `full` decodes the whole square, `masked` only the part that is pasted, see
            `moebius_runtime.decoding`.
        vae_decoder: `full`, or `tiny`, a small decoder that loses fine detail.
        compensate_colour: shift the filled region towards the colours around it.
        max_squares: the most squares that a picture may take with fit `crop`, see `moebius_runtime.regions.squares`.
    """

    mode: ModeName = DEFAULT_MODE
    steps: int | None = None
    guidance_scale: float | None = None
    strength: float | None = None
    sampler: str | None = None
    guidance_interval: Sequence[int] | None = None
    seed: int = 0
    noise: npt.NDArray[np.float32] | None = field(default=None, compare=False)
    fit: Fit | None = None
    blend: Blend | None = None
    mask_reduce: Reduce | None = None
    mask_dilate: Dilation | None = None
    start: Start | None = None
    decode: Decode | None = None
    vae_decoder: VaeDecoder | None = None
    compensate_colour: bool = False
    max_squares: int = 64

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("mode", self.mode, tuple(MODES)),
            ("sampler", self.sampler, (*SAMPLER_NAMES, None)),
            ("fit", self.fit, (*get_args(Fit), None)),
            ("blend", self.blend, (*get_args(Blend), None)),
            ("mask_reduce", self.mask_reduce, (*get_args(Reduce), None)),
            ("start", self.start, (*get_args(Start), None)),
            ("decode", self.decode, (*get_args(Decode), None)),
            ("vae_decoder", self.vae_decoder, (*get_args(VaeDecoder), None)),
        ):
            if value not in choices:
                names = ", ".join(filter(None, choices))
                raise InputError(f"{name.replace('_', '-')} {value!r}: expected one of {names}")
        if self.start is not None and MODES[self.mode].original:
            raise InputError(f"start {self.start!r}: mode {self.mode} starts from the picture itself; use mode best")
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", _interval(self.guidance_interval))
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


def _interval(given: object) -> tuple[int, int]:
    """The two timesteps of a guidance interval; `InputError` unless they are whole numbers in order."""
    ends = tuple(given) if isinstance(given, (list, tuple)) else ()
    whole = len(ends) == 2 and all(isinstance(end, Integral) and not isinstance(end, bool) for end in ends)
    if not whole or not 0 <= ends[0] <= ends[1]:
        raise InputError(
            f"guidance-interval {given!r}: expected the lowest and the highest timestep with guidance, such as 200, 800"
        )
    return int(ends[0]), int(ends[1])


def settings_of(
    options: InpaintOptions, defaults: Defaults, modes: Mapping[Any, ModeDefaults] | None = None
) -> Settings:
    """Returns the values of a run.

    Args:
        options: explicit values.
        defaults: the bundle's.
        modes: the bundle's own defaults of modes; None or a missing one takes the built-in set.

    Raises:
        InputError: two options contradict each other.
    """
    mode = _mode(options.mode, modes or {})

    def first(*values: Any) -> Any:
        return next((value for value in values if value is not None), None)

    sampler = first(options.sampler, mode.sampler)
    if sampler not in SAMPLER_NAMES:
        raise InputError(
            f"sampler {sampler!r}: the bundle's mode {options.mode} names it, and this version has only "
            f"{', '.join(SAMPLER_NAMES)}; update moebius-edge, or name a sampler"
        )
    vae_decoder = first(options.vae_decoder, mode.vae_decoder)
    if vae_decoder == "tiny" and options.decode == "masked":
        raise InputError(
            "decode 'masked': the tiny decoder always decodes the whole square; leave it out, or add vae-decoder full"
        )
    steps = first(options.steps, mode.steps, defaults.num_inference_steps)
    strength = first(options.strength, mode.strength, defaults.strength)
    if options.strength is None and mode.strength is not None and "lcm" not in (sampler, defaults.sampler):
        strength = _enough(strength, steps)
    return Settings(
        mode=mode,
        steps=steps,
        guidance_scale=first(options.guidance_scale, defaults.guidance_scale),
        strength=strength,
        fit=first(options.fit, mode.fit),
        blend=first(options.blend, mode.blend),
        mask_reduce=first(options.mask_reduce, mode.mask_reduce),
        mask_dilate=first(options.mask_dilate, mode.mask_dilate),
        start=first(options.start, mode.start),
        sampler=sampler,
        guidance_interval=first(options.guidance_interval, mode.guidance_interval),
        decode="full" if vae_decoder == "tiny" else first(options.decode, mode.decode),
        vae_decoder=vae_decoder,
    )


def _enough(strength: float, steps: int) -> float:
    """A mode's strength, raised where it would keep none of so few steps. Wrong steps are refused later."""
    if not isinstance(steps, Integral) or steps < 1 or int(steps * strength) >= 1:
        return strength
    return least_strength(int(steps))


def _mode(name: ModeName, modes: Mapping[Any, ModeDefaults]) -> Mode:
    """A mode's built-in defaults with those of the bundle over them."""
    if name not in modes:
        return MODES[name]
    own = {key: value for key, value in modes[name].model_dump().items() if value is not None}
    if "guidance_interval" in own:
        own["guidance_interval"] = tuple(own["guidance_interval"])
    return replace(MODES[name], **own)


def option_notes(settings: Settings, timesteps: npt.NDArray[np.int64], schedule: NoiseSchedule) -> list[str]:
    """Notes on settings with side effects that their user may not expect, one sentence each."""
    first = int(timesteps[0])
    noise = 1 - float(schedule.alphas_cumprod[first]) ** 0.5
    if settings.mode.original and settings.strength < 1:
        return [
            f"mode reference at strength {settings.strength:g} starts from the picture with what is to be removed "
            f"in it (at timestep {first}), which may show through; mode best does not"
        ]
    recommended = (settings.steps, settings.strength) == (settings.mode.steps, settings.mode.strength)
    if not settings.mode.original and not recommended and noise < _LITTLE_NOISE:
        return [
            f"the {len(timesteps)} steps start at timestep {first}, where little noise is left: the "
            "masked region stays close to a smooth gradient; more steps or strength 1 give it detail"
        ]
    return []


def starting_noises(options: InpaintOptions, geometry: Geometry, defaults: Defaults) -> Iterator[Latents]:
    """The starting noise of each square, float32 [1, C, s, s]: the given one, or that of seed + i for square i.

    Raises:
        InputError: the given noise or the seed has a wrong type, shape or value. Raised by the call itself.
    """
    shape = (1, geometry.latent_channels, geometry.latent_size, geometry.latent_size)
    if options.noise is not None:
        check_noise(options.noise, shape)
        return repeat(options.noise)
    first = initial_noise(options.seed, shape, defaults.noise_offset)
    seeds = (int(options.seed + index) % (1 << 32) for index in count(1))
    return chain([first], (initial_noise(seed, shape, defaults.noise_offset) for seed in seeds))


def further_noises(options: InpaintOptions, square: int, geometry: Geometry, defaults: Defaults) -> Iterator[Latents]:
    """The noise of square `square` after its starting noise, from the same seed, without end: for sampler `lcm`.

    Starting noise that the options give does not change it.
    """
    shape = (1, geometry.latent_channels, geometry.latent_size, geometry.latent_size)
    stream = noise_stream(int(options.seed + square) % (1 << 32), shape, defaults.noise_offset)
    return islice(stream, 1, None)


def make_options(**options: Any) -> InpaintOptions:
    """Returns `InpaintOptions` from keywords; raises `InputError` for an unknown one."""
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
