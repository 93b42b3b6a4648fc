"""`moebius-inpaint`: fills the masked part of a picture, or of every picture of a folder."""

from __future__ import annotations

import io
import os
import time
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moebius_runtime import console
from moebius_runtime.errors import InputError, MoebiusError, OutputError

if TYPE_CHECKING:
    from moebius_runtime.batch import Job
    from moebius_runtime.pictures import Picture
    from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline
    from moebius_runtime.plan import Plan

DEFAULT_BUNDLE = Path("moebius-bundle")
_MAX_NOISE_BYTES = 64 << 20

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class ModeName(str, Enum):
    """--mode."""

    best = "best"
    reference = "reference"


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


class StartName(str, Enum):
    """--start."""

    pixels = "pixels"
    cells = "cells"


class PrecisionName(str, Enum):
    """--precision."""

    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int8_cpu = "int8_cpu"
    fp8 = "fp8"


@dataclass(frozen=True)
class _Piped:
    """What stands for `-`: the bytes of standard input, the stream of standard output and the format to write there."""

    given: dict[Path, bytes]
    out: BinaryIO | None
    format: str | None


@dataclass(frozen=True)
class _Files:
    """How pictures and masks are read and written."""

    mask: dict[str, Any]
    quality: int
    overwrite: bool
    keep_going: bool
    piped: _Piped


