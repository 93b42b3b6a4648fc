"""Engine passports: `passport.json` describes the origin, build and device of the engines in its folder.

An engine is code for one kind of GPU, built by one version of TensorRT. It is loaded only if its passport is valid and
matches the ONNX files of the bundle and the device; otherwise it is refused with the command that builds it again. A
passport is hostile until it is checked. Its hashes detect damage, not malice.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from moebius_runtime.bundle.checked import Field, StrictModel, first_problem
from moebius_runtime.bundle.manifest import (
    Dimension,
    GraphName,
    Manifest,
    Precision,
    Sha256,
    ShortText,
    content_digest,
)
from moebius_runtime.errors import EngineError
from moebius_runtime.files import MappedFile, atomic_write, open_plain, read_plain

PASSPORT_NAME = "passport.json"
ENGINES = "engines"
MAX_PASSPORT_BYTES = 1 << 20

EngineBackend = Literal["tensorrt", "tensorrt-rtx"]
Sm = Annotated[int, Field(ge=50, le=200)]


@dataclass(frozen=True)
class Device:
    """The GPU that engines are to run on. `sm` is 86 for compute capability 8.6; memory in bytes."""

    name: str
    sm: int
    driver: str
    cuda: str
    total_memory: int
    free_memory: int


@dataclass(frozen=True, kw_only=True)
class Range(StrictModel):
    """Smallest, best and largest shape of an engine's input."""

    min: list[Dimension]
    opt: list[Dimension]
    max: list[Dimension]


