"""Weights cut into shards: files of bounded size, named by their SHA-256, which a browser keeps one by one.

The tensors of a weights file are packed into volumes, which the ONNX files name as their external data. A volume is one
shard, or several where one tensor is larger than a shard. Graphs that share weights share the shards too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx

from moebius_export.errors import ExportError
from moebius_export.graph.weights_file import refer

SHARD_BYTES = 64_000_000


@dataclass(frozen=True)
class Shard:
    """A file of the site, named by the SHA-256 of its content."""

    sha256: str
    size: int

    @property
    def name(self) -> str:
        """Its path in the site."""
        return f"shards/{self.sha256}.bin"


@dataclass(frozen=True)
class Volume:
    """A range of bytes of a weights file, from `start` to before `end`; `name` is what ONNX files call it."""

    name: str
    start: int
    end: int


def volumes_of(models: Iterable[onnx.ModelProto], stem: str, limit: int = SHARD_BYTES) -> list[Volume]:
    """Returns the volumes that hold every stored tensor of models with one weights file, each tensor in one piece.

    Args:
        models: their weights are not read.
        stem: beginning of the volumes' names.
        limit: bytes of a volume, unless one tensor is larger. Tensors that overlap count as one.
    """
    ranges = sorted({(start, start + length) for model in models for _, start, length in stored(model)})
    blocks: list[list[int]] = []
    for start, end in ranges:
        if blocks and start < blocks[-1][1]:
            blocks[-1][1] = max(blocks[-1][1], end)
        else:
            blocks.append([start, end])
    packed: list[list[int]] = []
    for start, end in blocks:
        if packed and end - packed[-1][0] <= limit:
            packed[-1][1] = end
        else:
            packed.append([start, end])
    return [Volume(f"{stem}-{index}.bin", start, end) for index, (start, end) in enumerate(packed)]


def refer_to(model: onnx.ModelProto, volumes: list[Volume]) -> list[Volume]:
    """Makes a model's stored tensors refer to the volumes, in place; returns the volumes that it uses.

    Raises:
        ExportError: a tensor lies in no volume.
    """
    used = []
    for tensor, start, length in list(stored(model)):
        volume = next((one for one in volumes if one.start <= start and start + length <= one.end), None)
        if volume is None:
            raise ExportError(f"tensor {tensor.name} lies in no volume of its weights file")
        refer(tensor, volume.name, start - volume.start, length)
        used.append(volume)
    return [volume for volume in volumes if volume in used]


def stored(model: onnx.ModelProto) -> Iterator[tuple[onnx.TensorProto, int, int]]:
    """Each initializer in another file, with its offset and length in bytes."""
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            yield tensor, int(place.get("offset", 0)), int(place["length"])


def write_shards(content: Iterable[bytes], site: Path, limit: int = SHARD_BYTES) -> list[Shard]:
    """Writes content as shards of at most `limit` bytes into a site that is being built; returns them in order.

    Args:
        content: in pieces of any size.
        site: the folder; equal shards are written once.
        limit: bytes of a shard.
    """
    (site / "shards").mkdir(exist_ok=True)
    shards: list[Shard] = []
    waiting = bytearray()

    def flush() -> None:
        data = bytes(waiting[:limit])
        del waiting[:limit]
        shard = Shard(hashlib.sha256(data).hexdigest(), len(data))
        (site / shard.name).write_bytes(data)
        shards.append(shard)

    for piece in content:
        waiting += piece
        while len(waiting) > limit:
            flush()
    if waiting:
        flush()
    return shards


def volume_bytes(path: Path, volume: Volume) -> Iterator[bytes]:
    """The content of a volume in pieces."""
    with path.open("rb") as stream:
        stream.seek(volume.start)
        left = volume.end - volume.start
        while left:
            piece = stream.read(min(left, 4 << 20))
            if not piece:
                raise ExportError(f"{path} ends before tensor data that its models name; export the bundle again")
            left -= len(piece)
            yield piece