@app.command()
def inpaint(
    image: Annotated[Path, typer.Argument(help="A picture, or a folder of pictures; - for standard input.")],
    mask: Annotated[
        Path, typer.Option(help="Its mask, white = fill; for a folder: one mask, or a folder of masks; - as above.")
    ],
    out: Annotated[Path, typer.Option(help="The result; for a folder of pictures, a folder; - for standard output.")],
    bundle: Annotated[Path, typer.Option(help="What `moebius-export onnx` wrote.")] = DEFAULT_BUNDLE,
    runtime: Annotated[
        str,
        typer.Option(
            help="ort-cpu, ort-cuda, ort-tensorrt, tensorrt, tensorrt-rtx or torch: this one and no other is run. "
            "auto: the best that can run here, and why."
        ),
    ] = "ort-cpu",
    precision: Annotated[
        PrecisionName | None,
        typer.Option(help="Of the U-Net. Default: on a GPU the first of fp16, bf16, fp32 that is there; else fp32."),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option(
            "--trust", help="Run engines without a passport that fits. Engines are programs: know their maker."
        ),
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="On the CPU. Default: the physical cores.")] = None,
    mode: Annotated[
        ModeName,
        typer.Option(
            help="best: nothing of what is removed remains. reference: the original's procedure, for comparisons."
        ),
    ] = ModeName.best,
    steps: Annotated[int | None, typer.Option(help="Inference steps; default: the bundle's (20).")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="Default: the bundle's (2.5 for scenes, 2.0 for portraits); 1 halves the cost.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Above 0 to 1; below 1 the filling is smoother. Default: 1 (reference: the bundle's)."),
    ] = None,
    sampler: Annotated[
        SamplerName, typer.Option(help="ddim is the reference; the others need 8 to 12 steps.")
    ] = SamplerName.ddim,
    seed: Annotated[int, typer.Option(help="Same seed, same picture.")] = 0,
    noise: Annotated[
        Path | None, typer.Option(help="A .npy file with the whole starting noise, float32 [1, 4, S, S].")
    ] = None,
    fit: Annotated[
        Fit | None,
        typer.Option(help="crop: squares near the network's size (best); whole: shrink the picture (reference)."),
    ] = None,
    blend: Annotated[
        Blend | None,
        typer.Option(help="soft: feathered seam (default); hard: pixels outside the grown mask stay bit-exact."),
    ] = None,
    mask_reduce: Annotated[
        Reduce | None, typer.Option(help="How the mask comes to latent size: max (best), nearest (reference).")
    ] = None,
    start: Annotated[
        StartName | None,
        typer.Option(
            help="What the noise is laid on in mode best. pixels (default): smooth colours under the mask; cells: as "
            "smooth latents, which saves an encode."
        ),
    ] = None,
    mask_dilate: Annotated[
        str | None,
        typer.Option(
            metavar="PIXELS|auto",
            help="Grow the mask. auto (best): by a few pixels, more in large pictures; 0 (reference): not at all.",
        ),
    ] = None,
    mask_orientation: Annotated[
        MaskOrientation,
        typer.Option(help="stored: the mask belongs to a photograph's pixels before its EXIF rotation."),
    ] = MaskOrientation.upright,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Black is filled.")] = False,
    resize_mask: Annotated[
        bool, typer.Option("--resize-mask", help="Bring a mask of another size to the picture's.")
    ] = False,
    compensate_colour: Annotated[
        bool, typer.Option("--compensate-colour", help="Shift the filling to the colours around it.")
    ] = False,
    save_comparison: Annotated[
        bool, typer.Option("--save-comparison", help="Also write before | mask | after.")
    ] = False,
    max_squares: Annotated[
        int, typer.Option(min=1, help="The most squares that the network fills in one picture; see --fit.")
    ] = 64,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of a JPEG result.")] = 95,
    keep_loaded: Annotated[
        bool,
        typer.Option("--keep-loaded", help="Keep every graph in memory: no reloading, at a higher peak."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace existing results; else they are skipped.")
    ] = False,
    recursive: Annotated[
        bool, typer.Option("--recursive", help="Enter the sub-folders of a folder of pictures.")
    ] = False,
    format: Annotated[
        str | None, typer.Option(help="Of --out -: png, jpg, webp, tif or avif. Default: the picture's own, or png.")
    ] = None,
) -> None:
    """Fills the masked part of a picture of any size, on this device, without PyTorch."""
    from moebius_runtime.batch import STREAM, plan
    from moebius_runtime.pipeline import InpaintPipeline, make_options

    planned = plan(image, mask, out, strips=save_comparison, recursive=recursive)
    if format is not None and out != STREAM:
        raise InputError("--format is for --out -; the suffix of a file names its format")
    given = {STREAM: console.read_stdin()} if STREAM in (image, mask) else {}
    piped = _Piped(given, console.binary_stdout() if out == STREAM else None, format)
    options = make_options(
        mode=mode.value,
        steps=steps,
        guidance_scale=guidance_scale,
        strength=strength,
        sampler=sampler.value,
        seed=seed,
        noise=None if noise is None else _read_noise(noise),
        fit=None if fit is None else fit.value,
        blend=None if blend is None else blend.value,
        start=None if start is None else start.value,
        mask_reduce=None if mask_reduce is None else mask_reduce.value,
        mask_dilate=None if mask_dilate is None else _dilation(mask_dilate),
        compensate_colour=compensate_colour,
        max_squares=max_squares,
    )
    masking = {"invert": invert_mask, "resize": resize_mask, "orientation": mask_orientation.value}
    files = _Files(masking, quality, overwrite, keep_going=image.is_dir(), piped=piped)
    pipeline = InpaintPipeline.from_bundle(
        bundle,
        runtime,
        threads=threads,
        memory="fast" if keep_loaded else "low",
        precision=None if precision is None else precision.value,
        trust=trust,
    )
    for note in pipeline.backend.take_notes():
        console.warn(note)
    pipeline.check(options)
    for note in pipeline.option_notes(options):
        console.warn(note)
    if pipeline.manifest.stand_in:
        console.warn("this bundle has stand-in weights (random numbers): the picture inside the mask is noise")
    if image.is_dir():
        for place in dict.fromkeys([out, *(job.out.parent for job in planned.jobs)]):
            try:
                place.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot make the folder {place}: {error.strerror}; choose another --out") from error
    if planned.note:
        console.warn(planned.note)
    raise typer.Exit(_run_all(planned.jobs, out, pipeline, options, files))


