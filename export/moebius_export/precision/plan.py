"""The precision plan of one graph: the type of every node and weight, and the reason where it stays float32.

It lies in the bundle beside the mixed-precision file and may be edited: `moebius-export precision BUNDLE --reapply`
applies it. Like every file of a bundle it is validated before use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from moebius_export.errors import ExportError
from moebius_export.graph.kinds import FloatType
from moebius_export.graph.opened import Opened
from moebius_export.precision.kept_functions import Keepable
from moebius_runtime.bundle.json_files import Sha256, ShortText, StrictModel, json_lines, read_json
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.files import atomic_write

MAX_PLAN_BYTES = 4 << 20

_Name = Annotated[str, Field(max_length=300)]
_Size = Annotated[float, Field(ge=0)]


class NodeType(StrictModel):
    """A node's type. `largest` and `rms` are of its output over all trajectories; `reason` is why it stays float32."""

    type: FloatType
    largest: _Size | None = None
    rms: _Size | None = None
    reason: ShortText = ""


class WeightType(StrictModel):
    """How a weight is stored. `rounding` is the relative L2 error of storing it in the lower type."""

    type: FloatType
    largest: _Size
    rounding: _Size
    zeroed: Annotated[int, Field(ge=0)]  # numbers that the lower type makes 0
    reason: ShortText = ""


class Part(StrictModel):
    """A part of the graph that was tried in the lower type alone.

    `name` is a module and which of its nodes: its `products`, or the `rest`; `itself`: its submodules are
    parts of their own. `holds` counts its nodes by operator. `error` is the relative L2 error of the graph's output
    that it causes; `gmac` and `mbytes` (of outputs, in float32) are what float32 costs there.
    """

    name: ShortText
    holds: ShortText = ""
    error: _Size
    gmac: _Size
    mbytes: _Size
    kept: bool


class Measured(StrictModel):
    """What the plan was made from: steps and seeds of the trajectories, and where the pictures came from."""

    pictures: Annotated[int, Field(ge=0, le=10_000)]
    steps: Annotated[int, Field(ge=0, le=1000)]
    seed: Annotated[int, Field(ge=0)]
    data: ShortText = "drawn"


class Plan(StrictModel):
    """The plan. `errors` are relative L2 errors of the graph's output in a run.

    `blunt`: everything in the lower type; `weights`: weights stored as planned, computed in float32; `rules`: the fixed
    rules alone; `plan`: as planned; `budget`: what that was to be. `keep`: functions that stay functions in the file;
    a node that calls one has one type. `source`: where the layers that stay float32 for their error come from, where no
    search of this bundle found them.
    """

    schema_version: Literal[1] = 1
    graph: GraphName
    precision: Literal["fp16", "bf16"]
    onnx_sha256: Sha256
    weights_sha256: Sha256 | None
    measured: Measured
    limit: Annotated[float, Field(gt=0)]
    source: ShortText = ""
    keep: Annotated[tuple[Keepable, ...], Field(max_length=1)] = ()
    errors: dict[ShortText, _Size] = Field(default_factory=dict)
    parts: list[Part] = Field(default_factory=list)
    nodes: dict[_Name, NodeType]
    weights: dict[_Name, WeightType]

    @property
    def computes(self) -> dict[str, FloatType]:
        """Type of each node."""
        return {name: node.type for name, node in self.nodes.items()}

    @property
    def stores(self) -> dict[str, FloatType]:
        """Type of each stored weight."""
        return {name: weight.type for name, weight in self.weights.items()}

    def check(self, graph: Opened) -> None:
        """Checks that the plan names exactly the nodes and weights of the graph.

        Raises:
            ExportError: names the first of them.
        """
        nodes = {node.name for node in graph.model.graph.node if graph.computes(node)}
        for what, planned, there in (
            ("node", set(self.nodes), nodes),
            ("weight", set(self.weights), set(graph.storable)),
        ):
            if strange := planned - there:
                raise ExportError(f"the plan of {self.graph} names a {what} {min(strange)!r}, which the graph lacks")
            if missing := there - planned:
                raise ExportError(f"the plan of {self.graph} has no entry for the {what} {min(missing)!r}; add it")


def plan_bytes(plan: Plan) -> bytes:
    """Returns the plan as JSON, one entry per line."""
    return json_lines({"schema_version": plan.schema_version} | plan.model_dump(mode="json", exclude_defaults=True))


def write_plan(plan: Plan, path: Path) -> None:
    """Writes a plan, one entry per line, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(plan_bytes(plan))


def read_plan(path: Path) -> Plan:
    """Returns the plan of a file; `ExportError` as `moebius_runtime.bundle.json_files.read_json`."""
    return read_json(path, Plan, MAX_PLAN_BYTES, "a precision plan of `moebius-export precision`", ExportError)
