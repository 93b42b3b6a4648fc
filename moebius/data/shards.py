"""The folder of encoded samples: its files and their checks.

    LATENTS/
      shard-00000.safetensors ...  latents [P, 4, S, S], masked_latents [P, K, 4, S, S], mask [P, K, 1, S, S],
                                   categories [P, m]: P pictures, each with K masks; with `starts`, also
                                   start_latents [P, K, 4, S, S]
      index.json                   the `Encoding`, and each shard's size and SHA-256; written last
      progress.json                the same for an unfinished encoding, and its position in the data

Latents are float16 or float32 and scaled, masks uint8 of 0 and 1 (1 in the masked region), categories int64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import Field, ValidationError
from safetensors.torch import load_file
from torch import Tensor

from moebius.data.sources import digest
from moebius.errors import DataError
from moebius_runtime.bundle.checked import first_problem
from moebius_runtime.bundle.json_files import Sha256, StrictModel
from moebius_runtime.errors import OutputError
from moebius_runtime.files import atomic_write, open_plain, sha256_file

INDEX, PROGRESS = "index.json", "progress.json"
SCHEMA_VERSION: Literal[1] = 1
MAX_SHARDS = 100_000
_MAX_INDEX_BYTES = 64 << 20
_DTYPES = {"float16": torch.float16, "float32": torch.float32}

Dtype = Literal["float16", "float32"]
_Small = Annotated[int, Field(ge=1, le=1 << 16)]
_Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


class Encoding(StrictModel):
    """Content and settings of a folder of latents: all that its bytes depend on, except machine and libraries.

    Attributes:
        count: pictures, each with `masks_per_picture` masks.
        shard_size: pictures of a shard; the last one may have fewer.
        batch: pictures of one pass of the encoder, whose last digits may depend on it.
        picture_size, latent_size: pixels of a side.
        downscale: picture pixels per latent pixel.
        bf16: whether the encoder ran under bfloat16 autocast.
        vae_sha256, vae_stand_in: of its weights; whether they are random ones for tests.
        source: fingerprint of the pictures.
        drawing: fingerprint of the settings of masks and crops.
        starts: whether latents of the picture with smooth values under the mask are stored.
    """

    count: Annotated[int, Field(ge=1, le=1 << 40)]
    masks_per_picture: Annotated[int, Field(ge=1, le=1024)]
    shard_size: _Small
    batch: _Small
    picture_size: _Small
    latent_size: _Small
    latent_channels: _Small
    downscale: _Small
    scaling_factor: Annotated[float, Field(gt=0)]
    dtype: Dtype
    bf16: bool
    num_categories: Annotated[int, Field(ge=2, le=1 << 16, multiple_of=2)]
    vae_sha256: Sha256
    vae_stand_in: bool
    source: _Hex
    drawing: _Hex
    seed: Annotated[int, Field(ge=0)]
    starts: bool = False

    @property
    def shards(self) -> int:
        """Number of shards of the finished encoding."""
        return -(-self.count // self.shard_size)

    def pictures(self, shard: int) -> int:
        """Number of pictures in a shard."""
        return min(self.shard_size, self.count - shard * self.shard_size)

    def shapes(self, shard: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, dtype) of the tensors of a shard."""
        pictures, masks, channels = self.pictures(shard), self.masks_per_picture, self.latent_channels
        side, kind = self.latent_size, _DTYPES[self.dtype]
        starts = {"start_latents": ((pictures, masks, channels, side, side), kind)} if self.starts else {}
        return {
            "latents": ((pictures, channels, side, side), kind),
            "masked_latents": ((pictures, masks, channels, side, side), kind),
            "mask": ((pictures, masks, 1, side, side), torch.uint8),
            "categories": ((pictures, self.num_categories // 2), torch.int64),
            **starts,
        }


class Shard(StrictModel):
    """Bytes and SHA-256 of a shard."""

    size: Annotated[int, Field(ge=1)]
    sha256: Sha256


class Position(StrictModel):
    """`SampleStream.state_dict()`."""

    epoch: Annotated[int, Field(ge=0)]
    number: Annotated[int, Field(ge=0)]
    skipped: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    world: Literal[1]
    source: _Hex


class Index(StrictModel):
    """`index.json` and `progress.json`: in the latter, `shards` are those that are written."""

    schema_version: Literal[1] = SCHEMA_VERSION
    encoding: Encoding
    shards: Annotated[list[Shard], Field(max_length=MAX_SHARDS)]
    position: Position

    def fingerprint(self) -> str:
        """Identifies the content; the same for a copy of the folder."""
        encoding = self.encoding
        described = encoding.model_dump_json(exclude=None if encoding.starts else {"starts"})  # as before `starts`
        return digest(["latents", described, *(shard.sha256 for shard in self.shards)])


def shard_name(number: int) -> str:
    """File name of a shard, counted from 0."""
    return f"shard-{number:05d}.safetensors"


def read_index(folder: Path, name: str = INDEX) -> Index:
    """Reads and checks `index.json` or `progress.json`.

    Raises:
        DataError: the file is missing, damaged, incomplete, or of another version.
    """
    path = folder / name
    try:
        with open_plain(path) as stream:
            data = stream.read(_MAX_INDEX_BYTES + 1)
    except OSError as error:
        advice = "expected a folder that `moebius-distill encode` wrote"
        if name == INDEX and (folder / PROGRESS).exists():
            advice = "the encoding is not finished; run the same `moebius-distill encode` again"
        raise DataError(f"{path}: {error.strerror}; {advice}") from error
    if len(data) > _MAX_INDEX_BYTES:
        raise DataError(f"{path}: over {_MAX_INDEX_BYTES >> 20} MiB, so it is none of ours; encode again")
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({str(error)[:80]}); encode or copy it again") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise DataError(
            f"{path}: schema version {str(version)[:20]}, expected {SCHEMA_VERSION}; encode again with this version"
        )
    try:
        index = Index.model_validate_json(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {first_problem(error)}; encode or copy it again") from error
    found, expected = len(index.shards), index.encoding.shards
    if found > expected or (name == INDEX and found < expected):
        raise DataError(f"{path}: {found} shards, expected {expected}; encode or copy it again")
    return index


def write_index(index: Index, folder: Path, name: str = INDEX) -> None:
    """Writes `index.json` or `progress.json` atomically. Raises `DataError` if that fails."""
    write_whole(folder / name, (index.model_dump_json(indent=1) + "\n").encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file atomically. Raises `DataError` if that fails."""
    try:
        with atomic_write(path) as stream:
            stream.write(data)
    except OutputError as error:
        raise DataError(str(error)) from error


def check_shard(folder: Path, index: Index, number: int, *, content: bool = True) -> Path:
    """Checks a shard's size, and with `content` its SHA-256, against the index; returns its path.

    Raises:
        DataError: it is missing, lies outside the folder, or differs from the index.
    """
    path, expected = folder / shard_name(number), index.shards[number]
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            raise DataError(f"{path} is a link that leaves the folder; put the file itself there")
        size = path.stat().st_size
        if size != expected.size:
            raise DataError(f"{path}: {size} bytes, expected {expected.size} by the index; encode or copy it again")
        found = sha256_file(path) if content else expected.sha256
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: {reason}; the index lists this file, encode or copy it again") from error
    if found != expected.sha256:
        raise DataError(f"{path}: its SHA-256 is not the index's; encode or copy it again")
    return path


def load_shard(folder: Path, index: Index, number: int) -> dict[str, Tensor]:
    """Loads a shard in the stored dtypes and checks file, names, shapes, dtypes and values.

    Raises:
        DataError: as `check_shard`, or the tensors differ from the index.
    """
    path = check_shard(folder, index, number)
    try:
        tensors = load_file(path)
    except Exception as error:  # SafetensorError, and what torch raises for a header that it cannot honour
        raise DataError(f"{path}: not a safetensors file ({error}); encode or copy it again") from error
    expected = index.encoding.shapes(number)
    found = {name: (tuple(value.shape), value.dtype) for name, value in tensors.items()}
    if found != expected:
        differing = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
        raise DataError(
            f"{path}: {', '.join(f'{name[:40]} {_described(found.get(name))}' for name in differing[:4])}; expected "
            f"{', '.join(f'{name[:40]} {_described(expected.get(name))}' for name in differing[:4])}"
        )
    if fault := value_fault(tensors, index.encoding.num_categories):
        raise DataError(f"{path}: {fault}; encode again")
    return tensors


def value_fault(tensors: dict[str, Tensor], num_categories: int) -> str | None:
    """Describes invalid values in a shard; None if all are valid."""
    for name in ("latents", "masked_latents", "start_latents"):
        if name in tensors and not bool(torch.isfinite(tensors[name]).all()):
            return f"{name} holds NaN or infinite numbers"
    if int(tensors["mask"].max()) > 1:
        return "mask holds other numbers than 0 and 1"
    categories = tensors["categories"]
    if int(categories.min()) < 0 or int(categories.max()) >= num_categories:
        return f"categories holds ids outside 0 to {num_categories - 1}"
    return None


def _described(what: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "is not there" if what is None else f"{list(what[0])} {str(what[1]).removeprefix('torch.')}"


_Model = TypeVar("_Model", bound=StrictModel)


def differences(ours: _Model, theirs: _Model) -> list[str]:
    """Lists the fields in which two models differ, as `NAME = THEIRS (now OURS)`."""
    now: dict[str, Any] = ours.model_dump()
    return [f"{name} = {value} (now {now[name]})" for name, value in theirs.model_dump().items() if value != now[name]]
