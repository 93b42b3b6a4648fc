"""What an export keeps of the bundle that it replaces: files and engines that still hold by their hashes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import (
    MANIFEST_NAME,
    FileInfo,
    GraphFile,
    GraphName,
    Manifest,
    Precision,
)
from moebius_runtime.bundle.passport import ENGINES, check_bundle, check_engine, read_passport
from moebius_runtime.errors import BundleError, EngineError
from moebius_runtime.files import link_file

Note = Callable[[str], None]


def keep_earlier(out: Path, folder: Path, manifest: Manifest, note: Note) -> Manifest:
    """Links what still holds of the bundle at `out` into the new `folder`, and returns the manifest with it.

    - Mixed-precision and quantized files of a graph stay if they are undamaged and their source, the graph's float32
      file with its weights, has the same SHA-256 in both bundles.
    - A folder of engines stays if its passport names the files of the new manifest and every engine is undamaged.
    - Files that the old manifest does not list stay.

    Everything else is named in a note with the reason.

    Args:
        out: the folder of the old bundle; it need not exist.
        folder: the complete new bundle, which will replace `out`.
        manifest: of the new bundle.
        note: called with one line for each precision and each folder of engines that is removed.

    Raises:
        OSError: a file can be neither linked nor copied.
    """
    if not (out / MANIFEST_NAME).is_file():
        return manifest
    listed: set[str] = set()
    try:
        old = Bundle.open(out)
    except BundleError as error:
        note(f"the files of the earlier bundle are removed: {error}")
    else:
        listed = set(old.manifest.files)
        manifest = _keep_precisions(old, folder, manifest, note)
    _keep_engines(out, folder, manifest, note)
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out)
        inside_engines = name.parts[0] == ENGINES and (len(name.parts) > 2 or path.is_dir())
        used = name.as_posix() in listed or inside_engines or name == Path(MANIFEST_NAME)
        if not used and (path.is_symlink() or path.is_file()) and not (folder / name).exists():
            link_file(path, folder / name)
    return manifest


def _keep_precisions(old: Bundle, folder: Path, manifest: Manifest, note: Note) -> Manifest:
    """Links the files of other precisions whose float32 source did not change."""
    graphs, files = dict(manifest.graphs), dict(manifest.files)
    removed: dict[tuple[Precision, str], list[GraphName]] = {}
    for graph, before in old.manifest.graphs.items():
        for precision, file in before.files.items():
            if precision == "fp32":
                continue
            problem = _problem(old, graph, precision, manifest)
            if problem is None and any(path in manifest.files for path in file.paths):
                problem = "a file of the new bundle has its name"
            if problem is not None:
                removed.setdefault((precision, problem), []).append(graph)
                continue
            for path in file.paths:
                if path not in files:
                    link_file(old.path / path, folder / path)
                    files[path] = old.manifest.files[path]
            graphs[graph] = graphs[graph].model_copy(update={"files": {**graphs[graph].files, precision: file}})
    for (precision, problem), names in removed.items():
        again = (
            f"int8 {old.path}"
            if "int8" in precision or precision == "fp8"
            else f"precision {old.path} --to {precision}"
        )
        note(f"the earlier {precision} file of {', '.join(names)} is removed: {problem}. Again: moebius-export {again}")
    update = {"graphs": graphs, "files": dict(sorted(files.items()))}
    return Manifest.model_validate(manifest.model_copy(update=update).model_dump())


def _problem(old: Bundle, graph: GraphName, precision: Precision, manifest: Manifest) -> str | None:
    """Why the old file of a precision does not hold in the new bundle; None if it does."""
    before, now = old.manifest.graphs[graph].files.get("fp32"), manifest.graphs.get(graph)
    if now is None:
        return "the new bundle has no such graph"
    if before is None:
        return "the earlier bundle had no fp32 file to compare its source with"
    if _hashes(before, old.manifest.files) != _hashes(now.files["fp32"], manifest.files):
        return "it was made from another fp32 file"
    try:
        old.model_file(graph, precision)
    except BundleError as error:
        return str(error)
    return None


def _hashes(file: GraphFile, files: dict[str, FileInfo]) -> list[str | None]:
    return [None if path is None else files[path].sha256 for path in (file.model, file.weights)]


def _keep_engines(out: Path, folder: Path, manifest: Manifest, note: Note) -> None:
    """Links the folders of engines that were built from files of the new manifest."""
    for engines in _folders(out / ENGINES):
        try:
            if not engines.resolve().is_relative_to(out.resolve()):
                raise EngineError("it is a link that leaves the bundle")
            passport = read_passport(engines)
            check_bundle(engines, passport, manifest)
            for graph in passport.engines:
                check_engine(engines, passport, graph)
        except EngineError as error:
            note(f"the earlier {ENGINES}/{engines.name} is removed: {error}")
            continue
        for path in sorted(engines.rglob("*")):
            if path.is_symlink() or path.is_file():
                link_file(path, folder / path.relative_to(out))


def _folders(root: Path) -> Iterator[Path]:
    """Folders of engines, without those that a build still writes."""
    if root.is_dir():
        yield from sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
