"""Encodes a stream of samples to latents on disk, so that training does not run the VAE.

After an interruption the same call continues from the last complete shard and writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save
from torch import Tensor

from moebius.data import shards
from moebius.data.datasets import Sample, SampleStream, collate
from moebius.data.masks import Mask, training_mask
from moebius.data.shards import INDEX, MAX_SHARDS, PROGRESS, Dtype, Encoding, Index, Position, Shard, shard_name
from moebius.data.sources import digest
from moebius.errors import DataError
from moebius.network.config import VaeConfig
from moebius.network.vae import VaeEncoder
from moebius_runtime.regions.smooth_fill import fill_pixels


@dataclass(frozen=True)
class EncodeOptions:
    """How samples are encoded.

    Attributes:
        count: pictures to take from the stream.
        masks_per_picture: masks of each picture. The first is the sample's; the others are drawn as the stream's. A
            picture that came with its mask repeats it.
        shard_size: pictures per file.
        batch: pictures in one pass of the encoder.
        dtype: dtype of the stored latents.
        bf16: the encoder computes in bfloat16 (autocast).
        num_categories: categories of the network to be trained.
        starts: also encode each picture with smooth values under the mask, from which mode `best` of the runtime
            starts (`moebius_runtime.regions.smooth_fill.fill_pixels`). One more pass per mask.
    """

    count: int
    masks_per_picture: int = 1
    shard_size: int = 256
    batch: int = 8
    dtype: Dtype = "float16"
    bf16: bool = False
    num_categories: int = 20
    starts: bool = False

    def __post_init__(self) -> None:
        if min(self.count, self.masks_per_picture, self.shard_size, self.batch) < 1:
            raise DataError(
                f"encoding with count={self.count}, masks_per_picture={self.masks_per_picture}, "
                f"shard_size={self.shard_size}, batch={self.batch}: expected 1 or more of each"
            )
        if self.dtype not in ("float16", "float32"):
            raise DataError(f"latents in {self.dtype}: expected float16 or float32")
        if self.count > MAX_SHARDS * self.shard_size:
            raise DataError(
                f"{self.count} pictures in shards of {self.shard_size} are over {MAX_SHARDS} files; give larger shards"
            )


@dataclass(frozen=True)
class Autoencoder:
    """An encoder, its sizes, and the SHA-256 of its weights."""

    encoder: VaeEncoder
    config: VaeConfig
    sha256: str
    stand_in: bool = False


def encode_samples(
    stream: SampleStream,
    vae: Autoencoder,
    out: str | Path,
    options: EncodeOptions,
    on_progress: Callable[[int], None] = lambda pictures: None,
) -> Index:
    """Encodes the first samples of a stream to a folder (`moebius.data.shards`), or continues an unfinished encoding.

    Args:
        stream: at its start, of one process. Afterwards it stands after the last encoded sample.
        vae: on the device that computes.
        out: a folder that is new, empty, or holds the same encoding, finished or not.
        on_progress: called with the number of encoded pictures, including those of an earlier run.

    Raises:
        DataError: the folder holds other files or another encoding, a file cannot be written, the stream is not at
            its start or ends early, sizes do not fit, or latents are not finite.
    """
    folder = Path(out)
    wanted = _encoding(stream, vae, options)
    done = _begin(folder, wanted, stream)
    stream.load_state_dict(done.position.model_dump())
    written, before = list(done.shards), len(done.shards) * wanted.shard_size
    on_progress(min(before, wanted.count))
    for number in range(len(written), wanted.shards):
        tensors = _shard(stream, vae, options, wanted, number, on_progress)
        if fault := shards.value_fault(tensors, wanted.num_categories):
            advice = "; store float32, or leave bf16 off" if wanted.dtype == "float16" or wanted.bf16 else ""
            raise DataError(f"encoding gave shard {number} in which {fault}; check the VAE{advice}")
        data = save(tensors)
        shards.write_whole(folder / shard_name(number), data)
        written.append(Shard(size=len(data), sha256=sha256(data).hexdigest()))
        done = Index(encoding=wanted, shards=written, position=_position(stream))
        shards.write_index(done, folder, PROGRESS)
    if not (folder / INDEX).exists():
        shards.write_index(done, folder)
    (folder / PROGRESS).unlink(missing_ok=True)
    return done


def _encoding(stream: SampleStream, vae: Autoencoder, options: EncodeOptions) -> Encoding:
    """The requested encoding, as `index.json` records it."""
    position = stream.state_dict()
    if position["world"] != 1 or (position["epoch"], position["number"]) != (0, 0):
        raise DataError(f"a stream at {position}: expected one at its start, of one process")
    step = vae.config.downscale
    if stream.size % step:
        raise DataError(f"pictures of {stream.size} pixels: expected a multiple of {step}, as the VAE halves")
    return Encoding(
        **asdict(options),
        picture_size=stream.size,
        latent_size=stream.size // step,
        latent_channels=vae.config.latent_channels,
        downscale=step,
        scaling_factor=vae.encoder.scaling_factor,
        vae_sha256=vae.sha256,
        vae_stand_in=vae.stand_in,
        source=stream.source.fingerprint(),
        drawing=digest([stream.masks.drawing(), repr(sorted(asdict(stream.crops).items()))]),
        seed=stream.seed,
    )


def _begin(folder: Path, wanted: Encoding, stream: SampleStream) -> Index:
    """Reads and checks what is already encoded; a new folder gets an empty progress file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise DataError(f"cannot use {folder}: {error.strerror}; choose another folder") from error
    found = next((name for name in (INDEX, PROGRESS) if name in names), None)
    if found is None:
        if others := sorted(name for name in names if not _is_leftover(name)):
            raise DataError(f"{folder} holds other files ({others[0]}, ...); choose a new or an empty folder")
        begun = Index(encoding=wanted, shards=[], position=_position(stream))
        shards.write_index(begun, folder, PROGRESS)
    else:
        begun = shards.read_index(folder, found)
        if other := shards.differences(wanted, begun.encoding):
            raise DataError(
                f"{folder} holds an encoding with {'; '.join(other)}; use the same settings, or another folder"
            )
        for number in range(len(begun.shards)):
            shards.check_shard(folder, begun, number)
    for name in names:
        if _is_leftover(name):
            (folder / name).unlink(missing_ok=True)
    return begun


