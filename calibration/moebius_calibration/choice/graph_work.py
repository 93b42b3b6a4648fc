"""One graph of a bundle, opened: the nodes that a plan has a choice for, and the sessions that evaluate it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx

from moebius_calibration.choice.evaluator import Evaluator, Inputs
from moebius_calibration.choice.simulate import Switched
from moebius_calibration.graph.cpu_candidates import Candidate, candidates
from moebius_calibration.graph.gain import Rates, gain_of
from moebius_calibration.graph.linear_ops import LinearOp, constant_values, linear_ops_of, source_of
from moebius_calibration.plan import Target
from moebius_calibration.ranges.formats import FORMATS, Format
from moebius_calibration.ranges.scheme import Scheme, constant_activations
from moebius_calibration.ranges.statistics import Statistics
from moebius_export.graph.opened import Opened, opened
from moebius_export.graph.sessions import session_of
from moebius_runtime.bundle.manifest import GraphName


@dataclass
class GraphWork:
    """A float32 graph and its nodes that could be quantized.

    Attributes:
        name, path, graph: its float32 file, opened.
        target: which runtime its INT8 file is for.
        groups: node -> the linear operators that are quantized with it. For TensorRT each operator is a node of its
            own; on the CPU a fused node has several.
        weights: float32 values of the operators' weights, by tensor name.
        float_reasons: nodes that stay in float -> why.
        aliases: names that the target's operators give to activations -> the value that the range is measured on.
    """

    name: GraphName
    path: Path
    graph: Opened
    target: Target
    groups: dict[str, list[LinearOp]]
    weights: dict[str, np.ndarray]
    float_reasons: dict[str, str] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, name: GraphName, path: Path, target: Target, keep: Collection[str] = ()) -> GraphWork:
        """Opens a float32 file; its weights are mapped, not loaded.

        `keep`: functions that stay functions, as in the FP16 plan; for TensorRT alone.
        """
        graph = Opened(opened(path, () if target == "ort-cpu" else keep))
        ops = linear_ops_of(graph)
        groups = {node: [op] for node, op in ops.items()}
        float_reasons: dict[str, str] = {}
        aliases: dict[str, str] = {}
        if target == "ort-cpu":
            model = onnx.load(str(path), load_external_data=False)
            found, float_reasons = candidates(model)
            groups = {node: _ops_of_candidate(candidate, ops, graph) for node, candidate in found.items()}
            float_reasons |= {
                node: "its operators are not among those of the inlined graph" for node in groups if not groups[node]
            }
            groups |= {node: [] for node in float_reasons}
            results = {function.name: function.output[0] for function in model.functions}
            inlined = {n.output[0]: f"{n.name}/{results[n.op_type]}" for n in model.graph.node if n.op_type in results}
            aliases = {
                value: source_of(graph, value if value in graph.producers else inlined.get(value, value))
                for candidate in found.values()
                for value in candidate.activations
            }
        own = [op for group in groups.values() for op in group]
        wanted = list(dict.fromkeys(op.weight.value for op in own if op.weight is not None))
        weights = constant_values(graph, path.parent, wanted)
        return cls(name, path, graph, target, groups, weights, float_reasons, aliases)

    @property
    def ops(self) -> dict[str, LinearOp]:
        """All linear operators that could be quantized."""
        return {op.node: op for group in self.groups.values() for op in group}

    @property
    def open_groups(self) -> dict[str, list[LinearOp]]:
        """The groups of nodes that have no reason to stay in float."""
        return {node: group for node, group in self.groups.items() if node not in self.float_reasons}

    @property
    def open_ops(self) -> dict[str, LinearOp]:
        """The operators of `open_groups`."""
        return {op.node: op for group in self.open_groups.values() for op in group}

    @property
    def symmetric(self) -> bool:
        """Whether the target's activations are quantized symmetrically."""
        return self.target != "ort-cpu"

    @property
    def number_format(self) -> Format:
        """The number format of the target."""
        return FORMATS[self.target]

    def nodes(self, ops: Collection[str]) -> set[str]:
        """The nodes whose operators are all among these."""
        return {node for node, group in self.groups.items() if group and all(op.node in ops for op in group)}

    def keep_in_float(self, statistics: Statistics, rates: Rates | None) -> None:
        """Records the nodes that cannot be quantized, or that would not become faster by these rates.

        `rates`: of the device, in microseconds; None takes any gain.
        """
        constant = constant_activations(statistics, self.ops)
        for node, group in self.groups.items():
            if values := [constant[op.node] for op in group if op.node in constant]:
                what = f"constant: {values[0]} had one value in every picture, which gives no range"
                self.float_reasons.setdefault(node, what)
            if rates is not None and (gain := gain_of(group, rates)) <= 0:
                self.float_reasons.setdefault(node, f"no gain: INT8 would take {-gain:.3g} us more by the cost model")

    def evaluator(self, samples: Sequence[Inputs]) -> Evaluator:
        """The evaluator of this graph on recorded inputs."""
        return Evaluator(samples, session_of(self.graph.model, self.path.parent))

    def switched(self, scheme: Scheme, weights_only: bool = False) -> Switched:
        """A session that simulates a scheme, with a switch for each of `open_ops`."""
        return Switched(self.graph, self.path.parent, self.open_ops, scheme, self.weights, weights_only)


def _ops_of_candidate(candidate: Candidate, ops: Mapping[str, LinearOp], graph: Opened) -> list[LinearOp]:
    """The inlined operators that a CPU node stands for: those of its weights, or of weights computed from them."""
    found = []
    for name, op in ops.items():
        if op.weight is None or not (name == candidate.node or name.startswith(f"{candidate.node}/")):
            continue
        if op.weight.value in candidate.weights or op.weight.value not in graph.stored:
            found.append(op)
    return found
