"""ONNX models whose weights lie in one shared file beside them.

Tensors with the same bytes are stored once, so the guided and the conditional U-Net share one set of weights. A tensor
that is an entry along the first axis of a stored one (the keys of one branch, of both branches) is not stored again.
Offsets are multiples of a page, which lets a runtime map the file instead of reading it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import onnx

from moebius_runtime.files import atomic_write

_PAGE = 4096
_MOST_ENTRIES = 4  # of a first axis whose entries are remembered
_INLINE_BYTES = 1024  # smaller tensors stay in the model, where shape inference sees them


class WeightsFile:
    """An open weights file: `add` moves a model's larger tensors into it."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        self.name = name
        self._stream = stream
        self._position = 0
        self._placed: dict[tuple[bytes, int], int] = {}  # (hash, length) -> offset

    def add(self, model: onnx.ModelProto) -> None:
        """Appends the model's tensors that are not there yet; the model then only refers to them."""
        for tensor in model.graph.initializer:
            data = _raw(tensor)
            if len(data) <= _INLINE_BYTES:
                continue
            key = (hashlib.sha256(data).digest(), len(data))
            if key not in self._placed:
                padding = -self._position % _PAGE
                self._stream.write(b"\0" * padding)
                self._placed[key] = self._position + padding
                self._remember_entries(tensor.dims, data)
                self._position += padding + self._stream.write(data)
            refer(tensor, self.name, self._placed[key], len(data))

    def _remember_entries(self, dims: Sequence[int], data: bytes) -> None:
        """Remembers the offset of each entry of the first axis; called before the position moves on."""
        start = self._position + -self._position % _PAGE
        if not 2 <= (dims[0] if dims else 0) <= _MOST_ENTRIES or len(data) // dims[0] % _PAGE:
            return
        length = len(data) // dims[0]
        for index in range(dims[0]):
            entry = data[index * length : (index + 1) * length]
            self._placed.setdefault((hashlib.sha256(entry).digest(), length), start + index * length)


@contextmanager
def weights_file(folder: Path, name: str) -> Iterator[WeightsFile]:
    """A `WeightsFile` that appears at `folder/name` when the block ends well."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / name) as stream:
        yield WeightsFile(stream, name)


def _raw(tensor: onnx.TensorProto) -> bytes:
    """The tensor's little-endian bytes, whichever field of the protocol buffer they are in."""
    if not tensor.HasField("raw_data"):
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return bytes(tensor.raw_data)


def refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Makes a tensor, in place, name `length` bytes at `offset` of the file `location` as its values."""
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
