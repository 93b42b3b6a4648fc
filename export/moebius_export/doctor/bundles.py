"""Checks a bundle: its manifest, its files, and each folder of engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from moebius_export.doctor.gpu import Gpu
from moebius_export.doctor.libraries import Found
from moebius_export.doctor.rows import Row, Verdict
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.passport import (
    ENGINES,
    EngineBackend,
    Passport,
    build_flag,
    check_bundle,
    check_device,
    check_engine,
    engine_folders,
    read_passport,
)
from moebius_runtime.errors import BundleError, EngineError

_LIBRARY: dict[EngineBackend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Checked:
    """A bundle's rows, and whether it is undamaged. Engines for another device or version do not count as damage."""

    rows: tuple[Row, ...]
    sound: bool


def check_whole_bundle(path: Path, libraries: Mapping[str, Found], gpu: Gpu, progress: Progress) -> Checked:
    """Hashes every file of a bundle and validates its engines against this machine.

    Args:
        path: folder of the bundle, or `hub:OWNER/REPO[@REVISION]`, all of whose files are fetched.
        libraries: the installed libraries.
        gpu: the GPU of this machine.
        progress: called with the name of each file before it is hashed.
    """
    try:
        bundle = Bundle.open(path)
    except BundleError as error:
        return Checked((Row("manifest", str(error), Verdict.wrong),), False)
    rows = [_manifest_row(bundle), *_file_rows(bundle, progress)]
    sound = all(row.verdict is Verdict.ok for row in rows)
    engines = [
        _engine_row(bundle, folder, backend, libraries, gpu, progress) for folder, backend in _folders(bundle.path)
    ]
    if not engines:
        rows.append(Row("engines", "none; only TensorRT needs them", Verdict.missing, _build(path)))
    stray = _strays(bundle.path)
    if stray:
        names = ", ".join(name[:80] for name in stray)
        rows.append(
            Row("engines", f"{names}: no name of a folder of engines", Verdict.wrong, "remove it if it is not yours")
        )
    return Checked((*rows, *(row for row, _ in engines)), sound and all(whole for _, whole in engines))


def _manifest_row(bundle: Bundle) -> Row:
    manifest = bundle.manifest
    graphs = "; ".join(f"{name} {', '.join(graph.files)}" for name, graph in manifest.every_graph.items())
    stand_in = ", random test weights (its pictures are noise)" if manifest.stand_in else ""
    return Row("manifest", f"preset {manifest.model.preset}{stand_in}; {graphs}")


def _file_rows(bundle: Bundle, progress: Progress) -> list[Row]:
    """One row if every file matches the manifest, else one row for each file that does not."""
    problems: dict[str, None] = {}
    for name in bundle.manifest.files:
        progress(name)
        try:
            bundle.file(name)
        except BundleError as error:
            problems[str(error)] = None
    if not problems:
        for name, graph in bundle.manifest.every_graph.items():
            for precision in graph.files:
                try:
                    bundle.model_file(name, precision)  # also checks which files an ONNX file refers to
                except BundleError as error:
                    problems[str(error)] = None
    if problems:
        return [Row("file", problem, Verdict.wrong) for problem in problems]
    size = sum(file.size for file in bundle.manifest.files.values())
    return [Row("files", f"{len(bundle.manifest.files)} files, {size / 1e6:,.0f} MB, undamaged")]


def _folders(path: Path) -> list[tuple[Path, EngineBackend]]:
    return [(folder, backend) for backend in get_args(EngineBackend) for folder in engine_folders(path, backend)]


def _strays(path: Path) -> list[str]:
    root = path / ENGINES
    known = {folder for folder, _ in _folders(path)}
    return sorted(entry.name for entry in root.iterdir() if entry not in known) if root.is_dir() else []


def _engine_row(
    bundle: Bundle,
    folder: Path,
    backend: EngineBackend,
    libraries: Mapping[str, Found],
    gpu: Gpu,
    progress: Progress,
) -> tuple[Row, bool]:
    """A folder's row, and whether its engines are undamaged and were built from this bundle."""
    name = f"engines {folder.name}"
    passport = None
    try:
        passport = read_passport(folder)
        if passport.backend != backend:
            raise EngineError(f"{folder}: its name says {backend}, its passport {passport.backend}")
        check_bundle(folder, passport, bundle.manifest)
        for graph in passport.engines:
            progress(f"{folder.name}/{graph}")
            check_engine(folder, passport, graph)
    except EngineError as error:
        return Row(name, str(error), Verdict.wrong, _rebuild(bundle.path, passport)), False
    built = f"{passport.backend} {passport.backend_version}, {passport.precision}, {', '.join(passport.engines)}"
    library = libraries[_LIBRARY[backend]]
    if library.answer.problem is not None or gpu.device is None:
        lacks = f"no {backend}" if library.answer.problem is not None else "no GPU that CUDA reaches"
        where = passport.gpu or f"SM {', '.join(map(str, passport.sm))}"
        return Row(name, f"{built}, for {where}: undamaged, but this machine cannot run them ({lacks})"), True
    try:
        notes = check_device(folder, passport, library.answer.value["version"], gpu.device)
    except EngineError as error:
        return Row(name, f"does not fit: {error}", Verdict.wrong, _build(bundle.path, passport)), True
    return Row(name, "; ".join([f"{built}: fits this device", *notes])), True


def _build(path: Path, passport: Passport | None = None) -> str:
    """The command that builds engines for this machine."""
    if passport is None:
        return f"moebius-export trt {path} --fp16"
    return f"moebius-export trt {path} {build_flag(passport.precision)} --backend {passport.backend}"


def _rebuild(path: Path, passport: Passport | None) -> str:
    """The command that builds the engines of a damaged folder again."""
    return passport.rebuild.replace("BUNDLE", str(path)) if passport else _build(path)
