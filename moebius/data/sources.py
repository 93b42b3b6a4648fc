"""Sources of training pictures: folders, JSON lines, procedural scenes, and combinations of them.

A source lists the entries of each epoch in an order drawn from a seed. An entry is cheap: `load` reads the picture,
may run in another thread, and depends only on the entry.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from moebius.data.pictures import SUFFIXES, decode, decode_mask, read_file
from moebius.data.scenes import scene
from moebius.errors import DataError

Task = Literal["background", "foreground"]
TASKS: tuple[Task, ...] = ("background", "foreground")
MAX_LINE = 1 << 16
_KEYS = {"image", "mask", "task"}


@dataclass(frozen=True)
class Item:
    """A decoded picture (mode RGB), its mask if it has one (mode L, 255 in the masked region), and its task."""

    image: Image.Image
    mask: Image.Image | None = None
    task: Task = "background"


@dataclass(frozen=True)
class Entry:
    """A picture to load. `load` raises `BrokenPicture` if it cannot be used."""

    name: str
    load: Callable[[], Item]


class Source(ABC):
    """Entries in a seeded order, epoch by epoch."""

    @abstractmethod
    def entries(self, epoch: int, seed: int, start: int = 0) -> Iterator[Entry]:
        """Yields the entries of one epoch from number `start` on; deterministic in its arguments."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Identifies the source's content. A saved position is valid only for the same fingerprint."""


class IndexedSource(Source):
    """A source of known length with random access. Each epoch is a permutation of its entries."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def entry(self, index: int, epoch: int) -> Entry:
        """Entry number `index` of [0, len)."""

    def entries(self, epoch: int, seed: int, start: int = 0) -> Iterator[Entry]:
        """See `Source.entries`."""
        rng = np.random.Generator(np.random.PCG64([seed, epoch, 1]))
        return (self.entry(int(index), epoch) for index in rng.permutation(len(self))[start:])


def digest(texts: Iterable[str]) -> str:
    """First 16 hex digits of the SHA-256 over the texts, each prefixed by its length."""
    result = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        result.update(len(data).to_bytes(8, "little") + data)
    return result.hexdigest()[:16]


class FolderSource(IndexedSource):
    """All pictures in a folder and its subfolders, by suffix; all `background`, without masks."""

    def __init__(self, folder: str | Path) -> None:
        """Lists the folder; links to folders are not followed.

        Raises:
            DataError: no such folder, or no picture in it.
        """
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{folder} is not a folder; give one that holds pictures")
        names = []
        for parent, folders, files in os.walk(self.folder, onerror=_not_listed):
            folders.sort()
            below = Path(parent).relative_to(self.folder)
            names += [(below / name).as_posix() for name in files if name.lower().endswith(SUFFIXES)]
        self.names = sorted(names)
        if not self.names:
            raise DataError(f"{folder} holds no picture; expected files named {', '.join(SUFFIXES)}")

    def __len__(self) -> int:
        return len(self.names)

    def entry(self, index: int, epoch: int) -> Entry:
        """See `IndexedSource.entry`."""
        name = self.names[index]
        return Entry(name, lambda: Item(decode(read_file(self.folder / name, self.folder))))

    def fingerprint(self) -> str:
        """Covers the names only, not the contents."""
        return digest(["folder", *self.names])


def _not_listed(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror}; make it readable or move it away") from error


@dataclass(frozen=True)
class Row:
    """A line of an annotation file. Paths are relative to the file's folder."""

    image: str
    mask: str | None
    task: Task


class JsonLinesSource(IndexedSource):
    """An annotation file with one JSON object per line: `{"image": PATH, "mask": PATH, "task": TASK}`.

    `mask` and `task` (`background` or `foreground`) are optional; the default is `background`. A `foreground` needs the
    mask of its object.
    """

    def __init__(self, path: str | Path) -> None:
        """Reads and checks all lines; pictures are read later.

        Raises:
            DataError: the file cannot be read or is empty, a line is malformed, or a path leaves the folder.
        """
        self.path = Path(path)
        self.rows: list[Row] = []
        try:
            with open(self.path, "rb") as stream:
                number = 0
                while line := stream.readline(MAX_LINE + 1):
                    number += 1
                    if len(line) > MAX_LINE:
                        raise DataError(f"{path} line {number}: over {MAX_LINE} bytes; expected one short JSON object")
                    if line.strip():
                        self.rows.append(_row(line, f"{path} line {number}"))
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}; give a file of JSON lines") from error
        if not self.rows:
            raise DataError(f'{path} holds no row; expected lines like {{"image": "a.jpg"}}')

    def __len__(self) -> int:
        return len(self.rows)

    def entry(self, index: int, epoch: int) -> Entry:
        """See `IndexedSource.entry`."""
        row = self.rows[index]
        return Entry(row.image, lambda: self._load(row))

    def _load(self, row: Row) -> Item:
        root = self.path.parent
        image = decode(read_file(root / row.image, root))
        mask = None if row.mask is None else decode_mask(read_file(root / row.mask, root), image.size)
        return Item(image, mask, row.task)

    def fingerprint(self) -> str:
        """Of all rows."""
        return digest(["lines", *(f"{row.image}\0{row.mask}\0{row.task}" for row in self.rows)])


