"""Times the fp32 and INT8 files of a graph on this machine, because the search only has a cost model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from moebius_calibration.choice.graphs import main_graph, may_stay_float
from moebius_calibration.plan import Int8Plan
from moebius_export.trajectories.scenes import seeded_inputs
from moebius_runtime.backends import create_backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision

_ROUNDS = 5


@dataclass(frozen=True)
class Compared:
    """Median seconds of a run, and `ratio`: the median over rounds of fp32 over INT8 time."""

    float32: float
    int8: float
    ratio: float

    @property
    def times(self) -> str:
        """Both times."""
        return f"fp32 {self.float32:.3g} s, INT8 {self.int8:.3g} s"

    @property
    def message(self) -> str:
        """The result, as a sentence."""
        if self.ratio > 1:
            return f"a run on this machine: {self.times}, {self.ratio:.2f} times as fast"
        return (
            f"INT8 does not win on this machine: {self.times}; the runtime uses fp32 unless --precision names int8_cpu"
        )


def compare_all(bundle: Bundle, plans: Mapping[GraphName, Int8Plan]) -> dict[GraphName, Compared]:
    """Compares the U-Net graph that makes pictures by default, and each graph of the VAE that has INT8 nodes."""
    main = main_graph(bundle)
    wanted = [n for n, plan in plans.items() if plan.chosen and (n == main or may_stay_float(n, plan.target))]
    return {name: compare(bundle, name) for name in wanted}


def without_slower(
    plans: Mapping[GraphName, Int8Plan], compared: Mapping[GraphName, Compared]
) -> dict[GraphName, Int8Plan]:
    """The plans, where the graphs of the VAE that INT8 does not make faster stay in float."""
    kept = dict(plans)
    for name, times in compared.items():
        plan = plans[name]
        if times.ratio <= 1 and may_stay_float(name, plan.target):
            why = f"no gain: this graph is not faster in INT8 on this machine ({times.times})"
            reasons = plan.reasons | dict.fromkeys(plan.chosen, why)
            nodes = dict.fromkeys(plan.nodes, "float")
            verdict = f"INT8 does not ship: {times.times} on this machine; this graph stays in float"
            kept[name] = plan.model_copy(update={"nodes": nodes, "reasons": reasons, "verdict": verdict})
    return kept


def compare(bundle: Bundle, graph: GraphName, rounds: int = _ROUNDS) -> Compared:
    """Runs the fp32 and int8_cpu files of a graph alternately, after one warm-up run of each; both are in memory.

    Raises:
        BundleError: one of the files is missing or damaged.
    """
    wanted: tuple[Precision, Precision] = ("fp32", "int8_cpu")
    backends = {precision: create_backend(bundle, "ort-cpu", precision=precision) for precision in wanted}
    inputs = seeded_inputs(graph, bundle.manifest, 0)
    seconds: dict[str, list[float]] = {precision: [] for precision in wanted}
    try:
        for backend in backends.values():
            backend.load(graph)
            backend.run(graph, inputs)
        for _ in range(rounds):
            for precision, backend in backends.items():
                started = time.perf_counter()
                backend.run(graph, inputs)
                seconds[precision].append(time.perf_counter() - started)
    finally:
        for backend in backends.values():
            backend.release()
    ratio = median(a / b for a, b in zip(seconds["fp32"], seconds["int8_cpu"], strict=True))
    return Compared(median(seconds["fp32"]), median(seconds["int8_cpu"]), ratio)
