"""The files that an ONNX model refers to, its functions and its size, read without the `onnx` package.

A tensor may name any file as the location of its weights. ONNX Runtime 1.31 refuses files outside of the model's
folder, but 1.23, the last version for Python 3.10, reads every file: a hostile model could reveal any file's content in
its output. Therefore this module parses the protocol buffer before a runtime opens the model.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from moebius_runtime.files import open_plain

_MAX_DEPTH = 100  # protobuf's own limit
_VARINT, _BYTES = 0, 2  # wire types
_FIXED_LENGTHS = {1: 8, 5: 4}  # of the other two, in bytes

_FUNCTION, _DOMAIN = 25, 10  # fields of a model and of a function

# The messages of onnx.proto that can lead to a tensor, {field number: type}; everything else is skipped.
_MESSAGES: dict[str, dict[int, str]] = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Function": {7: "Node", 11: "Attribute"},
    "Node": {5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}


def external_files(path: str | Path) -> set[str]:
    """The `location` of every tensor of an ONNX model that is stored in another file, as written in the model.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not a protocol buffer, or has constructs that no ONNX model has.
    """
    with open_plain(path) as stream:
        if not stream.seek(0, 2):
            raise ValueError("it is empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return set(_locations(content, 0, len(content), "Model", 0))


def function_domains(path: str | Path) -> set[str]:
    """The domains of the model's own functions; errors as `external_files`."""
    domains = set()
    with open_plain(path) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for field, start, end in _fields(content, 0, len(content)):
            if field == _FUNCTION:
                domains |= {content[a:b].decode() for part, a, b in _fields(content, start, end) if part == _DOMAIN}
    return domains


def tensor_bytes(path: str | Path) -> int:
    """Bytes of a model's tensors, including those in its weights file; shared bytes count once.

    Attributes' tensors and tensors of functions count as well. Errors as `external_files`.
    """
    shared: dict[tuple[bytes, bytes], int] = {}
    with open_plain(path) as stream:
        if not stream.seek(0, 2):
            raise ValueError("it is empty")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            inside = sum(_held(content, first, last, shared) for first, last in _tensors(content))
    return inside + sum(shared.values())


# Fields of a tensor that hold its values: packed numbers (as many bytes as they are stored in), strings, raw bytes.
_VALUES = frozenset({4, 5, 6, 7, 9, 10, 11})


def _tensors(data: mmap.mmap) -> Iterator[tuple[int, int]]:
    """(start, end) of every tensor."""
    waiting = [(0, len(data), "Model", 0)]
    while waiting:
        start, end, kind, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            raise ValueError("its messages are nested too deeply")
        if kind == "Tensor":
            yield start, end
            continue
        known = _MESSAGES[kind]
        waiting += [(a, b, known[field], depth + 1) for field, a, b in _fields(data, start, end) if field in known]


def _held(data: mmap.mmap, start: int, end: int, shared: dict[tuple[bytes, bytes], int]) -> int:
    """Bytes of a tensor's values in the model; those in another file are noted in `shared` by place."""
    inside, outside = 0, {}
    for field, first, last in _fields(data, start, end):
        if field in _VALUES:
            inside += last - first
        elif field == 13:
            entry = {part: data[a:b] for part, a, b in _fields(data, first, last)}
            outside[entry.get(1, b"")] = entry.get(2, b"")
    if b"length" in outside:
        if not outside[b"length"].isdigit() or len(outside[b"length"]) > 15:
            raise ValueError("the length of a tensor's values is no number")
        shared[outside.get(b"location", b""), outside.get(b"offset", b"0")] = int(outside[b"length"])
    return inside


def _locations(data: mmap.mmap, start: int, end: int, kind: str, depth: int) -> Iterator[str]:
    if depth > _MAX_DEPTH:
        raise ValueError("its messages are nested too deeply")
    if kind == "Entry":
        yield from _entry(data, start, end)
        return
    known = _MESSAGES[kind]
    for field, first, last in _fields(data, start, end):
        if field in known:
            yield from _locations(data, first, last, known[field], depth + 1)


def _entry(data: mmap.mmap, start: int, end: int) -> Iterator[str]:
    """The values of a (key, value) pair whose key is "location". Fields may repeat: all of them count."""
    fields = [(field, data[first:last]) for field, first, last in _fields(data, start, end)]
    if (1, b"location") in fields:
        yield from (value.decode("utf-8") for field, value in fields if field == 2)


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each length-delimited field of a message."""
    position = start
    while position < end:
        tag, position = _varint(data, position, end)
        if tag >> 32:  # some parsers would cut it to another field's
            raise ValueError("a field's number is out of range")
        wire = tag & 7
        length = _FIXED_LENGTHS.get(wire, 0)
        if wire in (_VARINT, _BYTES):
            number, position = _varint(data, position, end)
            length = number if wire == _BYTES else 0
        elif not length:
            raise ValueError(f"wire type {wire} is not used by ONNX")
        if position + length > end:
            raise ValueError("a field reaches beyond the end of its message")
        if wire == _BYTES:
            yield tag >> 3, position, position + length
        position += length


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """A variable-length integer and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number reaches beyond the end of its message")
