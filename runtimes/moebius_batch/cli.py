"""`moebius-batch`: fills the pictures of a folder, of tars or of a table, on one machine, a Slurm array or Ray."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

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
    SamplerOption,
    StartOption,
    StepsOption,
    Strength,
    Trust,
    VaeDecoderOption,
    given_options,
)
from moebius_runtime.errors import MoebiusError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


class Engine(str, Enum):
    """--engine."""

    local = "local"
    ray = "ray"


class WriteName(str, Enum):
    """--write."""

    folder = "folder"
    tars = "tars"


@app.command()
def batch(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder of pictures or of tars (KEY.jpg, KEY.mask.png, KEY.json), a tar, or a table of paths and "
            "URLs (.csv, .jsonl, .parquet); a path, or a URL such as s3://BUCKET/FOLDER."
        ),
    ],
    out: Annotated[str, typer.Option(help="Folder of the results, a path or a URL. The same command goes on with it.")],
    masks: Annotated[
        str | None,
        typer.Option(
            help="One mask for all, or a folder of masks with the pictures' names. Default: KEY.mask.png beside each "
            "picture, or the table's column."
        ),
    ] = None,
    bundle: Annotated[Path, typer.Option(help="The bundle, which every worker must reach.")] = DEFAULT_BUNDLE,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Take the I-th of N shares of the job's shards. Default: the place in Slurm's job array, else 1/1.",
        ),
    ] = None,
    engine: Annotated[Engine, typer.Option(help="local: processes on this machine. ray: a cluster.")] = Engine.local,
    address: Annotated[
        str, typer.Option(help="The Ray cluster: auto, HOST:PORT, or local for a new one on this machine.")
    ] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Pipelines at a time. Default: 1; with --engine ray as many as fit the cluster."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of a worker on the CPU. Default: the physical cores over --workers; Ray: 1."),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch",
            min=1,
            max=64,
            help="Pictures that go through the network at once, for GPUs. Above 1 it takes a bundle of `moebius-export "
            "onnx --dynamic-batch`.",
        ),
    ] = 1,
    runtime: Annotated[
        str, typer.Option(help="As in `moebius-inpaint`, but for auto: workers could take different ones.")
    ] = "ort-cpu",
    device: DeviceOption = None,
    precision: PrecisionOption = None,
    trust: Trust = False,
    write: Annotated[
        WriteName | None,
        typer.Option(help="folder: a file a picture. tars: one a shard. Default: tars for a source of tars."),
    ] = None,
    shard_size: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Pictures in a shard, about. A tar of the source is one shard.")
    ] = 64,
    url_column: Annotated[str, typer.Option(help="The table's column of pictures.")] = "url",
    mask_column: Annotated[str, typer.Option(help="The table's column of masks.")] = "mask",
    key_column: Annotated[
        str, typer.Option(help="The table's column of keys. Where it is missing, a picture's file name is its key.")
    ] = "key",
    max_error_share: Annotated[
        float, typer.Option(min=0, max=1, help="Stop once more than this share of the pictures failed.")
    ] = 0.1,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Fill the pictures again that failed before.")
    ] = False,
    mode: ModeOption = DEFAULT,
    steps: StepsOption = None,
    guidance_scale: GuidanceScale = None,
    guidance_interval: GuidanceInterval = None,
    strength: Strength = None,
    sampler: SamplerOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the job. A picture's own follows from it and from its key.")] = 0,
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
    max_squares: MaxSquares = 64,
    quality: Quality = 95,
    version: console.Version = False,
) -> None:
    """Fills many pictures: in shards that follow from their names, resumable, on processes, Slurm arrays or Ray."""
    from moebius_batch.keys import parse_share
    from moebius_batch.run import Request, run_job
    from moebius_batch.sources import Columns

    options = given_options(
        {
            "mode": mode,
            "steps": steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "strength": strength,
            "sampler": sampler,
            "fit": fit,
            "blend": blend,
            "mask_reduce": mask_reduce,
            "start": start,
            "decode": decode,
            "vae_decoder": vae_decoder,
            "mask_dilate": mask_dilate,
            "compensate_colour": compensate_colour or None,
            "max_squares": max_squares,
        }
    )
    request = Request(
        source=source,
        out=out,
        masks=masks,
        bundle=bundle,
        share=parse_share(shard),
        engine=engine.value,
        address=address,
        workers=workers,
        threads=threads,
        batch=batch_size,
        runtime=runtime,
        device=device,
        precision=None if precision is None else precision.value,
        trust=trust,
        write=None if write is None else write.value,
        shard_size=shard_size,
        columns=Columns(url_column, mask_column, key_column),
        max_error_share=max_error_share,
        retry_failed=retry_failed,
        options=options,
        masking={"invert": invert_mask, "resize": resize_mask, "orientation": mask_orientation.value},
        seed=seed,
        quality=quality,
    )
    raise typer.Exit(run_job(request))


def main() -> None:
    """Entry point of `moebius-batch`."""
    console.run(app, (MoebiusError,))


if __name__ == "__main__":
    main()
