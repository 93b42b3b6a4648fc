"""`moebius-inpaint`: fills the masked part of a picture, or of every picture of a folder."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated, Any

import typer

from moebius_runtime import console
from moebius_runtime.commands.options import (
    DEFAULT,
    DEFAULT_BUNDLE,
    BlendOption,
    CompensateColour,
    DecodeOption,
    DeviceOption,
    FitOption,
    GuidanceInterval,
    GuidanceScale,
    InvertMask,
    MaskDilate,
    MaskOrientation,
    MaskOrientationOption,
    MaskReduce,
    MaxSquares,
    ModeOption,
    PrecisionOption,
    Quality,
    ResizeMask,
    RuntimeOption,
    SamplerOption,
    StartOption,
    StepsOption,
    Strength,
    Trust,
    VaeDecoderOption,
    given_options,
)
from moebius_runtime.commands.options import Blend as Blend  # here since 0.1, as the four below
from moebius_runtime.commands.options import Fit as Fit
from moebius_runtime.commands.options import PrecisionName as PrecisionName
from moebius_runtime.commands.options import Reduce as Reduce
from moebius_runtime.commands.options import SamplerName as SamplerName
from moebius_runtime.errors import InputError, MoebiusError

_MAX_NOISE_BYTES = 64 << 20

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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
    runtime: RuntimeOption = "ort-cpu",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    trust: Trust = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on the CPU. Default: the physical cores.")] = None,
    mode: ModeOption = DEFAULT,
    steps: StepsOption = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    strength: Strength = None,
    sampler: SamplerOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the starting noise; the same seed gives the same picture.")] = 0,
    noise: Annotated[
        Path | None,
        typer.Option(help="A .npy file with the starting noise, float32 [1, 4, S, S]."),
    ] = None,
    fit: FitOption = None,
    blend: BlendOption = None,
    mask_reduce: MaskReduce = None,
    start: StartOption = None,
    decode: DecodeOption = None,
    vae_decoder: VaeDecoderOption = None,
    mask_dilate: MaskDilate = None,
    mask_orientation: MaskOrientationOption = MaskOrientation.upright,
    invert_mask: InvertMask = False,
    resize_mask: ResizeMask = False,
    compensate_colour: CompensateColour = False,
    save_comparison: Annotated[
        bool, typer.Option("--save-comparison", help="Also write before | mask | after, as NAME-comparison.png.")
    ] = False,
    max_squares: MaxSquares = 64,
    quality: Quality = 95,
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
        **given_options(
            {
                "mode": mode,
                "steps": steps,
                "guidance_scale": guidance_scale,
                "strength": strength,
                "guidance_interval": guidance_interval,
                "sampler": sampler,
                "fit": fit,
                "blend": blend,
                "start": start,
                "decode": decode,
                "vae_decoder": vae_decoder,
                "mask_reduce": mask_reduce,
                "mask_dilate": mask_dilate,
            }
        ),
        seed=seed,
        noise=None if noise is None else _read_noise(noise),
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
