"""Checks the manifest against the network and the files. Runs no graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import onnx

from moebius.weights.sampling_record import SamplingRecord
from moebius_export.onnx_export.convert import IR_VERSION, OPSET
from moebius_export.verify.reference import Reference
from moebius_export.verify.results import Check, verdict
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Manifest, Precision
from moebius_runtime.bundle.passport import ENGINES, check_bundle, check_engine, engine_file, read_passport
from moebius_runtime.errors import BundleError, EngineError
from moebius_runtime.sampling.schedule import NoiseSchedule

Candidate = tuple[GraphName, Precision]


def subject(candidate: Candidate) -> str:
    """The subject of a file's checks, such as `unet fp32`."""
    return " ".join(candidate)


def manifest_checks(manifest: Manifest, reference: Reference) -> list[Check]:
    """Compares the numbers of the manifest, which the pipeline trusts, with those of the network."""
    geometry, student, vae = manifest.geometry, reference.sizes.student, reference.sizes.vae
    # The defaults of `NoiseSchedule` are those of the training.
    training, declared = NoiseSchedule(), manifest.schedule.build()
    groups: dict[str, list[tuple[str, float, float]]] = {
        "scaling factor": [("scaling_factor", geometry.scaling_factor, vae.scaling_factor)],
        "sizes": [
            ("image_size", geometry.image_size, student.sample_size * vae.downscale),
            ("latent_size", geometry.latent_size, student.sample_size),
            ("latent_channels", geometry.latent_channels, vae.latent_channels),
            ("parameters", manifest.model.parameters, reference.parameters),
        ],
        "schedule": [
            (name, getattr(declared, name), getattr(training, name))
            for name in ("num_train_timesteps", "beta_start", "beta_end")
        ],
    }
    checks = []
    for name, entries in groups.items():
        wrong = [f"{key} is {got}, the network's is {want}" for key, got, want in entries if not _same(got, want)]
        checks.append(verdict("manifest", "manifest", name, "; ".join(wrong) or None))
    return [*checks, _distillation_check(manifest, reference.record)]


def _distillation_check(manifest: Manifest, known: SamplingRecord) -> Check:
    """Compares distilled guidance, sampler and steps with what the weights' `config.json` records."""
    guidance, defaults = manifest.guidance, manifest.defaults
    entries: list[tuple[str, object, object]] = [
        ("guidance.distilled", guidance.distilled if guidance else None, known.guidance_scale),
        ("sampler", defaults.sampler, known.sampler or "ddim"),
        ("num_inference_steps", defaults.num_inference_steps, known.steps or defaults.num_inference_steps),
    ]
    wrong = [f"{name} is {got}, the weights record {want}" for name, got, want in entries if got != want]
    return verdict("manifest", "manifest", "distillation", "; ".join(wrong) or None)


def _same(got: float, want: float) -> bool:
    return math.isclose(got, want, rel_tol=1e-12)


def file_checks(bundle: Bundle, candidates: Sequence[Candidate]) -> tuple[list[Check], list[Candidate]]:
    """Checks that each file is undamaged, valid ONNX and of the pinned versions; returns the checks and sound files."""
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
    """Checks ONNX files and engines that no manifest or passport lists, and the folders of engines."""
    checks = []
    for path in sorted(bundle.path.rglob("*")):
        name = path.relative_to(bundle.path).as_posix()
        if path.suffix == ".plan" and path.parent.parent != bundle.path / ENGINES:
            reason = f"engines belong in a folder of {ENGINES}/ with a passport (`passport.json`); remove this one"
            checks.append(Check("engine", name, "passport", "not run", detail=reason))
        elif path.suffix == ".onnx" and name not in bundle.manifest.files:
            reason = "the manifest does not list this file, so there is nothing to compare it with; remove it"
            checks.append(Check("files", name, "parity", "not run", detail=reason))
    return checks + engine_checks(bundle)


def engine_checks(bundle: Bundle) -> list[Check]:
    """Checks that each folder of engines is undamaged and was built from this bundle's files. Runs no engine."""
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
            named = {engine_file(graph) for graph in passport.engines}
            if strays := sorted(path.name for path in folder.glob("*.plan") if path.name not in named):
                problem = f"{strays[0]}: the passport does not name this engine; remove it"
        except EngineError as error:
            problem = str(error)
        detail = "built from this bundle's files and undamaged; its results must be checked on the device"
        checks.append(verdict("engine", f"{ENGINES}/{folder.name}", "passport", problem, detail))
    return checks
