"""Destinations of a job: a folder of pictures or tars, with the job's record and reports in a folder of their own.

OUT/KEY.png                            results (write: folder)
OUT/00012.tar                          results of shard 12 (write: tars)
OUT/_moebius-batch/job.json            what the results follow from
OUT/_moebius-batch/shards/00012.jsonl  report of a finished shard, one line a picture, written last
OUT/_moebius-batch/open/00012.*        journal of a shard that is not finished yet
OUT/_moebius-batch/report.jsonl, summary.json   of the whole job, once it is finished
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moebius_batch import tars
from moebius_batch.errors import StoreError
from moebius_batch.items import Item, Shard
from moebius_batch.job import Write
from moebius_batch.keys import CONTROL
from moebius_batch.stores import is_remote, joined, normal, store_of
from moebius_runtime.errors import InputError

DEATHS = 3
"""A picture during which so many processes died is recorded as failed."""
_JOURNAL_SECONDS = 15.0  # between two writes of a journal to a store that cannot append
_NAMES = {  # of the record's fields, in messages
    "list_sha256": "list of pictures",
    "pictures": "number of pictures",
    "shards": "number of shards (--shard-size)",
    "mask_sha256": "mask",
    "bundle_sha256": "bundle",
}


@dataclass(frozen=True)
class Line:
    """One picture in a report.

    Attributes:
        key: of the picture.
        status: `ok` or `failed`.
        file: the result's name below the destination or in its tar; None where it failed.
        seed: that it was filled with.
        seconds: that it took, with reading and writing; None where the process died after writing it.
        notes: on the picture, one sentence each.
        error: why it failed, one sentence.
    """

    key: str
    status: str
    file: str | None = None
    seed: int | None = None
    seconds: float | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None

    def to_json(self) -> bytes:
        """The line of the report, with its end."""
        return json.dumps(asdict(self), ensure_ascii=True).encode() + b"\n"


@dataclass
class Summary:
    """Counts over reports."""

    pictures: int = 0
    filled: int = 0
    failed: int = 0
    seconds: float = 0.0
    notes: int = 0

    def add(self, line: Line) -> None:
        """Counts a line."""
        self.pictures += 1
        self.filled += line.status == "ok"
        self.failed += line.status != "ok"
        self.seconds += line.seconds or 0.0
        self.notes += bool(line.notes)


def parse_lines(data: bytes) -> list[Line]:
    """The lines of a report or a journal; a last line that a killed process did not finish is left out."""
    found = []
    for text in data.split(b"\n"):
        try:
            content = json.loads(text)
            found.append(Line(**{**content, "notes": tuple(content["notes"])}))
        except (ValueError, TypeError, KeyError):
            continue
    return found


@dataclass
class Destination:
    """Where results and reports go.

    Args:
        out: a folder, path or URL.
        write: pictures in folders, or one tar a shard.
    """

    out: str
    write: Write = "folder"
    _safe: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.out = normal(self.out)
        self.store = store_of(self.out)

    @property
    def own_folder(self) -> str:
        """Where the job's record and reports are."""
        return joined(self.out, CONTROL)

    @property
    def record_url(self) -> str:
        """Where the job's record is."""
        return self._own("job.json")

    def begin(self, record: dict[str, Any]) -> None:
        """Writes the record of a new job, or compares that of a job that has begun.

        Raises:
            InputError: the destination holds another job's results, or files of no job.
        """
        path = self.record_url
        self.check_inside(path)
        known = self._read_json(path)
        if known is None and (there := self._others()):
            known = self._read_json(path)  # another process of this job may have written it meanwhile
            if known is None:
                raise InputError(
                    f"{self.out} holds {there}, and no record of a job; choose an empty or new folder for --out"
                )
        if known is None:
            self.store.write(path, json.dumps(record, indent=1).encode() + b"\n")
            return
        for name, value in record.items():
            if name != "source" and known.get(name) != json.loads(json.dumps(value)):
                if self._is_untouched():  # the job before this one was refused before it filled anything
                    self.store.write(path, json.dumps(record, indent=1).encode() + b"\n")
                    return
                was = json.dumps(known.get(name))[:100]
                what = _NAMES.get(name, name)
                raise InputError(
                    f"{self.out} holds the results of another job: its {what} was {was} and is now "
                    f"{json.dumps(value)[:100]}; choose another --out, or give the same source and options"
                )

    def _is_untouched(self) -> bool:
        return not self._others() and all(self.store.kind(self._own(name)) is None for name in ("open", "shards"))

    def _others(self) -> str | None:
        """Name of a file that the destination holds, or None."""
        if self.store.kind(self.out) == "file":
            raise InputError(f"--out {self.out} is a file; name a folder")
        try:
            found = self.store.listing(self.out)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return None
            raise
        return found[0].name if found else None

    def finished(self) -> set[int]:
        """Numbers of the finished shards."""
        folder = self._own("shards")
        if self.store.kind(folder) is None:
            return set()
        names = (entry.name for entry in self.store.listing(folder))
        return {int(name[:-6]) for name in names if name.endswith(".jsonl") and name[:-6].isdecimal()}

    def report(self, number: int) -> list[Line]:
        """The lines of a finished shard."""
        return parse_lines(self.store.read(self._shard(number)))

    def finish_job(self, shards: int, took: float) -> Summary:
        """Merges the reports of all shards into `report.jsonl` and `summary.json`, and returns the summary."""
        summary, lines = Summary(), []
        for number in range(shards):
            for line in self.report(number):
                summary.add(line)
                lines.append(line)
        lines.sort(key=lambda line: line.key)
        self.store.write(self._own("report.jsonl"), b"".join(line.to_json() for line in lines))
        content = {**asdict(summary), "shards": shards, "last_process_seconds": round(took, 3)}
        self.store.write(self._own("summary.json"), json.dumps(content, indent=1).encode() + b"\n")
        return summary

    def open_shard(self, shard: Shard) -> OpenShard:
        """The state of an unfinished shard."""
        return OpenShard(self, shard)

    def reopen(self, shard: Shard) -> bool:
        """Takes a finished shard's failed pictures out of its report, so that they are filled again.

        Returns False where none failed, and the shard stays finished.
        """
        lines = self.report(shard.number)
        good = [line for line in lines if line.status == "ok"]
        if len(good) == len(lines):
            return False
        opened = OpenShard(self, shard)
        if self.write == "tars":
            url = self._tar(shard)
            with tempfile.TemporaryDirectory() as folder:
                copy = Path(folder) / "old.tar"
                self.store.get(url, copy)
                members = {item.file: item for item in tars.index(copy, url, shard.name)}
                for line in good:
                    name = opened.member(str(line.file))
                    self.store.write(opened.result(str(line.file)), members[name].picture.read())
        self.store.write(opened.journal, b"".join(line.to_json() for line in good))
        self.store.remove(self._shard(shard.number))
        return True

    def _own(self, name: str) -> str:
        return joined(self.out, f"{CONTROL}/{name}")

    def _shard(self, number: int) -> str:
        return self._own(f"shards/{number:05d}.jsonl")

    def _tar(self, shard: Shard) -> str:
        return joined(self.out, f"{shard.name}.tar")

    def _read_json(self, url: str) -> dict[str, Any] | None:
        if self.store.kind(url) is None:
            return None
        try:
            content = json.loads(self.store.read(url))
        except ValueError as error:
            raise InputError(f"{url} is damaged ({error}); choose another --out") from error
        return content if isinstance(content, dict) else {}

    def check_inside(self, url: str) -> None:
        """Refuses a local path that a link leads out of the destination."""
        folder = str(Path(url).parent)
        if is_remote(url) or folder in self._safe:
            return
        if not Path(folder).resolve().is_relative_to(Path(self.out).resolve()):
            raise StoreError(f"{folder} is a link that leaves {self.out}; remove it, or choose another --out")
        self._safe.add(folder)


