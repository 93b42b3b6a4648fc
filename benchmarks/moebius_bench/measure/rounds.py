"""A whole measurement: interleaved rounds of all variants, each in a fresh process, and their results."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moebius_bench.measure.aggregate import Round, aggregate
from moebius_bench.measure.processes import Answer, Runner
from moebius_bench.measure.results import (
    RATE_NAMES,
    BundleFacts,
    GraphProfile,
    Rate,
    RateKind,
    Ratio,
    VariantResult,
    WorkerResult,
)
from moebius_bench.measure.stats import median, ratio
from moebius_bench.measure.variants import TORCH, Variant
from moebius_bench.measure.worker_job import Job
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import MANIFEST_NAME

_COMPARED: tuple[Literal["step", "total"], ...] = ("step", "total")
OnTurn = Callable[[int, str], None]
"""Called with the round, from 1, and what runs now."""
RateKey = tuple[str, int | None, RateKind]
"""Runtime, threads, and number format of the matrix products."""


@dataclass(frozen=True)
class Plan:
    """How to measure; see `moebius_bench.measure.worker_job.Job` for what the fields mean to one process."""

    rounds: int = 3
    repeats: int = 1
    warmup_steps: int = 1
    seed: int = 0
    guidance_scale: float | None = None
    image: str | None = None
    mask: str | None = None
    weights: str | None = None
    vae: str | None = None
    profile: bool = False

    def job(self, variant: Variant, kind: str, out: str | None = None) -> Job:
        """A process's part of the plan."""
        return Job(
            kind=kind,  # type: ignore[arg-type]
            bundle=variant.bundle,
            runtime=variant.runtime,
            precision=variant.precision,
            threads=variant.threads,
            steps=variant.steps,
            mode=variant.mode,
            seed=self.seed,
            guidance_scale=self.guidance_scale,
            image=self.image,
            mask=self.mask,
            warmup_steps=self.warmup_steps,
            repeats=self.repeats,
            baseline=variant.baseline,
            weights=self.weights,
            vae=self.vae,
            out=out,
        )


@dataclass
class Measured:
    """The result of a measurement."""

    variants: list[VariantResult]
    ratios: list[Ratio]
    rates: list[Rate]
    notes: list[str]
    order: list[str] = field(default_factory=list)


def measure_variants(
    variants: Sequence[Variant], plan: Plan, run: Runner, on_turn: OnTurn, power_source: str = ""
) -> Measured:
    """Runs every variant once per round, A B A B, so that a drift of the machine affects all of them alike.

    A variant that fails is not run again; the others go on. The machine's matrix-product rate is measured at the
    start of every round, once per library and number of threads, and the INT8 rate where a variant is in INT8.
    """
    facts = {bundle: bundle_facts(bundle) for bundle in {variant.bundle for variant in variants}}
    rounds: dict[str, list[Round]] = {variant.name: [] for variant in variants}
    failures: dict[str, str] = {}
    rates: dict[RateKey, list[Rate]] = {}
    notes: list[str] = []
    order: list[str] = []
    with tempfile.TemporaryDirectory(prefix="moebius-bench-") as folder:
        for number in range(1, plan.rounds + 1):
            for key in dict.fromkeys(key for variant in variants for key in _rate_keys(variant)):
                if number > 1 and key not in rates:
                    continue  # it could not be measured, which is in the notes
                runtime, threads, kind = key
                on_turn(number, f"matrix products in {RATE_NAMES[kind]}, {runtime}")
                precision = "int8_cpu" if kind == "bytes" else "fp32"
                answer = run(Job(kind="rate", runtime=runtime, threads=threads, precision=precision))
                if answer.result is None:
                    notes.append(f"matrix-product rate of {runtime} in {RATE_NAMES[kind]} not measured: {answer.error}")
                else:
                    rates.setdefault(key, []).append(Rate.model_validate(answer.result))
            for index, variant in enumerate(variants):
                if variant.name in failures:
                    continue
                on_turn(number, variant.name)
                order.append(variant.name)
                out = str(Path(folder) / f"{index}.npy")
                answer = run(plan.job(variant, "measure", out))
                if answer.result is None:
                    failures[variant.name] = answer.error or "no reason given"
                else:
                    rounds[variant.name].append(Round(WorkerResult.model_validate(answer.result), answer))
        differences = _differences([Path(folder) / f"{i}.npy" for i in range(len(variants))])
    pooled = {key: _pool(several) for key, several in rates.items()}
    results = []
    for variant, difference in zip(variants, differences, strict=True):
        done, reason = rounds[variant.name], failures.get(variant.name)
        costs, note = ({}, None) if reason else _costs(variant, plan, run, on_turn)
        if note:
            notes.append(f"{variant.name}: {note}")
        profile, note = _profile(variant, plan, run, on_turn) if plan.profile and not reason else ([], None)
        if note:
            notes.append(f"{variant.name}: {note}")
        own = {key[2]: pooled[key] for key in _rate_keys(variant) if key in pooled}
        result = aggregate(variant, done, reason, facts[variant.bundle], costs, own, power_source)
        results.append(result.model_copy(update={"difference_to_first": difference, "profile": profile}))
    complete = {v.name: rounds[v.name] for v in variants if v.name not in failures}
    return Measured(results, _ratios(variants, complete), list(pooled.values()), notes, order)


