"""A bundle on disk: its checked manifest, and graph files that are checked before they are used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moebius_runtime.errors import BundleError
from moebius_runtime.manifest import GraphInfo, GraphName, Manifest, Precision, check_file, read_manifest


@dataclass(frozen=True)
class Bundle:
    """A folder that `moebius-export onnx` wrote."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Reads and checks the manifest; graph files are checked when they are loaded.

        Raises:
            BundleError: there is no bundle, or its manifest is not one that this version reads.
        """
        return cls(Path(path), read_manifest(path))

    def graph(self, name: GraphName) -> GraphInfo:
        """The description of a graph; `BundleError` when the bundle has none of that name."""
        try:
            return self.manifest.graphs[name]
        except KeyError:
            raise BundleError(
                f"{self.path}: no graph {name!r}; the bundle holds {', '.join(self.manifest.graphs)}. Export it again."
            ) from None

    def model_file(self, name: GraphName, precision: Precision = "fp32") -> Path:
        """The path of a graph's ONNX file, after it and its weights were found undamaged.

        Raises:
            BundleError: no such precision, or a file is missing or damaged.
        """
        files = self.graph(name).files
        if precision not in files:
            raise BundleError(
                f"{self.path}: graph {name} has no {precision} file, only {', '.join(files)}. "
                f"Export it with `--precision {precision}`."
            )
        checked = [check_file(self.path, self.manifest, file) for file in files[precision].paths]
        return checked[0]
