"""Runs all checks of a bundle."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from moebius_export.errors import ExportError
from moebius_export.graph.sessions import profiled_session, session_of_functions
from moebius_export.trajectories.scenes import Inputs, Scene, seeded_inputs, seeded_scene
from moebius_export.verify import declared
from moebius_export.verify.bisect import bisect
from moebius_export.verify.budgets import budgets_for
from moebius_export.verify.graphs import compare, failure_hint, parity_checks
from moebius_export.verify.mixed_precision import EMULATED, emulated_session, mixed_precision_checks
from moebius_export.verify.pictures import (
    Filled,
    OnStep,
    fill_emulated,
    fill_with_ort,
    fill_with_torch,
    picture_checks,
    trajectory_checks,
)
from moebius_export.verify.placement import placement_checks
from moebius_export.verify.reference import Progress, Reference, load_reference
from moebius_export.verify.results import Check, Report
from moebius_export.verify.weights import norm_pairs, weight_checks
from moebius_runtime import kernels
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.errors import BundleError
from moebius_runtime.sampling.choice import timesteps_of

SHORT_STEPS = 4
_TOOLS = ("torch", "diffusers", "onnx", "onnxruntime", "polygraphy", "numpy")


@dataclass(frozen=True)
class VerifyOptions:
    """Options of a verification.

    Attributes:
        weights, vae: PyTorch's weights, if they are not at the manifest's origin; see `moebius.weights.checkpoint`.
        precisions: None takes every precision of the bundle.
        steps: inference steps of the trajectory and the picture; None takes the bundle's default.
        seed: of inputs, scene and noise.
        bisect: name the first wrong tensor of each file that fails.
        budgets: changes to the table of `budgets`.
    """

    weights: str | None = None
    vae: str | None = None
    precisions: tuple[Precision, ...] | None = None
    steps: int | None = SHORT_STEPS
    seed: int = 1
    bisect: bool = False
    budgets: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Run:
    """The context of one verification."""

    bundle: Bundle
    reference: Reference
    options: VerifyOptions
    report: Report
    progress: Progress


def verify(path: str | Path, options: VerifyOptions, progress: Progress = lambda text: None) -> Report:
    """Compares every file of a bundle with PyTorch: manifest, weights, outputs, latents and a picture.

    Args:
        path: the bundle's folder.
        options: see `VerifyOptions`.
        progress: called with each step.

    Returns:
        The report. Its `exit_code` is 0 only if every check was run and passed.

    Raises:
        BundleError: no bundle there, or a manifest that cannot be read.
        CheckpointError: PyTorch's weights cannot be loaded.
        ExportError: the bundle was exported from other weights, or has no file of a requested precision.
        InputError: the steps or the seed are out of range.
    """
    bundle = Bundle.open(path, rehash=True)
    candidates = _candidates(bundle, options)
    steps = options.steps or bundle.manifest.defaults.num_inference_steps
    defaults = bundle.manifest.defaults
    timesteps = timesteps_of(bundle.manifest.schedule.build(), defaults.sampler, steps, defaults.strength)
    scene = seeded_scene(bundle.manifest, steps, options.seed)
    progress("weights")
    reference = load_reference(bundle.manifest, options.weights, options.vae, progress)
    model = bundle.manifest.model
    facts = {
        "bundle": str(path),
        "network": f"preset {model.preset}, {reference.parameters:,} parameters in the U-Net",
        "U-Net": f"{model.unet.origin}, SHA-256 {model.unet.sha256[:16]}",
        "VAE": f"{model.vae.origin}, SHA-256 {model.vae.sha256[:16]}",
        "reference": "eager PyTorch on the CPU, float32",
        "compiled kernels": kernels.in_words(),
        "steps": f"{steps} (timesteps {', '.join(map(str, timesteps.tolist()))}), guidance "
        f"{bundle.manifest.defaults.guidance_scale:g}, seed {options.seed}",
        "versions": ", ".join(f"{name} {metadata.version(name)}" for name in _TOOLS)
        + f", Python {platform.python_version()}",
    }
    run = _Run(bundle, reference, options, Report(str(path), facts, bundle.manifest.stand_in), progress)
    checks = run.report.checks
    progress("files")
    found, sound = declared.file_checks(bundle, candidates)
    checks += declared.manifest_checks(bundle.manifest, reference) + found
    for candidate in sound:
        _check_graph(run, candidate)
    _check_pictures(run, candidates, sound, scene, timesteps.tolist())
    checks += declared.unlisted_checks(bundle)
    return run.report


def _candidates(bundle: Bundle, options: VerifyOptions) -> list[declared.Candidate]:
    wanted = options.precisions
    found: list[declared.Candidate] = [
        (graph, precision)
        for graph, info in bundle.manifest.graphs.items()
        for precision in info.files
        if wanted is None or precision in wanted
    ]
    if missing := set(wanted or ()) - {precision for _, precision in found}:
        raise ExportError(f"{bundle.path} has no file of precision {', '.join(sorted(missing))}; leave --precision out")
    return found


def _check_graph(run: _Run, candidate: declared.Candidate) -> None:
    """Checks weights, output and placement of one file, and bisects it if it fails."""
    graph, precision = candidate
    subject, checks = declared.subject(candidate), run.report.checks
    budgets = budgets_for(precision, run.options.budgets)
    if budgets is None:
        checks.append(_no_budgets("parity", subject, precision))
        return
    run.progress(f"{subject}: against PyTorch")
    module, info = run.reference.modules[graph], run.bundle.graph(graph)
    inputs = seeded_inputs(graph, run.bundle.manifest, run.options.seed)
    path = run.bundle.model_file(graph, precision)
    if precision in EMULATED:
        _check_mixed_precision(run, candidate, budgets, inputs)
        return
    try:
        with norm_pairs(module) as pairs, profiled_session(path) as profiled:
            compared = compare(profiled.session, module, info, inputs)
        compiled = profiled.kernels in kernels.VARIANTS
        runs = [(f"{subject}, kernels {profiled.kernels}" if compiled else subject, compiled, compared)]
        profiled.session = None  # its memory is needed
        if compiled:
            run.progress(f"{subject}: the functions' bodies against PyTorch")
            compared = compare(session_of_functions(path), module, info, inputs)
            runs.append((f"{subject}, function bodies", False, compared))
    except BundleError as error:
        checks.append(Check("parity", subject, "relative error", "fail", detail=str(error)))
        return
    found: list[Check] = []
    for name, _, compared in runs:
        more = parity_checks(name, compared, budgets)
        if any(check.status == "fail" for check in more):
            scaling = run.reference.sizes.vae.scaling_factor
            hint = failure_hint(graph, compared, run.reference.modules, inputs, scaling)
            more = parity_checks(name, compared, budgets, hint)
        found += more
    rewritten = any(rewrite.graph == graph for rewrite in run.bundle.manifest.rewrites)
    found += weight_checks(subject, path, module, pairs, rewritten)
    failed = {check.subject for check in found if check.status == "fail"}
    if run.options.bisect and failed:
        run.progress(f"{subject}: looking for the first wrong tensor")
        # A fault of the file shows in its function bodies too; kernels are bisected only if they alone fail.
        compiled = all((name in failed) == with_kernels for name, with_kernels, _ in runs)
        found.append(_bisected(subject, path, run, graph, inputs, budgets["relative"], compiled))
    placed, placement = placement_checks(subject, precision, path, profiled.events, budgets["found"])
    if placement is not None:
        run.report.placements.append(placement)
    checks += found + placed


def _check_mixed_precision(
    run: _Run, candidate: declared.Candidate, budgets: Mapping[str, float], inputs: Inputs
) -> None:
    """Checks output, types and weights of one mixed-precision file, whose arithmetic is emulated."""
    graph, precision = candidate
    subject, checks = f"{declared.subject(candidate)}, emulated", run.report.checks
    module, path = run.reference.modules[graph], run.bundle.model_file(graph, precision)
    try:
        compared = compare(emulated_session(path), module, run.bundle.graph(graph), inputs)
        checks += parity_checks(subject, compared, budgets)
        found, placement = mixed_precision_checks(declared.subject(candidate), run.bundle, graph, precision)
    except (BundleError, ExportError) as error:
        checks.append(Check("parity", subject, "relative error", "fail", detail=str(error)))
        return
    checks += found
    if placement is not None:
        run.report.placements.append(placement)


def _bisected(
    subject: str, path: Path, run: _Run, graph: GraphName, inputs: Inputs, tolerance: float, compiled: bool
) -> Check:
    try:
        return bisect(subject, path, run.reference.modules[graph], inputs, tolerance, compiled)
    except BundleError as error:
        return Check("bisect", subject, "first wrong tensor", "not run", detail=str(error))


def _check_pictures(
    run: _Run,
    candidates: list[declared.Candidate],
    sound: list[declared.Candidate],
    scene: Scene,
    timesteps: list[int],
) -> None:
    """Checks trajectory and picture of each precision against those of PyTorch, which are computed once."""
    theirs: Filled | None = None
    for precision in dict.fromkeys(precision for _, precision in candidates):
        subject = f"{precision}, emulated" if precision in EMULATED else f"{precision} on ort-cpu"
        budgets = budgets_for(precision, run.options.budgets)
        damaged = [graph for graph, kind in candidates if kind == precision and (graph, kind) not in sound]
        if budgets is None or precision not in ("fp32", *EMULATED):
            run.report.checks.append(_no_budgets("picture", subject, precision))
            continue
        without = [name for name in run.bundle.manifest.graphs if precision not in run.bundle.graph(name).files]
        if damaged or without:
            reason = f"the files of {', '.join(damaged)} are damaged"
            if not damaged:
                reason = f"{', '.join(without)}: no {precision} file, and a run in {precision} needs all of them"
            run.report.checks += [
                Check(area, subject, area, "not run", detail=reason) for area in ("trajectory", "picture")
            ]
            continue
        if theirs is None:
            theirs = fill_with_torch(run.bundle, run.reference, scene, _steps(run.progress, "PyTorch"))
        on_step = _steps(run.progress, subject)
        if precision in EMULATED:
            ours = fill_emulated(run.bundle, precision, scene, on_step)
        else:
            ours = fill_with_ort(run.bundle, scene, on_step)
        found, trajectory = trajectory_checks(subject, timesteps, theirs, ours, budgets["drift"])
        run.report.trajectories.append(trajectory)
        more, shown = picture_checks(subject, scene, theirs, ours, budgets)
        run.report.pictures += [shown] if shown else []
        run.report.checks += found + more


def _steps(progress: Progress, who: str) -> OnStep:
    return lambda done, total: progress(f"{who}: step {done} of {total}")


def _no_budgets(area: str, subject: str, precision: str) -> Check:
    reason = f"this version has no budgets for {precision}; the command that wrote the files compared them with fp32"
    return Check(area, subject, "relative error" if area == "parity" else area, "not run", detail=reason)
