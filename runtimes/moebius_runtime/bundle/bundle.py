"""A bundle on disk: a checked manifest, and graph files that are checked before use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from moebius_runtime.bundle.graph_files import external_files
from moebius_runtime.bundle.hub import HubFiles, remote_files
from moebius_runtime.bundle.manifest import (
    GraphFile,
    GraphInfo,
    GraphName,
    Manifest,
    Precision,
    check_file,
    read_manifest,
)
from moebius_runtime.errors import BundleError
from moebius_runtime.files.hashes import FileHashes


@dataclass(frozen=True)
class Bundle:
    """A folder that `moebius-export onnx` wrote. `remote` fetches its files where it is one of a hub."""

    path: Path
    manifest: Manifest
    hashes: FileHashes = field(default_factory=FileHashes, repr=False, compare=False)
    remote: HubFiles | None = field(default=None, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path, *, rehash: bool = False) -> Bundle:
        """Opens a bundle and checks its manifest. Graph files are checked by `model_file`.

        Args:
            path: a folder, or `hub:OWNER/REPO[@REVISION]`, whose files are fetched when they are first used.
            rehash: hash also files that have not changed since another process hashed them.

        Raises:
            BundleError: there is no bundle, or its manifest is damaged or of a version that cannot be read; for one of
                a hub also as `moebius_runtime.bundle.hub.remote_files`.
        """
        remote = remote_files(path)
        folder = Path(path) if remote is None else remote.folder
        return cls(folder, read_manifest(folder), FileHashes(rehash=rehash), remote)

    @property
    def name(self) -> str:
        """What a command calls this bundle: its folder, or `hub:OWNER/REPO[@REVISION]`."""
        return str(self.path) if self.remote is None else self.remote.name

    def take_notes(self) -> list[str]:
        """Returns notes for the user on where the files came from, once."""
        if self.remote is None:
            return []
        notes, self.remote.notes = self.remote.notes, []
        return notes

    def graph(self, name: GraphName) -> GraphInfo:
        """The description of a graph or optional decoder; `BundleError` when the bundle has none of that name."""
        try:
            return self.manifest.every_graph[name]
        except KeyError:
            there = ", ".join(self.manifest.every_graph)
            raise BundleError(f"{self.path}: no graph {name!r}; the bundle holds {there}. Export it again.") from None

    def precision_of(self, name: GraphName, wanted: Iterable[Precision]) -> Precision:
        """The first of the wanted precisions that the graph has a file of, else the graph's first."""
        files = self.graph(name).files
        return next(precision for precision in (*wanted, *files) if precision in files)

    def model_file(self, name: GraphName, precision: Precision = "fp32") -> Path:
        """Returns the path of a graph's ONNX file, after checking it and its weights against the manifest.

        A file is hashed again only if it has changed since the last check (`moebius_runtime.files.hashes`). The ONNX
        file may refer only to its own weights file.

        Raises:
            BundleError: no such precision, a file is missing or damaged, or the ONNX file refers to another file.
        """
        files = self.graph(name).files
        if precision not in files:
            raise BundleError(
                f"{self.path}: graph {name} has no {precision} file, only {', '.join(files)}. "
                f"Export it with `--precision {precision}`."
            )
        paths = [self.file(file) for file in files[precision].paths]
        _check_references(paths[0], files[precision])
        return paths[0]

    def file(self, name: str) -> Path:
        """Returns the path of a file of the manifest, after fetching it where needed and checking it.

        Raises:
            BundleError: it is missing or damaged, or cannot be fetched.
        """
        return self._check(name) if self.remote is None else self.remote.checked(name, self._check)

    def _check(self, file: str) -> Path:
        return check_file(self.path, self.manifest, file, self.hashes.sha256)


def _check_references(model: Path, file: GraphFile) -> None:
    try:
        named = external_files(model)
    except (OSError, ValueError) as error:
        raise BundleError(f"{model}: not an ONNX file ({error}). Export the bundle again.") from error
    own = {Path(file.weights).name} if file.weights else set()
    if other := sorted(named - own):
        raise BundleError(
            f"{model}: refers to {other[0][:100]!r}; a graph may only read its own weights file. Nothing "
            "was read. Do not use this bundle unless you know why."
        )
