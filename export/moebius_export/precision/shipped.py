"""Shipped precision plans: the modules of a known network that stay float32, found once by a search.

A file names modules and weights, not nodes, so one file fits every lowering of the network, the guided and the
conditional graph, with functions inlined or kept. Its topology is a hash of the names and shapes of all weights and of
the names of all modules that compute: another network, or one whose modules are called otherwise, has another.

`moebius-export precision BUNDLE --save-plan FILE` writes such a file from the plan of a search; `--plan FILE` applies
it in place of `released.json`, which is that file for the released network.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moebius_export.errors import ExportError
from moebius_export.graph.kinds import LowType
from moebius_export.graph.opened import Opened
from moebius_export.precision.choose import module_path, node_kind
from moebius_export.precision.plan import Measured, Plan
from moebius_runtime.bundle.json_files import Sha256, ShortText, StrictModel, read_json, write_json

RELEASED = Path(__file__).with_name("released.json")
"""The file for the released network."""

_MAX_BYTES = 1 << 20
_NUMBERED = re.compile(r"val_\d+")
_Error = Annotated[float, Field(ge=0, lt=1e30)]
_Name = Annotated[str, Field(min_length=1, max_length=300)]


class KeptModule(StrictModel):
    """A module whose nodes of one kind stay float32: its `products` or the `rest`, as in `choose.node_kind`.

    `part` is the part of the search that held them and `error` the relative L2 error of a guided step that this part
    causes alone in the lower type.
    """

    module: _Name
    kind: Literal["products", "rest"]
    part: ShortText
    error: _Error


class ShippedPlan(StrictModel):
    """The result of a search for a network.

    Attributes:
        topology: of the guided graph, see `topology_of`.
        network: which one it is, in words.
        precision: the lower type of the search. The same modules are kept in the other type, whose errors are larger
            by one factor throughout.
        derived: what the plan was derived from, in words: a search, and whose weights it was made with.
        measured: the search's pictures.
        errors: of the search, as in `plan.Plan`.
        modules: those that stay float32 for their error. What stays by the fixed rules is not listed.
        weights: stored in float32 for their error; names without the wrapper of the guided graph, see `stored_name`.
        conditional_topology: of the conditional graph, which a network whose guidance is distilled has in its place;
            None does not serve such networks.
    """

    schema_version: Literal[1] = 1
    topology: Sha256
    network: ShortText
    precision: LowType
    derived: ShortText
    measured: Measured
    errors: dict[ShortText, _Error]
    modules: Annotated[list[KeptModule], Field(max_length=4096)]
    weights: Annotated[list[_Name], Field(max_length=4096)]
    conditional_topology: Sha256 | None = None

    @model_validator(mode="after")
    def _each_once(self) -> ShippedPlan:
        named = [(entry.module, entry.kind) for entry in self.modules]
        if twice := [pair for pair in named if named.count(pair) > 1]:
            raise ValueError(f"{' '.join(twice[0])} is named twice")
        return self

    @property
    def reasons(self) -> dict[tuple[str, str], str]:
        """(module, kind) -> the reason for float32."""
        return {
            (entry.module, entry.kind): f"error: {entry.part} costs {entry.error:.1e} in the search of the shipped plan"
            for entry in self.modules
        }

    def mismatch(self, graph: Opened) -> str:
        """Why the plan is not one of this graph `unet`; empty where it is."""
        if not is_topology_of(graph, self.topology, self.conditional_topology):
            return f"its topology is {topology_of(graph)[:12]}, the plan's {self.topology[:12]}"
        there = modules_of(graph)
        if strange := [key for key in self.reasons if key not in there]:
            return f"it has no {' '.join(min(strange))}, which the plan names"
        stored = {stored_name(name) for name in graph.storable}
        if unknown := [name for name in self.weights if name not in stored]:
            return f"it has no weight {min(unknown)}, which the plan names"
        return ""


def stored_name(name: str) -> str:
    """A weight's name, the same in the guided and the conditional graph."""
    return name.replace(".inner.", ".")


