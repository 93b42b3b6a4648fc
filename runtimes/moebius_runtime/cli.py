"""`moebius-inpaint`: fills the masked part of a picture, or of every picture of a folder."""

from __future__ import annotations

import io
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from moebius_runtime import console
from moebius_runtime.errors import InputError, MoebiusError
from moebius_runtime.settings.modes import DEFAULT_MODE

DEFAULT_BUNDLE = Path("moebius-bundle")
_MAX_NOISE_BYTES = 64 << 20

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class ModeName(str, Enum):
    """--mode."""

    best = "best"
    balanced = "balanced"
    fast = "fast"
    reference = "reference"


DEFAULT = ModeName(DEFAULT_MODE)


class MaskOrientation(str, Enum):
    """--mask-orientation."""

    upright = "upright"
    stored = "stored"


class Fit(str, Enum):
    """--fit."""

    crop = "crop"
    whole = "whole"


class Blend(str, Enum):
    """--blend."""

    soft = "soft"
    hard = "hard"


class Reduce(str, Enum):
    """--mask-reduce."""

    nearest = "nearest"
    max = "max"


class SamplerName(str, Enum):
    """--sampler."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp-2m"
    unipc = "unipc"
    lcm = "lcm"


class StartName(str, Enum):
    """--start."""

    pixels = "pixels"
    cells = "cells"


class DecodeName(str, Enum):
    """--decode."""

    full = "full"
    masked = "masked"


class VaeDecoderName(str, Enum):
    """--vae-decoder."""

    full = "full"
    tiny = "tiny"


class PrecisionName(str, Enum):
    """--precision."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int8_cpu = "int8_cpu"
    fp8 = "fp8"


