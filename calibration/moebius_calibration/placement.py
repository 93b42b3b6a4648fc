"""Placement files: which nodes of a known network are INT8, so that a bundle only needs calibrated ranges.

A file names nodes as `choice.graphs.same_node` does, so that it fits the guided and the conditional graph. Its topology
is that of `moebius_export.precision.shipped.topology_of`. `moebius-export int8 BUNDLE --save-placement FILE` writes one
from a search; `--placement FILE` applies it in place of the shipped one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moebius_calibration.choice.best_scheme import ALPHAS
from moebius_calibration.choice.graph_work import GraphWork
from moebius_calibration.choice.graphs import same_node
from moebius_calibration.plan import Int8Plan, Observer, Target
from moebius_export.errors import ExportError
from moebius_export.graph.opened import Opened
from moebius_export.precision.shipped import is_topology_of, topology_of
from moebius_runtime.bundle.json_files import Sha256, ShortText, StrictModel, read_json
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.files import atomic_write

_FOLDER = Path(__file__).parent
RELEASED: Mapping[Target, Path] = MappingProxyType(
    {
        "tensorrt": _FOLDER / "released_tensorrt.json",
        "tensorrt-fp8": _FOLDER / "released_tensorrt.json",
        "ort-cpu": _FOLDER / "released_ort_cpu.json",
    }
)
"""The files for the released network; FP8 quantizes the same nodes as INT8."""

_MAX_BYTES = 4 << 20
_Name = Annotated[str, Field(min_length=1, max_length=300)]


class GraphPlacement(StrictModel):
    """The quantized nodes of one graph, and how their numbers are computed.

    Attributes:
        observer: the observer of its ranges.
        smooth: strength of SmoothQuant; None for none.
        bias_correction: whether the mean error of the weights is corrected.
        nodes: the quantized nodes.
    """

    observer: Observer
    smooth: Annotated[float, Field(gt=0, lt=1)] | None = None
    bias_correction: bool = False
    nodes: Annotated[list[_Name], Field(max_length=65536)]


class ShippedPlacement(StrictModel):
    """The quantized nodes of a network.

    Attributes:
        target: of the search; `tensorrt` is also used for `tensorrt-fp8`.
        topology: of the graph `unet`.
        network: a description of the network.
        derived: a description of what the placement was derived from.
        graphs: the searched U-Net, whose nodes the other one takes over, and those of the VAE. Others stay in float.
        conditional_topology: of the conditional graph, which a network whose guidance is distilled has as `unet`; None
            does not serve such networks.
    """

    schema_version: Literal[1] = 1
    target: Literal["tensorrt", "ort-cpu"]
    topology: Sha256
    network: ShortText
    derived: ShortText
    graphs: dict[GraphName, GraphPlacement]
    conditional_topology: Sha256 | None = None

    @model_validator(mode="after")
    def _one_unet(self) -> ShippedPlacement:
        if len([name for name in self.graphs if name.startswith("unet")]) != 1:
            raise ValueError("expected one of the graphs unet and unet_conditional, whose nodes the other takes over")
        return self

    @property
    def unet(self) -> GraphPlacement:
        """The placement of both U-Net graphs."""
        return next(placement for name, placement in self.graphs.items() if name.startswith("unet"))

    def of(self, graph: GraphName) -> GraphPlacement | None:
        """The placement of a graph; None where it stays in float."""
        return self.unet if graph.startswith("unet") else self.graphs.get(graph)

    def mismatch(self, target: Target, unet: Opened, works: Mapping[GraphName, GraphWork]) -> str:
        """The reason why the placement does not fit this bundle; empty where it fits."""
        if (target == "ort-cpu") != (self.target == "ort-cpu"):
            return f"it is for {self.target}, expected {target}"
        if not is_topology_of(unet, self.topology, self.conditional_topology):
            return f"the topology is {topology_of(unet)[:12]}, the placement's {self.topology[:12]}"
        for name, work in works.items():
            placement = self.of(name)
            there = {same_node(node) for node in work.groups}
            if placement is not None and (strange := [node for node in placement.nodes if node not in there]):
                return f"{name} has no node {min(strange)}, which the placement names"
        return ""


def placement_from(
    plans: Mapping[GraphName, Int8Plan],
    unet: Opened,
    network: str,
    derived: str,
    conditional: Opened | None = None,
) -> ShippedPlacement:
    """The placement of a search, for every bundle of the network.

    Args:
        plans: of all graphs.
        unet: the graph `unet`, opened.
        network, derived: see `ShippedPlacement`.
        conditional: the conditional graph, opened; None where the bundle has none.

    Raises:
        ExportError: no plan of a U-Net comes from a search.
    """
    (target,) = {plan.target for plan in plans.values()}
    searched = {name: plan for name, plan in plans.items() if any(key.startswith("all, ") for key in plan.errors)}
    if not any(name.startswith("unet") and plan.trials for name, plan in searched.items()):
        raise ExportError(
            "the INT8 plan of the U-Net does not come from a search, so there is no placement to write: run "
            f"`moebius-export int8 BUNDLE --target {target} --search` first"
        )
    main = next(name for name, plan in searched.items() if name.startswith("unet") and plan.trials)
    graphs = {
        name: _of_search(plan)
        for name, plan in searched.items()
        if plan.chosen and (name == main or not name.startswith("unet"))
    }
    graphs.setdefault(main, _of_search(plans[main]))
    return ShippedPlacement(
        target="ort-cpu" if target == "ort-cpu" else "tensorrt",
        topology=topology_of(unet),
        network=network,
        derived=derived,
        graphs=graphs,
        conditional_topology=None if conditional is None else topology_of(conditional),
    )


def _of_search(plan: Int8Plan) -> GraphPlacement:
    """The placement of one searched plan; `best_scheme` decides on SmoothQuant and bias correction."""
    best, smooth = plan.errors[f"all, {plan.observer}"], None
    for alpha in ALPHAS:
        if (error := plan.errors.get(f"all, smooth {alpha:g}", best)) < best:
            best, smooth = error, alpha
    corrected = plan.errors.get("all, bias correction", best) < best
    nodes = sorted({same_node(node) for node in plan.chosen})
    return GraphPlacement(observer=plan.observer, smooth=smooth, bias_correction=corrected, nodes=nodes)


def write_placement(placement: ShippedPlacement, path: Path) -> None:
    """Writes the file, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write((json.dumps(placement.model_dump(mode="json"), indent=1) + "\n").encode())


def read_placement(path: Path) -> ShippedPlacement:
    """Returns the placement of a file; `ExportError` as `moebius_runtime.bundle.json_files.read_json`."""
    expected = "a placement that `moebius-export int8 BUNDLE --save-placement FILE` wrote"
    return read_json(path, ShippedPlacement, _MAX_BYTES, expected, ExportError)