def _is_leftover(name: str) -> bool:
    """Whether a file is a temporary file that a killed run left."""
    return name.endswith(".part") and name.startswith((".shard-", f".{INDEX}.", f".{PROGRESS}."))


def _position(stream: SampleStream) -> Position:
    return Position.model_validate(stream.state_dict())


def _shard(
    stream: SampleStream,
    vae: Autoencoder,
    options: EncodeOptions,
    wanted: Encoding,
    number: int,
    on_progress: Callable[[int], None],
) -> dict[str, Tensor]:
    """Encodes one shard. No pass spans two shards, so a shard is the same wherever a run started."""
    shapes, pictures = wanted.shapes(number), wanted.pictures(number)
    parts: dict[str, list[Tensor]] = {name: [] for name in shapes}
    for first in range(0, pictures, options.batch):
        samples: list[Sample] = []
        for _ in range(min(options.batch, pictures - first)):
            sample = next(stream, None)
            if sample is None:
                at = number * wanted.shard_size + first + len(samples)
                raise DataError(f"the data ended after {at} pictures; give more, or encode {at} at most")
            samples.append(sample)
        for name, part in _encode(samples, stream, vae, options).items():
            parts[name].append(part.to(shapes[name][1]))
        on_progress(number * wanted.shard_size + first + len(samples))
    return {name: torch.cat(held).contiguous() for name, held in parts.items()}  # may be channels-last


@torch.no_grad()
def _encode(samples: list[Sample], stream: SampleStream, vae: Autoencoder, options: EncodeOptions) -> dict[str, Tensor]:
    """Encodes samples in one pass for the pictures and one per mask. Results on the CPU, latents in float32."""
    batch = collate(samples, options.num_categories)
    device = next(vae.encoder.parameters()).device
    computing: AbstractContextManager[object] = nullcontext()
    if options.bf16:
        computing = torch.autocast(device.type, torch.bfloat16)
    image = batch.image.to(device)  # [B, 3, H, H]
    masks = np.stack([_masks(sample, stream, options.masks_per_picture) for sample in samples])
    mask = torch.from_numpy(masks)[:, :, None].to(device)  # bool [B, K, 1, H, H]
    with computing:
        latents = vae.encoder(image)
        masked = [vae.encoder(image * ~mask[:, index]) for index in range(options.masks_per_picture)]
        columns = masks.transpose(1, 0, 2, 3) if options.starts else ()  # [K, B, H, H]
        filled = [vae.encoder(_filled(samples, column).to(device)) for column in columns]
    step = vae.config.downscale
    return {
        "latents": latents.float().cpu(),
        "masked_latents": torch.stack(masked, dim=1).float().cpu(),
        "mask": mask[..., ::step, ::step].cpu(),  # the top-left pixel of each block, as the pipeline does
        "categories": batch.categories,
        **({"start_latents": torch.stack(filled, dim=1).float().cpu()} if filled else {}),
    }


def _filled(samples: list[Sample], masks: npt.NDArray[np.bool_]) -> Tensor:
    """The pictures with smooth values under masks [B, H, H]: [B, 3, H, H] in [-1, 1]."""
    pixels = [fill_pixels(sample.image, mask) for sample, mask in zip(samples, masks, strict=True)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


def _masks(sample: Sample, stream: SampleStream, count: int) -> list[Mask]:
    """The sample's mask, and `count` - 1 more: drawn ones, or repetitions if the picture came with its mask."""
    if sample.own_mask:
        return [sample.mask] * count
    rng = np.random.Generator(np.random.PCG64([stream.seed, sample.epoch, 4, sample.number]))
    return [sample.mask, *(training_mask(rng, stream.size, stream.masks) for _ in range(count - 1))]