@app.command()
def inpaint(
    image: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures; - reads standard input.")],
    mask: Annotated[
        Path,
        typer.Option(
            help="The mask; white pixels are filled. For a folder of pictures: one mask for all, or a folder of masks "
            "with the pictures' names. - reads standard input."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The result, or a folder for a folder of pictures; - writes to standard output.")
    ],
    bundle: Annotated[
        Path,
        typer.Option(
            help="The bundle: the folder that `moebius-export onnx` wrote, or hub:OWNER/REPO[@REVISION] (extra hub), "
            "of which only the files that the runtime and precision need are fetched."
        ),
    ] = DEFAULT_BUNDLE,
    runtime: Annotated[
        str,
        typer.Option(
            help="ort-cpu, ort-cuda, ort-tensorrt, ort-webgpu, ort-openvino, openvino, tensorrt, tensorrt-rtx or "
            "torch. If it is unavailable, the command fails; it never falls back silently. auto takes the best that "
            "runs here and prints why."
        ),
    ] = "ort-cpu",
    device: Annotated[
        str | None,
        typer.Option(
            help="Device of ort-webgpu, ort-openvino or openvino: its number, its name or a part of it. Default: the "
            "first (openvino: CPU). `--device list` fails with the list of devices."
        ),
    ] = None,
    precision: Annotated[
        PrecisionName | None,
        typer.Option(
            help="Precision of the U-Net. Default: fp32 on a CPU; on a GPU the first of fp16, bf16, fp32 in the bundle."
        ),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust",
            help="Run engines whose passport (what they were built from, and for which device) is missing or does not "
            "match. Engines are programs: use this only for engines whose maker you know.",
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU. Default: the physical cores.")] = None,
    mode: Annotated[
        ModeName,
        typer.Option(
            help="best: no masked pixel influences the result. balanced: also, in fewer steps. fast: fewer still, may "
            "lose some detail. reference: the original's procedure, for comparisons."
        ),
    ] = DEFAULT,
    steps: Annotated[
        int | None, typer.Option(help="Inference steps. Default: the mode's, else the bundle's (20).")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            help="Scale of the classifier-free guidance. Default: the bundle's (2.5 for scenes, 2.0 for portraits). "
            "1 runs one branch of the network and halves the cost."
        ),
    ] = None,
    guidance_interval: Annotated[
        str | None,
        typer.Option(
            metavar="LOW:HIGH",
            help="Timesteps (0 to 999) with guidance; the others run one branch, at half the cost. Default: all.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="Above 0, at most 1. Below 1 the filling is smoother. Default: 1 (mode reference: the bundle's)."
        ),
    ] = None,
    sampler: Annotated[
        SamplerName | None,
        typer.Option(
            help="ddim (default); dpmpp-2m (mode fast) and unipc are made for few steps, 4 to 12; lcm is for bundles "
            "that were distilled for it, which have no other."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise; the same seed gives the same picture.")] = 0,
    noise: Annotated[
        Path | None,
        typer.Option(help="A .npy file with the starting noise, float32 [1, 4, S, S]."),
    ] = None,
    fit: Annotated[
        Fit | None,
        typer.Option(
            help="crop (default of mode best): fill squares near the network's size. whole (reference): shrink the "
            "picture to one square."
        ),
    ] = None,
    blend: Annotated[
        Blend | None,
        typer.Option(help="soft (default): a feathered seam. hard: pixels outside the grown mask stay bit-exact."),
    ] = None,
    mask_reduce: Annotated[
        Reduce | None,
        typer.Option(help="How the mask is reduced to latent size: max (mode best) or nearest (mode reference)."),
    ] = None,
    start: Annotated[
        StartName | None,
        typer.Option(
            help="What the noise is added to, except in mode reference. cells (default): the masked picture's latents, "
            "smoothed under the mask. pixels: the picture with smooth colours under the mask, encoded once more."
        ),
    ] = None,
    decode: Annotated[
        DecodeName | None,
        typer.Option(
            help="masked (modes balanced and fast): decode only the part that is pasted. full: decode the whole square."
        ),
    ] = None,
    vae_decoder: Annotated[
        VaeDecoderName | None,
        typer.Option(
            help="tiny: a small decoder that loses fine detail, for bundles exported with --tiny-decoder. full: the "
            "autoencoder's own."
        ),
    ] = None,
    mask_dilate: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS|auto",
            help="Grow the mask by so many pixels. auto (mode best): a few, more in large pictures. Mode reference: 0.",
        ),
    ] = None,
    mask_orientation: Annotated[
        MaskOrientation,
        typer.Option(help="stored: the mask was drawn on the photograph's pixels without its EXIF rotation."),
    ] = MaskOrientation.upright,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Fill black pixels, not white ones.")] = False,
    resize_mask: Annotated[
        bool, typer.Option("--resize-mask", help="Resize a mask of another size to the picture's.")
    ] = False,
    compensate_colour: Annotated[
        bool, typer.Option("--compensate-colour", help="Shift the filling towards the colours around it.")
    ] = False,
    save_comparison: Annotated[
        bool, typer.Option("--save-comparison", help="Also write before | mask | after, as NAME-comparison.png.")
    ] = False,
    max_squares: Annotated[
        int, typer.Option(min=1, help="The most squares that one picture may take; see --fit crop.")
    ] = 64,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of a JPEG or AVIF result.")] = 95,
    keep_loaded: Annotated[
        bool,
        typer.Option("--keep-loaded", help="Keep every graph in memory: no reloading, but a higher peak."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing results, which are skipped otherwise.")
    ] = False,
    recursive: Annotated[bool, typer.Option("--recursive", help="Also fill the pictures in sub-folders.")] = False,
    format: Annotated[
        str | None,
        typer.Option(help="Format of --out -: png, jpg, webp, tif or avif. Default: the picture's."),
    ] = None,
    version: console.Version = False,
) -> None:
    """Fills the masked part of a picture of any size, on this device, without PyTorch."""
    from moebius_runtime.commands.pairing import STREAM, plan
    from moebius_runtime.commands.run import Files, Piped, run_all
    from moebius_runtime.pipeline import InpaintPipeline, make_options

    planned = plan(image, mask, out, strips=save_comparison, recursive=recursive)
    if format is not None and out != STREAM:
        raise InputError("--format is for --out -; the suffix of a file names its format")
    given = {STREAM: console.read_stdin()} if STREAM in (image, mask) else {}
    piped = Piped(given, console.binary_stdout() if out == STREAM else None, format)
    options = make_options(
        mode=mode.value,
        steps=steps,
        guidance_scale=guidance_scale,
        strength=strength,
        guidance_interval=None if guidance_interval is None else _interval(guidance_interval),
        sampler=None if sampler is None else sampler.value,
        seed=seed,
        noise=None if noise is None else _read_noise(noise),
        fit=None if fit is None else fit.value,
        blend=None if blend is None else blend.value,
        start=None if start is None else start.value,
        decode=None if decode is None else decode.value,
        vae_decoder=None if vae_decoder is None else vae_decoder.value,
        mask_reduce=None if mask_reduce is None else mask_reduce.value,
        mask_dilate=None if mask_dilate is None else parse_dilation(mask_dilate),
        compensate_colour=compensate_colour,
        max_squares=max_squares,
    )
    masking = {"invert": invert_mask, "resize": resize_mask, "orientation": mask_orientation.value}
    files = Files(masking, quality, overwrite, keep_going=image.is_dir(), piped=piped)
    pipeline = InpaintPipeline.from_bundle(
        bundle,
        runtime,
        threads=threads,
        memory="fast" if keep_loaded else "low",
        precision=None if precision is None else precision.value,
        trust=trust,
        device=device,
    )
    for note in pipeline.backend.take_notes():
        console.warn(note)
    pipeline.check(options)
    for note in pipeline.option_notes(options):
        console.warn(note)
    if pipeline.manifest.stand_in:
        console.warn("this bundle has stand-in weights (random test weights): the picture inside the mask is noise")
    if image.is_dir():
        for place in dict.fromkeys([out, *(job.out.parent for job in planned.jobs)]):
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the folder {place}: {error.strerror}; choose another --out") from error
    if planned.note:
        console.warn(planned.note)
    raise typer.Exit(run_all(planned.jobs, out, pipeline, options, files))


def _interval(text: str) -> list[int]:
    """Parses the value of `--guidance-interval`."""
    low, _, high = text.partition(":")
    if not all(end.isascii() and end.isdigit() and len(end) <= 12 for end in (low, high)):
        raise InputError(f"--guidance-interval {text}: expected LOW:HIGH in timesteps, such as 200:800")
    return [int(low), int(high)]


def parse_dilation(text: str) -> int | str:
    """Parses the value of `--mask-dilate`."""
    if text == "auto":
        return text
    if not text.isascii() or not text.isdigit():
        raise InputError(f"--mask-dilate {text}: expected auto or a whole number of pixels, 0 or more")
    return int(text[:12])


def _read_noise(path: Path) -> Any:
    """Reads the array of a .npy file; object arrays, which hold pickles, are refused unread."""
    import numpy as np

    from moebius_runtime.files import open_plain

    try:
        with open_plain(path) as stream:
            data = stream.read(_MAX_NOISE_BYTES + 1)
        if len(data) > _MAX_NOISE_BYTES:
            raise ValueError(f"over {_MAX_NOISE_BYTES >> 20} MiB")
        return np.lib.format.read_array(io.BytesIO(data), allow_pickle=False, max_header_size=4096)
    except Exception as error:  # NumPy parses the header as Python source, whose tokenizer has errors of its own
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise InputError(f"--noise {path}: {reason}; expected a .npy file of float32 [1, 4, S, S]") from error


def main() -> None:
    """Entry point of `moebius-inpaint`."""
    console.run(app, (MoebiusError,))


if __name__ == "__main__":
    main()