def _run_all(jobs: list[Job], out: Path, pipeline: InpaintPipeline, options: InpaintOptions, files: _Files) -> int:
    """Every job in turn. In a folder, what is wrong with one picture is reported and the rest goes on."""
    done, failed = 0, 0
    kept: list[Path] = []
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console.err) as bars:
        for job in jobs:
            if there := [] if files.overwrite else [path for path in job.written if os.path.lexists(path)]:
                kept.append(there[0])
                continue
            task = bars.add_task(console.one_line(job.image.name), total=None)
            try:
                _run_one(
                    job,
                    pipeline,
                    options,
                    files,
                    lambda n, total, t=task: bars.update(t, completed=n, total=total),
                )
            except BaseException as error:
                bars.remove_task(task)  # no half-filled bar beside the error
                if not (files.keep_going and isinstance(error, (InputError, OutputError))):
                    raise
                failed += 1
                console.warn(f"{job.image}: not done: {error}")
            else:
                done += 1
    summary = f"{done} picture{'s' * (done != 1)} filled"
    summary += f", {len(kept)} skipped" * bool(kept) + f", {failed} failed" * bool(failed)
    where = out if files.keep_going else jobs[0].out
    kernels = pipeline.backend.describe().get("kernels")
    took = f"{time.perf_counter() - started:.1f} s" + (f", kernels: {kernels}" if kernels else "")
    if files.piped.out is None:
        console.out.print(console.one_line(f"{summary} in {took}: {where}"))
    if kept:  # the last line: nothing was done for these
        listed = ", ".join(map(str, kept[:5])) + (f" and {len(kept) - 5} more" if len(kept) > 5 else "")
        words = (
            "exists and is kept; --overwrite replaces it"
            if len(kept) == 1
            else "exist and are kept; --overwrite replaces them"
        )
        console.warn(f"{listed} {words}")
    return 1 if failed else 0


def _run_one(job: Job, pipeline: InpaintPipeline, options: InpaintOptions, files: _Files, on_step: Any) -> None:
    from moebius_runtime.comparison import save_comparison
    from moebius_runtime.files import check_writable
    from moebius_runtime.masks import load_mask
    from moebius_runtime.pictures import NamedBytes, check_can_save, load_picture, picture_bytes, save_picture

    def source(path: Path) -> Path | NamedBytes:
        return NamedBytes("standard input", files.piped.given[path]) if path in files.piped.given else path

    with console.quiet_libraries():
        picture = load_picture(source(job.image))
        target = job.out if files.piped.out is None else _stdout_name(picture, files.piped.format)
        check_can_save(picture, target)
        for path in job.written:
            check_writable(path, follow_links=True)
        area = load_mask(source(job.mask), picture.shape, rotation=picture.orientation, **files.mask)
    forecast = _Forecast(job.image.name, on_step)
    result = pipeline.inpaint(picture, area, options, forecast.on_step, forecast.on_plan)
    if files.piped.out is None:
        lost = save_picture(result.picture, job.out, files.quality)
    else:
        data, lost = picture_bytes(result.picture, target, files.quality)
        console.write_binary(files.piped.out, data)
    common = pipeline.option_notes(options)  # printed once, before the first picture
    own = [note for note in result.notes if note not in common]
    notes = [*picture.notes, *own, *lost]
    if job.strip:
        save_comparison(picture, area, result.picture, job.strip)
    for note in notes:
        console.warn(f"{job.image.name if job.image not in files.piped.given else 'standard input'}: {note}")


def _stdout_name(picture: Picture, format: str | None) -> Path:
    """A name whose suffix is the format for standard output: the one asked for, else the picture's own, else PNG."""
    from moebius_runtime.saving import OUTPUT_FORMATS

    own = next((suffix for suffix, name in OUTPUT_FORMATS.items() if name == picture.format), ".png")
    return Path("standard output" + (own if format is None else f".{format.lower().lstrip('.')}"))


class _Forecast:
    """Reports what a picture of several squares takes: their number at once, the time once a step is measured."""

    def __init__(self, name: str, on_step: Any) -> None:
        self.name, self.next = name, on_step
        self.plan: Plan | None = None
        self.first = 0.0

    def on_plan(self, plan: Plan) -> None:
        if len(plan.squares) > 1:
            self.plan = plan
            console.warn(f"{self.name}: {plan.describe()}")

    def on_step(self, done: int, total: int) -> None:
        if done == 1:  # it came with loading and encoding; from here to the next is one step
            self.first = time.perf_counter()
        elif done == 2 and self.plan:
            seconds = time.perf_counter() - self.first
            console.warn(f"{self.name}: {self.plan.estimate(seconds)}, from the time of one step ({seconds:.2f} s)")
        self.next(done, total)


def _dilation(text: str) -> int | str:
    """The value of `--mask-dilate`."""
    if text == "auto":
        return text
    if not text.isascii() or not text.isdigit():
        raise InputError(f"--mask-dilate {text}: expected auto or a whole number of pixels, 0 or more")
    return int(text[:12])


def _read_noise(path: Path) -> Any:
    """The array of a .npy file; object arrays, which hold pickles, are refused unread."""
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
