"""The report of the doctor: one row for each check."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from moebius_runtime.files import atomic_write


class Verdict(str, Enum):
    """The verdict of a row. `failed` means that the check itself raised, so nothing is known."""

    ok = "ok"
    missing = "missing"
    wrong = "wrong"
    failed = "failed"


@dataclass(frozen=True)
class Row:
    """What a check found, its verdict, and how to fix it: a command where there is one."""

    name: str
    found: str
    verdict: Verdict = Verdict.ok
    fix: str | None = None


@dataclass(frozen=True)
class Part:
    """A heading and its rows."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Report:
    """All rows of one run.

    Attributes:
        created: time in ISO 8601.
        version: of moebius-edge.
        parts: the rows under their headings.
        usable: the runtimes that can run here.
        sound: whether the bundle is undamaged, None without one. Engines of another device do not count as damage.
    """

    created: str
    version: str
    parts: tuple[Part, ...]
    usable: tuple[str, ...]
    sound: bool | None

    @property
    def exit_code(self) -> int:
        """0 if a runtime can run and the bundle, if one was given, is sound; else 1."""
        return 0 if self.usable and self.sound is not False else 1

    def rows(self) -> list[Row]:
        """The rows of all parts."""
        return [row for part in self.parts for row in part.rows]


def write_json(report: Report, path: str | Path) -> None:
    """Writes the report as JSON, whole or not at all. Raises `OutputError` if it cannot be written."""
    content = asdict(report) | {"exit_code": report.exit_code}
    with atomic_write(path) as stream:
        stream.write((json.dumps(content, indent=1) + "\n").encode())
