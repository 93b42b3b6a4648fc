"""Aggregates the rounds of one variant into its result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moebius_bench.measure.costs import STAGE_GRAPHS
from moebius_bench.measure.power import energy
from moebius_bench.measure.processes import Answer
from moebius_bench.measure.results import (
    STAGES,
    BundleFacts,
    PictureRun,
    Power,
    Rate,
    RateKind,
    StageCost,
    Summary,
    VariantResult,
    WorkerResult,
)
from moebius_bench.measure.stats import median, step_stats, summary
from moebius_bench.measure.variants import Variant


@dataclass(frozen=True)
class Round:
    """The result of one process, with the readings of the sensors meanwhile."""

    result: WorkerResult
    answer: Answer


def aggregate(
    variant: Variant,
    rounds: Sequence[Round],
    failure: str | None,
    facts: BundleFacts,
    costs: Mapping[str, Mapping[str, int]],
    rates: Mapping[RateKind, Rate],
    power_source: str,
) -> VariantResult:
    """A variant's result. A failed one keeps no figures, even of the rounds before it failed."""
    row = VariantResult(
        name=variant.name,
        status="failed" if failure else "ok",
        reason=failure,
        runtime=variant.runtime,
        precision=variant.precision,
        threads=variant.threads,
        steps=variant.steps or 0,
        baseline=variant.baseline,
        bundle=facts,
    )
    if failure or not rounds:
        return row
    results = [r.result for r in rounds]
    pictures = [picture for result in results for picture in result.pictures]
    hashes = [result.output_sha256 for result in results]
    steps = [picture.stages["step"] for picture in pictures]
    update = {
        "described": results[0].described,
        "steps": len(steps[0]),
        "import_seconds": summary([result.import_seconds for result in results]),
        "load_seconds": {
            graph: summary([result.load_seconds[graph] for result in results]) for graph in results[0].load_seconds
        },
        "cold_seconds": _cold([result.cold for result in results]),
        "stage_seconds": {
            stage: summary([sum(picture.stages.get(stage, ())) for picture in pictures]) for stage in STAGES
        },
        "total_seconds": summary([picture.total for picture in pictures]),
        "step": step_stats(steps),
        "step_series": steps,
        "peak_memory": max(result.peak_memory for result in results),
        "peak_device_memory": max((r.answer.peak_device_memory or 0 for r in rounds), default=0) or None,
        "power": _power(rounds, power_source),
        "cost": _stage_costs(pictures, _of_loaded(costs, results[0]), rates),
        "output_sha256": hashes,
    }
    if len(set(hashes)) > 1:
        update["status"] = "unstable"
        update["reason"] = "the picture differs between rounds though seed and input are the same"
    return row.model_copy(update=update)


def _of_loaded(costs: Mapping[str, Mapping[str, int]], result: WorkerResult) -> dict[str, Mapping[str, int]]:
    """The costs of the graphs that ran: of the two U-Net graphs only one did."""
    return {graph: cost for graph, cost in costs.items() if graph in result.load_seconds}


def _cold(runs: Sequence[PictureRun]) -> dict[str, Summary]:
    """The first run of each stage in a fresh process."""
    return {
        stage: summary([run.stages[stage][0] for run in runs])
        for stage in STAGES
        if all(run.stages.get(stage) for run in runs)
    }


def _stage_costs(
    pictures: Sequence[PictureRun], costs: Mapping[str, Mapping[str, int]], rates: Mapping[RateKind, Rate]
) -> dict[str, StageCost]:
    """MACs and speed of one run of each stage that has MACs. A guided step is one run of the U-Net's graph."""
    found = {}
    for stage, graphs in STAGE_GRAPHS.items():
        seconds = [value for picture in pictures for value in picture.stages.get(stage, ())]
        graph = next((name for name in graphs if name in costs), None)
        if graph is None or not seconds:
            continue
        macs, of_bytes = costs[graph]["all"], costs[graph].get("bytes", 0)
        least = _least_seconds({"fp32": macs - of_bytes, "bytes": of_bytes}, rates)
        took = median(seconds)
        found[stage] = StageCost(
            macs=macs,
            macs_per_second=macs / took,
            share_of_rate=None if least is None else least / took,
            byte_macs=of_bytes,
            least_seconds=least,
        )
    return found


def _least_seconds(macs: Mapping[RateKind, int], rates: Mapping[RateKind, Rate]) -> float | None:
    """The time of these MACs at the machine's rates; None where a rate was not measured."""
    if any(count and kind not in rates for kind, count in macs.items()):
        return None
    return sum(count / rates[kind].macs_per_second.median for kind, count in macs.items() if count)


def _power(rounds: Sequence[Round], source: str) -> Power | None:
    joules, watts = [], []
    for r in rounds:
        for picture in r.result.pictures:
            spent = energy(r.answer.samples, picture.began, picture.began + picture.total)
            if spent is not None:
                joules.append(spent)
                watts.append(spent / picture.total)
    return Power(source=source, joules_per_picture=summary(joules), watts=summary(watts)) if joules else None
