"""`moebius-batch`: fills the pictures of a folder, of tars or of a table, on one machine, a Slurm array or Ray."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from moebius_runtime import console
from moebius_runtime.cli import (
    DEFAULT,
    DEFAULT_BUNDLE,
    Blend,
    Fit,
    MaskOrientation,
    ModeName,
    PrecisionName,
    SamplerName,
    parse_dilation,
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
    runtime: Annotated[str, typer.Option(help="As in `moebius-inpaint`.")] = "ort-cpu",
    precision: Annotated[PrecisionName | None, typer.Option(help="Of the U-Net, as in `moebius-inpaint`.")] = None,
    trust: Annotated[bool, typer.Option("--trust", help="As in `moebius-inpaint`.")] = False,
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
    mode: Annotated[ModeName, typer.Option(help="As in `moebius-inpaint`.")] = DEFAULT,
    steps: Annotated[int | None, typer.Option(help="Inference steps. Default: the bundle's.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Default: the bundle's.")] = None,
    strength: Annotated[float | None, typer.Option(help="As in `moebius-inpaint`.")] = None,
    sampler: Annotated[SamplerName | None, typer.Option(help="As in `moebius-inpaint`.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the job. A picture's own follows from it and from its key.")] = 0,
    fit: Annotated[Fit | None, typer.Option(help="As in `moebius-inpaint`.")] = None,
    blend: Annotated[Blend | None, typer.Option(help="As in `moebius-inpaint`.")] = None,
    mask_dilate: Annotated[str | None, typer.Option(metavar="PIXELS|auto", help="As in `moebius-inpaint`.")] = None,
    mask_orientation: Annotated[
        MaskOrientation, typer.Option(help="As in `moebius-inpaint`.")
    ] = MaskOrientation.upright,
    invert_mask: Annotated[bool, typer.Option("--invert-mask", help="Fill black pixels, not white ones.")] = False,
    resize_mask: Annotated[
        bool, typer.Option("--resize-mask", help="Resize masks of another size to the picture's.")
    ] = False,
    max_squares: Annotated[int, typer.Option(min=1, help="The most squares that one picture may take.")] = 64,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Quality of JPEG and AVIF results.")] = 95,
    version: console.Version = False,
) -> None:
    """Fills many pictures: in shards that follow from their names, resumable, on processes, Slurm arrays or Ray."""
    from moebius_batch.keys import parse_share
    from moebius_batch.run import Request, run_job
    from moebius_batch.sources import Columns

    options = {
        "mode": mode.value,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "strength": strength,
        "sampler": None if sampler is None else sampler.value,
        "fit": None if fit is None else fit.value,
        "blend": None if blend is None else blend.value,
        "mask_dilate": None if mask_dilate is None else parse_dilation(mask_dilate),
        "max_squares": max_squares,
    }
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
        runtime=runtime,
        precision=None if precision is None else precision.value,
        trust=trust,
        write=None if write is None else write.value,
        shard_size=shard_size,
        columns=Columns(url_column, mask_column, key_column),
        max_error_share=max_error_share,
        retry_failed=retry_failed,
        options={name: value for name, value in options.items() if value is not None},
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