def _rate_keys(variant: Variant) -> list[RateKey]:
    """The matrix-product rates that limit a variant; none for a runtime that may use a GPU."""
    if variant.runtime == TORCH and not variant.baseline:
        return []
    kinds: list[RateKind] = ["fp32", "bytes"] if variant.precision == "int8_cpu" else ["fp32"]
    return [(variant.runtime, variant.threads, kind) for kind in kinds]


def bundle_facts(folder: str) -> BundleFacts:
    """Which model a bundle holds. Raises `BundleError` for a folder that is none."""
    bundle = Bundle.open(folder)
    manifest = bundle.manifest
    stated = json.loads((bundle.path / MANIFEST_NAME).read_bytes())["manifest_sha256"]
    return BundleFacts(
        path=str(folder),
        preset=manifest.model.preset,
        parameters=manifest.model.parameters,
        image_size=manifest.geometry.image_size,
        weights=f"{manifest.model.unet.origin}, VAE {manifest.model.vae.origin}",
        stand_in=manifest.stand_in,
        manifest_sha256=stated,
        files={name: file.size for name, file in manifest.files.items()},
        sha256={name: file.sha256 for name, file in manifest.files.items()},
        rewrites={f"{rewrite.graph}: {rewrite.name}": rewrite.count for rewrite in manifest.rewrites},
    )


def _ratios(variants: Sequence[Variant], rounds: dict[str, list[Round]]) -> list[Ratio]:
    """Every baseline over every other variant; without a baseline, the first over the rest."""
    done = [variant for variant in variants if variant.name in rounds]
    bases = [variant for variant in done if variant.baseline] or done[:1]
    ratios = []
    for base in bases:
        for other in (v for v in done if not v.baseline and v is not base):
            for what in _COMPARED:
                above, below = (_per_round(rounds[v.name], what) for v in (base, other))
                ratios.append(ratio(base.name, other.name, what, above, below))
    return ratios


def _per_round(rounds: Sequence[Round], what: str) -> list[float]:
    if what == "total":
        return [median([p.total for p in r.result.pictures]) for r in rounds]
    return [median([s for p in r.result.pictures for s in p.stages["step"]]) for r in rounds]


def _costs(variant: Variant, plan: Plan, run: Runner, on_turn: OnTurn) -> tuple[dict[str, dict[str, int]], str | None]:
    on_turn(plan.rounds, f"cost of {variant.name}")
    answer = run(plan.job(variant, "cost"))
    if answer.result is None:
        return {}, f"cost not counted: {answer.error}"
    return answer.result, None


def _profile(variant: Variant, plan: Plan, run: Runner, on_turn: OnTurn) -> tuple[list[GraphProfile], str | None]:
    on_turn(plan.rounds, f"profile of {variant.name}")
    answer: Answer = run(plan.job(variant, "profile"))
    if answer.result is None:
        return [], f"no profile: {answer.error}"
    return [GraphProfile.model_validate(graph) for graph in answer.result["graphs"]], None


def _pool(rates: Sequence[Rate]) -> Rate:
    """One rate of several processes: the median of their medians, and the extremes of all."""
    medians = [rate.macs_per_second.median for rate in rates]
    pooled = rates[0].macs_per_second.model_copy(
        update={
            "median": median(medians),
            "min": min(rate.macs_per_second.min for rate in rates),
            "max": max(rate.macs_per_second.max for rate in rates),
            "count": sum(rate.macs_per_second.count for rate in rates),
        }
    )
    return rates[0].model_copy(update={"macs_per_second": pooled})


def _differences(files: Sequence[Path]) -> list[int | None]:
    """Largest difference of each picture to the first, in levels of 255; None where the two cannot be compared."""
    import numpy as np

    pictures: list[Any] = []
    for file in files:
        try:
            pictures.append(np.load(file, allow_pickle=False).astype(np.int16))
        except (OSError, ValueError):
            pictures.append(None)
    first = pictures[0]
    return [
        None
        if index == 0 or first is None or picture is None or picture.shape != first.shape
        else int(np.abs(picture - first).max())
        for index, picture in enumerate(pictures)
    ]