def modules_of(graph: Opened) -> set[tuple[str, str]]:
    """(module, kind) of every node that computes."""
    nodes = graph.model.graph.node
    return {(module_path(node.name), node_kind(node.op_type)) for node in nodes if graph.computes(node)}


def topology_of(graph: Opened) -> str:
    """SHA-256 over the names and shapes of the weights and the modules that compute, sorted.

    Equal for all lowerings of a network and for open and fixed batches; not the same for the guided and the
    conditional graph. The numbers that torch's exporter gives to constants do not count: they change with its versions.
    """
    return _hashed(graph, lambda name: "val" if _NUMBERED.fullmatch(name) else name)


def is_topology_of(graph: Opened, *topologies: str | None) -> bool:
    """Whether one of them is the graph's. Files of version 0.1 have hashes in which the constants' numbers count."""
    return topology_of(graph) in topologies or _hashed(graph, lambda name: name) in topologies


def _hashed(graph: Opened, named: Callable[[str], str]) -> str:
    weights = [[named(stored_name(name)), *graph.stored[name].dims] for name in graph.storable]
    rows = sorted(json.dumps(row) for row in (*weights, *modules_of(graph)))
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def shipped_from(
    plan: Plan, graph: Opened, network: str, derived: str, conditional: Opened | None = None
) -> ShippedPlan:
    """Returns the plan of a search in a format that fits every bundle of the network.

    Args:
        plan: of the guided graph, made by the search.
        graph: that graph, opened.
        network, derived: see `ShippedPlan`.
        conditional: the conditional graph, opened; None where the bundle has none.

    Raises:
        ExportError: the plan is not of the search.
    """
    if "rules" not in plan.errors:
        raise ExportError(
            f"the plan of {plan.graph} was not made by the search, so it holds no errors of parts: run "
            f"`moebius-export precision BUNDLE --to {plan.precision} --search` first"
        )
    errors = {part.name: part.error for part in plan.parts if part.kept}
    modules: dict[tuple[str, str], KeptModule] = {}
    for name, entry in plan.nodes.items():
        part = entry.reason.removeprefix("error: ").partition(" costs ")[0]
        if entry.type != "fp32" or not entry.reason.startswith("error: "):
            continue
        if part not in errors:
            raise ExportError(
                f"the plan of {plan.graph} keeps {name} for {part!r}, which is no kept part; search again"
            )
        kind = node_kind(graph.nodes[name].op_type)
        key = (module_path(name), kind)
        modules[key] = KeptModule(module=key[0], kind=kind, part=part, error=float(f"{errors[part]:.3g}"))
    kept = [name for name, entry in plan.weights.items() if entry.type == "fp32" and entry.reason.startswith("error: ")]
    return ShippedPlan(
        topology=topology_of(graph),
        network=network,
        precision=plan.precision,
        derived=derived,
        measured=plan.measured,
        errors={what: float(f"{error:.3g}") for what, error in plan.errors.items()},
        modules=list(modules.values()),
        weights=sorted({stored_name(name) for name in kept}),
        conditional_topology=None if conditional is None else topology_of(conditional),
    )


def write_shipped(plan: ShippedPlan, path: Path) -> None:
    """Writes the plan, one entry per line, whole or not at all."""
    write_json(plan.model_dump(mode="json"), path)


def read_shipped(path: Path) -> ShippedPlan:
    """Returns the plan of a file; `ExportError` as `moebius_runtime.bundle.json_files.read_json`."""
    expected = "a plan that `moebius-export precision BUNDLE --save-plan FILE` wrote"
    return read_json(path, ShippedPlan, _MAX_BYTES, expected, ExportError)


def kept_nodes(plan: ShippedPlan, graph: Opened) -> Mapping[str, str]:
    """Returns node -> reason for float32, for every node of the modules that the plan keeps."""
    reasons, found = plan.reasons, {}
    for node in graph.model.graph.node:
        reason = reasons.get((module_path(node.name), node_kind(node.op_type)))
        if reason is not None and graph.computes(node):
            found[node.name] = reason
    return found