def _row(line: bytes, where: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON in UTF-8 ({error}); expected one object") from error
    if not isinstance(value, dict) or not value.keys() <= _KEYS:
        got = ", ".join(map(str, value)) if isinstance(value, dict) else type(value).__name__
        raise DataError(f"{where}: {got[:200]}; expected an object with image and optionally mask and task")
    image, mask, task = value.get("image"), value.get("mask"), parse_task(value.get("task", "background"), where)
    if task == "foreground" and mask is None:
        raise DataError(f"{where}: task foreground without a mask; name the object's mask, or use background")
    return Row(_below(image, f"{where}: image"), None if mask is None else _below(mask, f"{where}: mask"), task)


def parse_task(value: object, where: str) -> Task:
    """`background` or `foreground`; `DataError` for anything else."""
    for task in TASKS:
        if value == task:
            return task
    raise DataError(f"{where}: task {str(value)[:40]}; expected background or foreground")


def _below(value: object, where: str) -> str:
    """Checks that a path as text stays in the folder. Links are resolved when the file is read."""
    if not isinstance(value, str) or not value or "\0" in value or "\\" in value:
        raise DataError(f"{where} {str(value)[:80]}: expected a path with / below the annotation file's folder")
    if value.startswith("/") or ":" in value.split("/")[0] or ".." in value.split("/"):
        raise DataError(f"{where} {value[:80]} leads out of the annotation file's folder; keep pictures below it")
    return value


class SceneSource(IndexedSource):
    """Procedural scenes, all `background`. `fresh` draws new ones every epoch."""

    def __init__(self, count: int, size: int, seed: int = 0, held_out: bool = False, fresh: bool = False) -> None:
        """Scenes 0 to `count` - 1 of `size` pixels square; see `moebius.data.scenes.scene`.

        Raises:
            DataError: `count` is under 1.
        """
        if count < 1:
            raise DataError(f"{count} scenes: expected 1 or more")
        self.count, self.size, self.seed, self.held_out, self.fresh = count, size, seed, held_out, fresh

    def __len__(self) -> int:
        return self.count

    def entry(self, index: int, epoch: int) -> Entry:
        """See `IndexedSource.entry`."""
        number = index + (epoch * self.count if self.fresh else 0)
        name = f"{'held-out ' if self.held_out else ''}scene {self.seed}:{number}"
        return Entry(
            name, lambda: Item(Image.fromarray(scene(number, self.size, seed=self.seed, held_out=self.held_out)))
        )

    def fingerprint(self) -> str:
        """Of the settings."""
        return digest(["scenes", repr((self.count, self.size, self.seed, self.held_out, self.fresh))])


class JoinedSource(IndexedSource):
    """Several sources as one. Each is repeated a number of times per epoch, to give few pictures more weight."""

    def __init__(self, parts: list[tuple[IndexedSource, int]]) -> None:
        """Combines pairs of a source and its number of repetitions.

        Raises:
            DataError: no part, or one repeated less than once.
        """
        if not parts or any(times < 1 for _, times in parts):
            raise DataError(f"{len(parts)} joined sources: expected one or more, each repeated once or more")
        self.parts = parts
        self._ends = list(accumulate(len(source) * times for source, times in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def entry(self, index: int, epoch: int) -> Entry:
        """See `IndexedSource.entry`."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        source = self.parts[part][0]
        return source.entry((index - (self._ends[part - 1] if part else 0)) % len(source), epoch)

    def fingerprint(self) -> str:
        """Of the parts and their weights."""
        return digest(["joined", *(f"{source.fingerprint()} {times}" for source, times in self.parts)])