@dataclass(frozen=True, kw_only=True)
class EngineInfo(StrictModel):
    """One engine: its file, and the hashes of what it was built from.

    `device_memory` is the memory of its activations in bytes; None if the builder did not report it.
    """

    size: Annotated[int, Field(ge=1, le=1 << 40)]
    sha256: Sha256
    onnx_sha256: Sha256
    weights_sha256: Sha256 | None
    plan_sha256: Sha256 | None
    shapes: Annotated[dict[ShortText, Range], Field(max_length=8)]
    device_memory: Annotated[int, Field(ge=0, le=1 << 50)] | None
    build_seconds: Annotated[float, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class Passport(StrictModel):
    """A folder of engines. `gpu`, `driver` and `cuda` are None if it was built for `sm` without a GPU."""

    schema_version: Literal[1]
    created: ShortText
    backend: EngineBackend
    backend_version: ShortText
    precision: Precision
    gpu: ShortText | None
    sm: Annotated[list[Sm], Field(min_length=1, max_length=16)]
    driver: ShortText | None
    cuda: ShortText | None
    flags: Annotated[dict[ShortText, ShortText], Field(max_length=64)]
    engines: Annotated[dict[GraphName, EngineInfo], Field(min_length=1)]

    @property
    def rebuild(self) -> str:
        """The command that builds these engines again, with BUNDLE for the bundle's name."""
        flag = build_flag(self.precision)
        where = "" if self.gpu else f" --sm {','.join(map(str, self.sm))}"
        switch = "MOEBIUS_TRT_PLUGIN=1 " if self.flags.get("plugins") == "on" else ""
        return f"{switch}moebius-export trt BUNDLE {flag} --backend {self.backend}{where}"


def build_flag(precision: Precision) -> str:
    """The flag of `moebius-export trt` for a precision. There are no engines of the CPU's INT8: TensorRT's is taken."""
    return "--int8" if precision == "int8_cpu" else f"--{precision}"


def engine_file(graph: GraphName) -> str:
    """The name of a graph's engine in its folder."""
    return f"{graph}.plan"


def write_passport(passport: Passport, folder: str | Path) -> None:
    """Writes `passport.json` with its own hash, whole or not at all."""
    content = passport.model_dump(mode="json")
    with atomic_write(Path(folder) / PASSPORT_NAME) as stream:
        stream.write((json.dumps({**content, "passport_sha256": content_digest(content)}, indent=1) + "\n").encode())


def read_passport(folder: str | Path) -> Passport:
    """The checked passport of a folder of engines.

    Raises:
        EngineError: there is none, or it is damaged, changed by hand, or of an unknown version.
    """
    path = Path(folder) / PASSPORT_NAME
    try:
        content: Any = json.loads(read_plain(path, MAX_PASSPORT_BYTES))
        if not isinstance(content, dict):
            raise ValueError(f"expected a JSON object, found {type(content).__name__}")
        declared = content.pop("passport_sha256", None)
        passport = Passport.model_validate(content)
    except OSError as error:
        raise EngineError(
            f"{path}: {error.strerror}; engines are code and are loaded only with their passport. {_BUILD}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EngineError(f"{path}: {first_problem(error)}. {_BUILD}") from error
    if declared != content_digest(content):
        raise EngineError(f"{path}: its content does not match its own hash, so it was changed or damaged. {_BUILD}")
    return passport


def check_bundle(folder: Path, passport: Passport, manifest: Manifest) -> None:
    """Refuses engines that were built from other files than the bundle's.

    Raises:
        EngineError: the manifest has no such graph or precision, or other hashes than the passport.
    """
    for graph, engine in passport.engines.items():
        info = manifest.graphs.get(graph)
        if info is None or passport.precision not in info.files:
            raise EngineError(
                f"{folder}: built from a {passport.precision} file of {graph}, which this bundle does not have. "
                f"Remove the folder, or build it again: {passport.rebuild}"
            )
        file = info.files[passport.precision]
        for what, name, built_from in (
            ("ONNX file", file.model, engine.onnx_sha256),
            ("weights file", file.weights, engine.weights_sha256),
            ("precision plan", file.plan, engine.plan_sha256),
        ):
            now = None if name is None else manifest.files[name].sha256
            if now != built_from:
                raise EngineError(
                    f"{folder}: {graph} was built from another {what} (SHA-256 {_short(built_from)}) than this "
                    f"bundle's (SHA-256 {_short(now)}). Build it again: {passport.rebuild}"
                )


def check_device(folder: Path, passport: Passport, version: str, device: Device) -> list[str]:
    """Refuses engines that were built by another version or for another compute capability; returns notes.

    Another driver, or another GPU of the same compute capability, is only noted: TensorRT itself decides about them
    when it loads the engine.

    Args:
        folder: where the engines are, for the message.
        passport: of these engines.
        version: version of the library that will load them.
        device: the device that will run them.

    Raises:
        EngineError: another version or compute capability. Engines built for "ampere+" run on newer GPUs too, and
            `version_compatible` ones in a newer library of the same major version.
    """
    if passport.backend_version != version and not (
        passport.flags.get("version_compatible") == "on" and _newer_minor(version, passport.backend_version)
    ):
        raise EngineError(
            f"{folder}: built by {passport.backend} {passport.backend_version}, here is {version}. "
            f"Build it again: {passport.rebuild}"
        )
    level = passport.flags.get("hardware_compatibility", "none")
    if device.sm not in passport.sm and not (level == "ampere+" and device.sm >= 80):
        listed = ", ".join(map(str, passport.sm))
        raise EngineError(
            f"{folder}: built for SM {listed}, {device.name} is SM {device.sm}. Build it for this device: "
            f"moebius-export trt BUNDLE {build_flag(passport.precision)} --backend {passport.backend}"
        )
    different = []
    if level == "none" and passport.driver not in (None, device.driver):
        different.append(f"driver {passport.driver}, here is {device.driver}")
    # RTX compiles its kernels for the GPU at hand, so the model does not matter to it.
    if level == "none" and passport.backend == "tensorrt" and passport.gpu not in (None, device.name):
        different.append(f"{passport.gpu}, here is {device.name} of the same SM {device.sm}")
    if not different:
        return []
    return [
        f"{folder}: built with {' and with '.join(different)}. {passport.backend} decides whether it loads; it may run "
        f"slower than one that is built here: {passport.rebuild}"
    ]


def checked_engine(folder: Path, passport: Passport, graph: GraphName) -> MappedFile:
    """Maps an engine's file into memory, after checking its SHA-256 against the passport.

    Load the engine from this mapping: it is what was hashed. Its pages belong to the system's file cache, which can
    free them; a copy could be as large as the free memory of the device.

    Raises:
        EngineError: no such engine, or the file is missing, a link out of the folder, or not the passport's.
    """
    engine = passport.engines.get(graph)
    if engine is None:
        raise EngineError(f"{folder}: holds no engine of {graph}, only {', '.join(passport.engines)}. {_BUILD}")
    path = engine_path(folder, graph)
    size = path.stat().st_size
    if size == engine.size:
        mapped = _map(path)
        if mapped.sha256() == engine.sha256:
            return mapped
        mapped.close()
    raise EngineError(
        f"{path}: not the engine that its passport names ({size} bytes, expected {engine.size}), so it was "
        f"exchanged or damaged; it was not loaded. Build it again: {passport.rebuild}"
    )


def check_engine(folder: Path, passport: Passport, graph: GraphName) -> None:
    """Refuses an engine that is not the passport's; errors as `checked_engine`."""
    checked_engine(folder, passport, graph).close()


def trusted_engine(folder: Path, graph: GraphName) -> MappedFile:
    """Maps an engine's file into memory without checking its hash, because the user trusts it.

    Raises:
        EngineError: the file is missing, empty, a link out of the folder, or not a plain file.
    """
    return _map(engine_path(folder, graph))


def engine_path(folder: Path, graph: GraphName) -> Path:
    """Returns the path of an engine, after checking that it is a plain file inside its folder.

    Raises:
        EngineError: it is missing, a link out of the folder, or not a plain file.
    """
    path = folder / engine_file(graph)
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            raise EngineError(f"{path} is a link that leaves its folder; put the file itself there. {_BUILD}")
        open_plain(path).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise EngineError(f"{path}: {getattr(error, 'strerror', None) or error}. {_BUILD}") from error
    return path


def _map(path: Path) -> MappedFile:
    try:
        return MappedFile(path)
    except OSError as error:
        raise EngineError(f"{path}: {error.strerror}. {_BUILD}") from error


def engine_folders(bundle: str | Path, backend: EngineBackend) -> list[Path]:
    """The folders of a bundle whose names are those of a backend's engines, sorted. They are not opened.

    Links that leave the bundle are skipped.
    """
    root = Path(bundle) / ENGINES
    if not root.is_dir():
        return []
    ours = re.compile(rf"[^.].*-{re.escape(backend)}[0-9].*")
    inside = Path(bundle).resolve()
    return sorted(
        path
        for path in root.iterdir()
        if path.is_dir() and ours.fullmatch(path.name) and path.resolve().is_relative_to(inside)
    )


def folder_name(device: str, backend: EngineBackend, version: str, precision: Precision) -> str:
    """The name of a folder of engines; `device` is a GPU's name or a list such as `sm86+89`."""
    plain = "".join(char if char.isalnum() or char in "+." else "_" for char in device.lower()).strip("_.")
    return f"{plain}-{backend}{version}-{precision}"


_BUILD = "Build the engines again: moebius-export trt BUNDLE --fp16"


def _newer_minor(version: str, built_by: str) -> bool:
    here, there = ([int(part) for part in text.split(".") if part.isdigit()] for text in (version, built_by))
    return bool(here and there) and here[0] == there[0] and here >= there


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12] + "..."
