"""The choice of engines: for each graph the best one that fits the device, and the reasons why others do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.bundle.passport import (
    Device,
    EngineBackend,
    EngineInfo,
    Passport,
    build_flag,
    check_bundle,
    check_device,
    checked_engine,
    engine_file,
    engine_folders,
    read_passport,
    trusted_engine,
)
from moebius_runtime.errors import EngineError
from moebius_runtime.files import MappedFile

NEEDED: tuple[GraphName, ...] = ("unet", "vae_encoder", "vae_decoder")
PREFERRED: tuple[Precision, ...] = ("fp16", "bf16", "fp32", "int8", "fp8")


@dataclass(frozen=True)
class Candidate:
    """A folder of engines that may be loaded. Unless `trusted`, it was checked against its engine passport.

    `passport` is None if there is none and the user trusts the folder. `notes`: see `check_device`.
    """

    folder: Path
    precision: Precision
    passport: Passport | None
    trusted: bool = False
    notes: tuple[str, ...] = ()

    def info(self, graph: GraphName) -> EngineInfo | None:
        """The passport's entry of an engine, or None."""
        return self.passport.engines.get(graph) if self.passport else None

    def holds(self, graph: GraphName) -> bool:
        """Whether it has an engine of a graph."""
        if self.passport is not None:
            return graph in self.passport.engines
        return (self.folder / engine_file(graph)).exists()

    def read(self, graph: GraphName) -> MappedFile:
        """Maps an engine; unless the folder is trusted, raises `EngineError` if it is not the passport's."""
        if self.trusted or self.passport is None:
            return trusted_engine(self.folder, graph)
        return checked_engine(self.folder, self.passport, graph)

    def flag(self, name: str) -> bool:
        """Whether the engines were built with an option, according to the passport."""
        return self.passport is not None and self.passport.flags.get(name) == "on"


@dataclass(frozen=True)
class Chosen:
    """The folder of each graph's engine, and notes for the user."""

    by_graph: dict[GraphName, Candidate]
    notes: tuple[str, ...]


def choose_engines(
    bundle: Bundle,
    backend: EngineBackend,
    version: str,
    device: Device,
    precision: Precision | None = None,
    trust: bool = False,
) -> Chosen:
    """Chooses the engines to run.

    Args:
        bundle: the bundle.
        backend: the library that will load them.
        version: its version.
        device: the device that will run them.
        precision: required precision of the U-Net; the VAE takes it too, or its best one. None takes the first
            of fp16, bf16, fp32 that fits.
        trust: accept engines whose passport is missing or does not match, with a note.

    Raises:
        EngineError: a graph that every picture needs has no engine that fits; with the reasons.
    """
    folders = engine_folders(bundle.path, backend)
    build = f"moebius-export trt {bundle.name} {build_flag(precision or 'fp16')} --backend {backend}"
    if not folders:
        raise EngineError(f"{bundle.name} holds no engines for {backend}. Build them on this device: {build}")
    fitting: list[Candidate] = []
    refused: list[str] = []
    notes: dict[Path, tuple[str, ...]] = {}
    for folder in folders:
        try:
            fitting.append(_checked(folder, bundle, version, device))
            notes[folder] = fitting[-1].notes
        except EngineError as error:
            if trust:
                fitting.append(_trusted(folder))
                notes[folder] = (f"--trust: {folder} is run though it should be refused: {error}",)
            else:
                refused.append(str(error))
    chosen: dict[GraphName, Candidate] = {}
    for graph in bundle.manifest.graphs:
        exactly = precision if graph.startswith("unet") else None
        able = [
            candidate
            for candidate in fitting
            if candidate.holds(graph) and (exactly is None or candidate.precision == exactly)
        ]
        if able:
            chosen[graph] = min(able, key=lambda candidate: _rank(candidate, device, precision))
    if missing := [graph for graph in NEEDED if graph not in chosen]:
        raise EngineError(_why(missing, fitting, refused, precision, build))
    used = {candidate.folder for candidate in chosen.values()}
    return Chosen(chosen, tuple(note for folder, own in notes.items() if folder in used for note in own))


def _checked(folder: Path, bundle: Bundle, version: str, device: Device) -> Candidate:
    passport = read_passport(folder)
    check_bundle(folder, passport, bundle.manifest)
    notes = check_device(folder, passport, version, device)
    return Candidate(folder, passport.precision, passport, notes=tuple(notes))


def _trusted(folder: Path) -> Candidate:
    """A trusted folder: with its passport if that can be read, else with the precision in its name."""
    try:
        passport = read_passport(folder)
    except EngineError:
        suffix = folder.name.rpartition("-")[2]
        return Candidate(folder, next((one for one in PREFERRED if one == suffix), "fp32"), None, trusted=True)
    return Candidate(folder, passport.precision, passport, trusted=True)


def _rank(candidate: Candidate, device: Device, precision: Precision | None) -> tuple[bool, bool, int, int, str]:
    """Smallest first: without need of trust, of the precision asked for, by precision, built for this GPU, driver."""
    passport = candidate.passport
    far = 0
    if passport is not None:
        far = 4 * (device.sm not in passport.sm) + 2 * (passport.gpu != device.name)
        far += passport.driver not in (None, device.driver)
    order = PREFERRED.index(candidate.precision) if candidate.precision in PREFERRED else len(PREFERRED)
    other = precision is not None and candidate.precision != precision
    return candidate.trusted, other, order, far, candidate.folder.name


def _why(
    missing: Sequence[GraphName],
    fitting: Sequence[Candidate],
    refused: Sequence[str],
    precision: Precision | None,
    build: str,
) -> str:
    if len(refused) == 1 and not fitting:
        return refused[0]
    reasons = "; ".join(refused[:3]) + (f"; and {len(refused) - 3} more" if len(refused) > 3 else "")
    if not fitting:
        return f"none of {len(refused)} folders of engines fits: {reasons}"
    there = ", ".join(candidate.folder.name for candidate in fitting)
    asked = f" in {precision}" if precision else ""
    others = f"; refused: {reasons}" if refused else ""
    return f"no engine of {', '.join(missing)}{asked} among those that fit ({there}){others}. Build it: {build}"