class OpenShard:
    """A shard that is being filled: what was finished before, and a journal of what is finished now."""

    def __init__(self, destination: Destination, shard: Shard) -> None:
        self.destination, self.shard, self._store = destination, shard, destination.store
        self.journal = destination._own(f"open/{shard.number:05d}.jsonl")
        self._attempt = destination._own(f"open/{shard.number:05d}.json")
        self._spool = destination._own(f"open/{shard.number:05d}")
        self.lines: dict[str, Line] = {}
        self._written = time.monotonic()
        self.after_death = False  # whether the process before this one died at the first of the waiting pictures

    def resume(self, items: Iterable[tuple[Item, str]]) -> None:
        """Takes over what an earlier process finished, and condemns a picture during which `DEATHS` processes died.

        Args:
            items: the shard's pictures in the order of the work, with the names of their results.
        """
        before = self.destination._read_json(self._attempt)
        items = list(items)
        if self._store.kind(self.journal) is not None:
            self.lines = {line.key: line for line in parse_lines(self._store.read(self.journal))}
            if not self._store.append(self.journal, b"\n"):  # ends a half line of a killed process
                self._write_journal()
        if before is not None:
            for item, file in items:
                if item.key not in self.lines and self._store.kind(self.result(file)) is not None:
                    self.record(Line(item.key, "ok", file))
        waiting = [item.key for item, _ in items if item.key not in self.lines]
        deaths = 0
        if before is not None and waiting:  # the process before this one died at what is now the first picture
            deaths = int(before.get("deaths", 0)) * (before.get("first") == waiting[0]) + 1
            self._store.clear(self.result(next(file for item, file in items if item.key == waiting[0])))
        self.after_death = 0 < deaths < DEATHS
        if deaths >= DEATHS:
            reason = f"{DEATHS} processes died while they filled it (out of memory?); try it alone"
            self.record(Line(waiting.pop(0), "failed", error=reason))
            deaths = 0
        if waiting:
            self._store.write(self._attempt, json.dumps({"first": waiting[0], "deaths": deaths}).encode())

    def stopped(self) -> None:
        """Notes that this process ends without dying, so that its end is not counted against the picture in work."""
        self._write_journal()
        self._store.remove(self._attempt)

    def member(self, file: str) -> str:
        """Name of a result in the shard's tar: a tar's own name, which its pictures' keys begin with, is left out."""
        return file.removeprefix(f"{self.shard.name}/") if self.shard.tar else file

    def result(self, file: str) -> str:
        """Where a result is written before its shard is finished."""
        return joined(self.destination.out if self.destination.write == "folder" else self._spool, file)

    def save(self, file: str, data: bytes) -> None:
        """Writes a result whole or not at all; raises `StoreError`."""
        url = self.result(file)
        if not is_remote(url):
            self.destination.check_inside(url)
        self._store.write(url, data)

    def record(self, line: Line) -> None:
        """Adds a line to the journal. Where a store cannot append, it is written at times, and at once for failures."""
        self.lines[line.key] = line
        if self._store.append(self.journal, line.to_json()):
            return
        if line.status != "ok" or time.monotonic() - self._written > _JOURNAL_SECONDS:
            self._write_journal()

    def finish(self, items: Iterable[Item]) -> None:
        """Writes the shard's tar, then its report, and removes the journal."""
        extras = {item.key: item.extra for item in items}
        lines = [self.lines[key] for key in sorted(self.lines)]
        if self.destination.write == "tars":
            with tempfile.TemporaryDirectory() as folder:

                def members() -> Iterable[tuple[str, bytes]]:
                    for line in lines:
                        if line.file is not None:
                            member = self.member(line.file)
                            yield member, self._store.read(self.result(line.file))
                            if (extra := extras.get(line.key)) is not None:
                                yield f"{member.rpartition('.')[0]}.json", extra.read()

                tars.write_tar(Path(folder) / "shard.tar", members())
                self._store.put(self.destination._tar(self.shard), Path(folder) / "shard.tar")
        self._store.write(self.destination._shard(self.shard.number), b"".join(line.to_json() for line in lines))
        for url in (self._attempt, self.journal, self._spool):
            self._store.remove(url)

    def _write_journal(self) -> None:
        self._store.write(self.journal, b"".join(line.to_json() for line in self.lines.values()))
        self._written = time.monotonic()
