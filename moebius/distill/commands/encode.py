"""`moebius-distill encode`: the command. Heavy imports sit inside, so that `--help` is quick."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moebius.errors import DataError
from moebius_runtime import console

if TYPE_CHECKING:
    from moebius.distill.settings import Pictures

_WEIGHTED = re.compile(r"(.+)@([1-9][0-9]{0,5})", re.DOTALL)


def encode_command(
    data: Annotated[
        list[str],
        typer.Argument(
            help="scenes:COUNT\\[:SEED], photographs, a folder, a .jsonl or a .tar; several are joined. TEXT@N takes "
            "each picture N times in an epoch."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder of the latents; a run that was stopped goes on.")],
    vae: Annotated[str, typer.Option(help="The autoencoder's weights: hub:OWNER/REPO/FOLDER, a file or a folder.")],
    count: Annotated[int, typer.Option(min=1, help="Pictures to encode.")],
    preset: Annotated[str, typer.Option(help="Sizes of the networks: full, small or tiny.")] = "full",
    size: Annotated[
        int | None, typer.Option(min=16, help="Pixels of a side. Default: what the student's latents ask for.")
    ] = None,
    scene_size: Annotated[
        int | None, typer.Option(min=16, help="Pixels at which scenes are drawn, before the crop. Default: --size.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of order, crops and masks.")] = 0,
    holes: Annotated[str, typer.Option(help="training (the paper's) or small.")] = "training",
    masks_per_picture: Annotated[int, typer.Option(min=1, help="Holes of each picture; its latent is kept once.")] = 1,
    dtype: Annotated[str, typer.Option(help="Of the latents in the files: float16 or float32.")] = "float16",
    bf16: Annotated[bool, typer.Option("--bf16", help="Let the encoder compute in bfloat16.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in one pass of the encoder.")] = 8,
    shard_size: Annotated[int, typer.Option(min=1, help="Pictures of a file.")] = 256,
    threads: Annotated[int, typer.Option(min=0, help="That draw and decode ahead.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: cuda if there is one.")] = None,
) -> None:
    """Encodes pictures and their holes to latents once, so that training does not pay for the VAE in every epoch.

    Stopped at any moment, the same command goes on.
    """
    from moebius.data.masks import HOLES

    if holes not in HOLES:
        raise DataError(f"--holes {holes}: expected {' or '.join(HOLES)}")
    if dtype not in ("float16", "float32"):
        raise DataError(f"--dtype {dtype}: expected float16 or float32")
    import torch

    from moebius.data.encoding import Autoencoder, EncodeOptions, encode_samples
    from moebius.data.shards import Dtype
    from moebius.network.config import preset as sizes_of
    from moebius.network.vae import VaeEncoder
    from moebius.weights.load import load_vae

    sizes, place = sizes_of(preset), _device(device)
    options = EncodeOptions(
        count, masks_per_picture, shard_size, batch, cast(Dtype, dtype), bf16, sizes.student.num_categories
    )
    pixels = size or sizes.student.sample_size * sizes.vae.downscale
    with _stream(data, pixels, scene_size, holes, seed, threads) as stream:
        network, weights = load_vae(vae, sizes.vae, console.err.print)
        if weights.stand_in:
            console.warn("the VAE's weights are random stand-ins: these latents are good for tests only")
        encoder = VaeEncoder(network.requires_grad_(False)).to(place)
        # A third less time on a CPU. torch's stubs do not know the argument.
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
    left_out = f", {index.position.skipped} pictures left out" if index.position.skipped else ""
    megabytes = sum(shard.size for shard in index.shards) / 1e6
    samples = index.encoding.count * index.encoding.masks_per_picture
    console.out.print(f"{out}: {samples} samples of {count} pictures, {megabytes:.1f} MB{left_out}")


def _stream(data: list[str], size: int, scene_size: int | None, holes: str, seed: int, threads: int) -> Any:
    from moebius.data.datasets import SampleStream
    from moebius.data.masks import HOLES
    from moebius.distill.loop.assembly import joined
    from moebius.distill.settings import DataSettings

    settings = DataSettings(pictures=tuple(weighted(text) for text in data), scene_size=scene_size, masks=HOLES[holes])
    return SampleStream(
        joined(settings, size),
        size,
        masks=settings.masks,
        crops=settings.crops,
        seed=seed,
        threads=threads,
        on_skip=lambda name, reason: console.warn(f"left out {name}: {reason}"),
    )


def weighted(text: str) -> Pictures:
    """`TEXT` or `TEXT@N`: a source, N times within an epoch. A path that ends in `@N` itself is written `PATH@1`."""
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
