"""`moebius-distill encode`: encodes pictures and masks to latents."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moebius.errors import DataError
from moebius_runtime import console

if TYPE_CHECKING:
    from moebius.data.masks import MaskSettings
    from moebius.data.pictures import CropSettings
    from moebius.distill.settings import Pictures

_WEIGHTED = re.compile(r"(.+)@([1-9][0-9]{0,5})", re.DOTALL)


def encode_command(
    data: Annotated[
        list[str],
        typer.Argument(
            help="Sources: scenes:COUNT\\[:SEED], photographs, a folder, a .jsonl or a .tar file. SOURCE@N repeats "
            "each picture N times per epoch."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder for the latents; an unfinished encoding there is continued.")],
    vae: Annotated[str, typer.Option(help="Weights of the autoencoder: hub:OWNER/REPO/FOLDER, a file or a folder.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures to encode.")],
    preset: Annotated[str, typer.Option(help="Sizes of the networks: full, small or tiny.")] = "full",
    size: Annotated[
        int | None, typer.Option(min=16, help="Side of the pictures in pixels. Default: the student's size.")
    ] = None,
    scene_size: Annotated[
        int | None, typer.Option(min=16, help="Side at which scenes are drawn before cropping. Default: --size.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of order, crops and masks.")] = 0,
    masks: Annotated[
        str, typer.Option("--masks", "--holes", help="Random masks: training (the paper's), small or painted.")
    ] = "training",
    mask_side: Annotated[
        int,
        typer.Option(
            min=32, help="Side in pixels of the picture that the masks' lengths are for: 256 for crops of 256 pixels."
        ),
    ] = 512,
    mask_most: Annotated[
        float | None, typer.Option(help="Greatest share of a picture that may be masked. Default: that of --masks.")
    ] = None,
    crop: Annotated[
        str | None,
        typer.Option(
            help="LEAST:MOST side of a crop, as shares of the picture's shorter side. Default: 0.6:1.", metavar="A:B"
        ),
    ] = None,
    masks_per_picture: Annotated[
        int, typer.Option(min=1, help="Masks per picture; its own latent is stored once.")
    ] = 1,
    dtype: Annotated[str, typer.Option(help="Stored dtype of the latents: float16 or float32.")] = "float16",
    starts: Annotated[
        bool, typer.Option("--starts", help="Also encode the picture with smooth values under each mask.")
    ] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Run the encoder in bfloat16.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures per encoder pass.")] = 8,
    shard_size: Annotated[int, typer.Option(min=1, help="Pictures per file.")] = 256,
    threads: Annotated[int, typer.Option(min=0, help="Threads that draw and decode ahead.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is one.")] = None,
) -> None:
    """Encodes pictures and masks to latents once, so that training does not run the VAE in every epoch.

    After an interruption the same command continues.
    """
    from moebius.data.masks import HOLES

    if masks not in HOLES:
        raise DataError(f"--masks {masks}: expected {' or '.join(HOLES)}")
    if dtype not in ("float16", "float32"):
        raise DataError(f"--dtype {dtype}: expected float16 or float32")
    import torch

    from moebius.data.encoding import Autoencoder, EncodeOptions, encode_samples
    from moebius.data.pictures import CropSettings
    from moebius.data.shards import Dtype
    from moebius.network.config import preset as sizes_of
    from moebius.network.vae import VaeEncoder
    from moebius.weights.load import load_vae

    sizes, place = sizes_of(preset), _device(device)
    drawn = replace(HOLES[masks], side=mask_side, most=HOLES[masks].most if mask_most is None else mask_most)
    crops = CropSettings() if crop is None else _crops(crop)
    options = EncodeOptions(
        count, masks_per_picture, shard_size, batch, cast(Dtype, dtype), bf16, sizes.student.num_categories, starts
    )
    pixels = size or sizes.student.sample_size * sizes.vae.downscale
    with _stream(data, pixels, scene_size, drawn, crops, seed, threads) as stream:
        network, weights = load_vae(vae, sizes.vae, console.err.print)
        if weights.stand_in:
            console.warn("the VAE has random test weights: use these latents for tests only")
        encoder = VaeEncoder(network.requires_grad_(False)).to(place)
        # Saves a third of the time on a CPU. torch's stubs lack the argument.
        encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        columns = (
            TextColumn("pictures"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console.err) as bars:
            bar = bars.add_task("", total=count)
            index = encode_samples(
                stream,
                Autoencoder(encoder, sizes.vae, weights.sha256, weights.stand_in),
                out,
                options,
                lambda pictures: bars.update(bar, completed=pictures),
            )
    left_out = f", {index.position.skipped} pictures skipped" if index.position.skipped else ""
    megabytes = sum(shard.size for shard in index.shards) / 1e6
    samples = index.encoding.count * index.encoding.masks_per_picture
    console.out.print(f"{out}: {samples} samples of {count} pictures, {megabytes:.1f} MB{left_out}")


def _stream(
    data: list[str],
    size: int,
    scene_size: int | None,
    masks: MaskSettings,
    crops: CropSettings,
    seed: int,
    threads: int,
) -> Any:
    from moebius.data.datasets import SampleStream
    from moebius.distill.loop.assembly import joined
    from moebius.distill.settings import DataSettings

    settings = DataSettings(
        pictures=tuple(weighted(text) for text in data), scene_size=scene_size, masks=masks, crops=crops
    )
    return SampleStream(
        joined(settings, size),
        size,
        masks=settings.masks,
        crops=settings.crops,
        seed=seed,
        threads=threads,
        on_skip=lambda name, reason: console.warn(f"skipped {name}: {reason}"),
    )


def _crops(text: str) -> CropSettings:
    """Parses `LEAST:MOST`.

    Raises:
        DataError: not two numbers, or out of range.
    """
    from moebius.data.pictures import CropSettings

    try:
        least, most = (float(part) for part in text.split(":"))
    except ValueError:
        raise DataError(f"--crop {text}: expected LEAST:MOST, such as 0.5:0.65") from None
    return CropSettings(least=least, most=most)


def weighted(text: str) -> Pictures:
    """Parses `SOURCE` or `SOURCE@N` (N times per epoch). A path that itself ends in `@N` is written `PATH@1`."""
    from moebius.distill.settings import Pictures

    if match := _WEIGHTED.fullmatch(text):
        return Pictures(source=match[1], times=int(match[2]))
    return Pictures(source=text)


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(
            f"--device {name}: {str(error).splitlines()[0]}; expected cpu, or a device that there is"
        ) from error
    if device.type == "meta":
        raise DataError("--device meta: it holds no numbers; expected cpu, or a device that there is")
    return device
