"""What the manifest says, against the network and the folder: nothing here runs a graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import onnx

from moebius_export.convert import IR_VERSION, OPSET
from moebius_export.verify.reference import Reference
from moebius_export.verify.results import Check, verdict
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import BundleError, EngineError
from moebius_runtime.manifest import GraphName, Manifest, Precision
from moebius_runtime.passport import ENGINES, check_bundle, check_engine, engine_file, read_passport
from moebius_runtime.schedule import NoiseSchedule

Candidate = tuple[GraphName, Precision]


def subject(candidate: Candidate) -> str:
    """How checks call a file: `unet fp32`."""
    return " ".join(candidate)


def manifest_checks(manifest: Manifest, reference: Reference) -> list[Check]:
    """The manifest's numbers against the network's, which the pipeline would otherwise believe unseen."""
    geometry, student, vae = manifest.geometry, reference.sizes.student, reference.sizes.vae
    # The schedule's defaults are those of the training (design/pipeline.md, step 5).
    training, stated = NoiseSchedule(), manifest.schedule.build()
    groups: dict[str, list[tuple[str, float, float]]] = {
        "scaling factor": [("scaling_factor", geometry.scaling_factor, vae.scaling_factor)],
        "sizes": [
            ("image_size", geometry.image_size, student.sample_size * vae.downscale),
            ("latent_size", geometry.latent_size, student.sample_size),
            ("latent_channels", geometry.latent_channels, vae.latent_channels),
            ("parameters", manifest.model.parameters, reference.parameters),
        ],
        "schedule": [
            (name, getattr(stated, name), getattr(training, name))
            for name in ("num_train_timesteps", "beta_start", "beta_end")
        ],
    }
    checks = []
    for name, entries in groups.items():
        wrong = [f"{key} is {got}, the network's is {want}" for key, got, want in entries if not _same(got, want)]
        checks.append(verdict("manifest", "manifest", name, "; ".join(wrong) or None))
    return checks


def _same(got: float, want: float) -> bool:
    return math.isclose(got, want, rel_tol=1e-12)


def file_checks(bundle: Bundle, candidates: Sequence[Candidate]) -> tuple[list[Check], list[Candidate]]:
    """Whether each file is undamaged, of the pinned versions, and valid ONNX; and the candidates of which it is."""
    checks, sound = [], []
    for candidate in candidates:
        graph, precision = candidate
        try:
            path = bundle.model_file(graph, precision)
            onnx.checker.check_model(str(path))
            problem = _versions(path)
        except BundleError as error:
            problem = str(error)
        except Exception as error:  # protobuf's and the checker's exceptions share no base class of their own
            if not type(error).__module__.startswith(("google.protobuf", "onnx")):
                raise
            problem = f"not a valid ONNX file: {' '.join(str(error).split())[:300]}"
        checks.append(verdict("files", subject(candidate), "undamaged and valid", problem))
        if problem is None:
            sound.append(candidate)
    return checks, sound


def _versions(path: Path) -> str | None:
    model = onnx.load(str(path), load_external_data=False)
    opset = {entry.domain: entry.version for entry in model.opset_import}.get("")
    if opset is None or opset > OPSET or model.ir_version > IR_VERSION:
        return f"opset {opset} and IR {model.ir_version}; runtimes on devices read up to {OPSET} and {IR_VERSION}"
    return None


def unlisted_checks(bundle: Bundle) -> list[Check]:
    """Files of the folder that nothing here can compare: ONNX files and engines that are not the manifest's."""
    checks = []
    for path in sorted(bundle.path.rglob("*")):
        name = path.relative_to(bundle.path).as_posix()
        if path.suffix == ".plan" and path.parent.parent != bundle.path / ENGINES:
            reason = f"engines lie in folders of {ENGINES}/ with their passport; nothing says what this is, remove it"
            checks.append(Check("engine", name, "passport", "not run", detail=reason))
        elif path.suffix == ".onnx" and name not in bundle.manifest.files:
            reason = "the manifest does not list this file, so nothing says what it should be; remove it"
            checks.append(Check("files", name, "parity", "not run", detail=reason))
    return checks + engine_checks(bundle)


def engine_checks(bundle: Bundle) -> list[Check]:
    """Whether each folder of engines was built from this bundle's files and is undamaged. None is run."""
    checks = []
    root = bundle.path / ENGINES
    folders = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
    for folder in (folder for folder in folders if not folder.name.startswith(".")):
        problem = None
        try:
            passport = read_passport(folder)
            check_bundle(folder, passport, bundle.manifest)
            for graph in passport.engines:
                check_engine(folder, passport, graph)
            stated = {engine_file(graph) for graph in passport.engines}
            if strays := sorted(path.name for path in folder.glob("*.plan") if path.name not in stated):
                problem = f"{strays[0]}: the passport does not name this engine; remove it"
        except EngineError as error:
            problem = str(error)
        said = "built from this bundle's files and undamaged; its results are checked on the device"
        checks.append(verdict("engine", f"{ENGINES}/{folder.name}", "passport", problem, said))
    return checks
