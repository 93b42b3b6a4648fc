"""Streams WebDataset tars: consecutive members whose names agree up to the first dot of the last part form a sample.

`KEY.jpg` (or another picture suffix) is the picture. `KEY.mask.png`, its mask, and `KEY.json`, an object with `task`,
are optional; other members are ignored. Nothing is extracted: names are never opened. Compressed tars are
refused, because one can grow without bound while it is read.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from moebius.data.masks import Rng
from moebius.data.pictures import MAX_BYTES, SUFFIXES, BrokenPicture, decode, decode_mask
from moebius.data.sources import MAX_LINE, Entry, Item, Source, Task, digest, parse_task
from moebius.errors import DataError, one_line

_MASKS = tuple(f".mask{suffix}" for suffix in SUFFIXES)
_MAX_MEMBERS = 16  # of one sample that are kept


@dataclass
class _Group:
    """Members of one sample: suffix, from the first dot on, to bytes; or why the sample cannot be used."""

    key: str
    members: dict[str, bytes] = field(default_factory=dict)
    broken: str | None = None


class TarSource(Source):
    """Tar files in an order drawn for each epoch, with a shuffle buffer of samples.

    Resuming reads an epoch's tars again up to the saved position, without decoding the pictures.
    """

    def __init__(self, paths: Sequence[str | Path], buffer: int = 256) -> None:
        """Tars and folders, which stand for all `*.tar` in them. `buffer` samples, undecoded, are held in memory.

        Raises:
            DataError: no such file, a folder without tars, or `buffer` is under 1.
        """
        if buffer < 1:
            raise DataError(f"a shuffle buffer of {buffer} samples: expected 1 or more")
        self.buffer = buffer
        self.tars: list[Path] = []
        for path in map(Path, paths):
            found = sorted(path.glob("*.tar")) if path.is_dir() else [path]
            if not found or not all(tar.is_file() for tar in found):
                raise DataError(f"{path}: expected a tar file, or a folder that holds files named *.tar")
            self.tars += found
        if not self.tars:
            raise DataError("no tar given; name one or more, or folders that hold them")

    def entries(self, epoch: int, seed: int, start: int = 0) -> Iterator[Entry]:
        """See `Source.entries`."""
        rng = np.random.Generator(np.random.PCG64([seed, epoch, 2]))
        groups = (group for index in rng.permutation(len(self.tars)) for group in _groups(self.tars[index]))
        for number, group in enumerate(_shuffled(groups, self.buffer, rng)):
            if number >= start:
                yield _entry(group)

    def fingerprint(self) -> str:
        """Of the tars' names and sizes, and of the buffer, which the order depends on."""
        return digest(["tars", str(self.buffer), *(f"{tar.name}\0{tar.stat().st_size}" for tar in self.tars)])


def _shuffled(groups: Iterator[_Group], size: int, rng: Rng) -> Iterator[_Group]:
    """Shuffles a stream through a buffer of `size` samples."""
    held: list[_Group] = []
    for group in groups:
        if len(held) < size:
            held.append(group)
            continue
        index = int(rng.integers(size))
        held[index], group = group, held[index]
        yield group
    yield from (held[int(index)] for index in rng.permutation(len(held)))


def _groups(path: Path) -> Iterator[_Group]:
    """Yields the samples of a tar in order; if the tar is damaged, a last one that reports it."""
    group: _Group | None = None
    end = -1
    try:
        with tarfile.open(path, "r|") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else every header read is kept
                if tar.offset <= end:
                    raise tarfile.ReadError("its headers lead backwards")
                end = tar.offset
                if member.isdir():
                    continue
                key, suffix = _split(member.name)
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    group = _Group(key)
                _add(tar, member, suffix, group)
            _check_end(path, tar.offset)
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        if group is not None:
            yield group
        yield _Group(path.name, broken=f"{path.name} is not a whole, plain tar ({one_line(str(error))})")
        return
    if group is not None:
        yield group


def _check_end(path: Path, offset: int) -> None:
    """tarfile takes a damaged or half header for the end of a tar. The true end is a block of zeros."""
    with open(path, "rb") as stream:
        stream.seek(offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no header and no end at byte {offset}")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix: `a.b/0001.mask.png` gives `a.b/0001` and `.mask.png`."""
    folder, _, last = name.rpartition("/")
    stem, dot, rest = last.partition(".")
    return f"{folder}/{stem}" if folder else stem, (dot + rest).lower()


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, group: _Group) -> None:
    if not suffix.endswith(SUFFIXES) and suffix != ".json":
        return
    limit = MAX_LINE if suffix == ".json" else MAX_BYTES
    if not member.isreg() or member.issparse():  # a sparse one is as large as it claims to be
        group.broken = f"its member {suffix} is not a plain file"
    elif member.size > limit:
        group.broken = f"the {member.size} bytes of its member {suffix} are over {limit}"
    elif suffix in group.members or len(group.members) >= _MAX_MEMBERS:
        group.broken = f"its member {suffix} comes twice, or it has over {_MAX_MEMBERS} members"
    else:
        stream = tar.extractfile(member)
        data = stream.read() if stream else b""
        if len(data) != member.size:
            raise tarfile.ReadError("it breaks off")
        group.members[suffix] = data


def _entry(group: _Group) -> Entry:
    return Entry(PurePosixPath(one_line(group.key)).name[:200], lambda: _load(group))


def _load(group: _Group) -> Item:
    if group.broken:
        raise BrokenPicture(group.broken)
    pictures = [data for suffix, data in group.members.items() if suffix in SUFFIXES]
    masks = [data for suffix, data in group.members.items() if suffix in _MASKS]
    if len(pictures) != 1 or len(masks) > 1:
        raise BrokenPicture(f"{len(pictures)} pictures and {len(masks)} masks; expected one, and at most one")
    task = _task(group.members.get(".json"))
    if task == "foreground" and not masks:
        raise BrokenPicture("task foreground without a mask")
    image = decode(pictures[0])
    return Item(image, decode_mask(masks[0], image.size) if masks else None, task)


def _task(data: bytes | None) -> Task:
    """The task in a sample's JSON; other keys, such as captions, are ignored."""
    if data is None:
        return "background"
    try:
        value = json.loads(data.decode("utf-8"))
        return parse_task(value.get("task", "background") if isinstance(value, dict) else value, "its JSON")
    except (ValueError, RecursionError) as error:
        raise BrokenPicture(f"its JSON cannot be used ({error})") from error
