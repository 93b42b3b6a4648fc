"""What a job is made of: pictures with their masks, in numbered shards that follow from the keys."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from moebius_batch.errors import StoreError
from moebius_batch.keys import shard_of
from moebius_batch.stores import Entry, changed, mtime, store_of
from moebius_runtime.files import open_plain

LEAST_SHARDS = 16
"""A small job has so many shards, or as many as it has pictures, so that several processes find work."""


@dataclass(frozen=True)
class Blob:
    """The bytes of a file, or of a part of a local one.

    Attributes:
        url: a path or URL.
        size: expected bytes, or -1 where unknown.
        stamp: expected version of the file, see `Entry`, or "".
        offset: first byte of the part in a local file; -1 stands for the whole file.
    """

    url: str
    size: int = -1
    stamp: str = ""
    offset: int = -1

    def read(self) -> bytes:
        """Returns the bytes; errors as `Store.read`, but `StoreError` for a part of a file that changed."""
        if self.offset < 0:
            return store_of(self.url).read(self.url, self.listed)
        with open_plain(self.url) as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
            now = mtime(os.fstat(stream.fileno()))
        if len(data) != self.size or self.stamp not in ("", now):
            raise StoreError(str(changed(self.url, self)))  # of the whole shard, not of a picture
        return data

    @property
    def listed(self) -> Entry | None:
        """What the file was when the job listed it; None where it did not."""
        return Entry("", self.size, self.stamp) if self.size >= 0 or self.stamp else None


@dataclass(frozen=True)
class Item:
    """A picture of a job.

    Attributes:
        key: decides the shard, the seed and the name of the result; unique in the job.
        file: name of the picture's file, for messages and the result's suffix.
        picture: its bytes.
        mask: its own mask, or None for the mask of the job, if there is one.
        extra: the sample's JSON in a tar, which a result tar keeps unchanged.
    """

    key: str
    file: str
    picture: Blob
    mask: Blob | None = None
    extra: Blob | None = None


@dataclass(frozen=True)
class Shard:
    """A numbered share of a job: its pictures, or the tar that holds them.

    Attributes:
        number: 0 to the number of shards - 1.
        name: of its result tar, without suffix.
        items: its pictures, or None for a tar that is listed when its shard begins.
        tar: that tar.
    """

    number: int
    name: str
    items: tuple[Item, ...] | None = None
    tar: Blob | None = None

    def to_json(self) -> str:
        """All of it as JSON, for another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Shard:
        """The shard of `to_json`."""

        def blob(value: dict[str, Any] | None) -> Blob | None:
            return None if value is None else Blob(**value)

        content = json.loads(text)
        shard = cls(content["number"], content["name"], tar=blob(content["tar"]))
        if content["items"] is None:
            return shard
        items = (
            Item(one["key"], one["file"], Blob(**one["picture"]), blob(one["mask"]), blob(one["extra"]))
            for one in content["items"]
        )
        return replace(shard, items=tuple(items))


def cut(items: Iterable[Item], shard_size: int) -> list[Shard]:
    """Cuts pictures into shards of about `shard_size` by `shard_of`; a shard's pictures are sorted by key.

    The number of shards is the number of pictures over `shard_size`, rounded up, and at least `LEAST_SHARDS` or one a
    picture. Shards can be empty.
    """
    found = sorted(items, key=lambda item: item.key)
    count = max(-(-len(found) // shard_size), min(LEAST_SHARDS, len(found)))
    groups: list[list[Item]] = [[] for _ in range(count)]
    for item in found:
        groups[shard_of(item.key, count)].append(item)
    return [Shard(number, f"{number:05d}", tuple(group)) for number, group in enumerate(groups)]
