"""The quantization plan of one graph: which nodes are INT8 or FP8, why others are not, and their numbers.

It is stored in the bundle beside the file that it describes. An edited plan is applied without data by `moebius-export
int8 BUNDLE --reapply`. Like every file of a bundle, it is not trusted until it is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, model_validator

from moebius_export.errors import ExportError
from moebius_runtime.bundle.json_files import Sha256, ShortText, StrictModel, json_lines, read_json
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.files import atomic_write

Target = Literal["tensorrt", "tensorrt-fp8", "ort-cpu"]
NodeChoice = Literal["int8", "fp8", "float"]
Observer = Literal["minmax", "minmean", "percentile", "entropy", "mse"]

MAX_PLAN_BYTES = 32 << 20
MAX_CHANNELS = 1 << 16

_Name = Annotated[str, Field(max_length=300)]
_Size = Annotated[float, Field(ge=0)]
_Factors = Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1, max_length=MAX_CHANNELS)]
_Corrections = Annotated[list[float], Field(min_length=1, max_length=MAX_CHANNELS)]
_Range = Annotated[list[float], Field(min_length=2, max_length=2)]


class Calibration(StrictModel):
    """What the ranges were measured on: pictures, their steps and source, runs of the graph, and the seed."""

    pictures: Annotated[int, Field(ge=0, le=1_000_000)]
    steps: Annotated[int, Field(ge=0, le=1000)]
    runs: Annotated[int, Field(ge=0)]
    seed: Annotated[int, Field(ge=0)]
    data: ShortText = "drawn"


class Trial(StrictModel):
    """One layer that was quantized alone in a search.

    `error` is the relative L2 error of the graph's output, `gain` the time that the cost model saves, in microseconds.
    """

    name: _Name
    error: _Size
    gain: float
    gmac: _Size


class Point(StrictModel):
    """A point of the Pareto front: number of quantized layers, measured error, gain, share of the candidates' GMAC."""

    layers: Annotated[int, Field(ge=0)]
    error: _Size
    gain: float
    share: Annotated[float, Field(ge=0, le=1)]


class Int8Plan(StrictModel):
    """A quantization plan.

    Attributes:
        target: the runtime that the file is for.
        graph_sha256, weights_sha256: of the float32 files that the plan belongs to.
        nodes: every candidate node by its name in the float32 graph: `int8` (for `tensorrt-fp8`: `fp8`) or `float`.
        reasons: why a node stays in float.
        ranges: lowest and highest value of activations, by the tensor's name in the float32 graph with its functions
            inlined (`moebius_export.graph.opened.opened`).
        smooth: activation -> factors per channel that divide its values and multiply the following weights, before the
            range applies.
        bias_correction: node -> what is added to its output per channel, to make up for the mean error of its
            weights; `shifts` in plans of version 0.1.
        observer: the observer of the ranges.
        weights_only: weights are INT8, activations stay float, and `ranges` is empty.
        calibration: what they were measured on.
        errors: relative L2 errors of the graph's output: `all` (all candidates), `plan`, `budget`.
        trials, front: of the search.
        psnr: dB inside the mask of a whole picture against float32, with all graphs quantized.
        verdict: a summary of the result.
    """

    schema_version: Literal[1] = 1
    target: Target
    graph: GraphName
    graph_sha256: Sha256
    weights_sha256: Sha256 | None
    observer: Observer
    weights_only: bool = False
    calibration: Calibration
    nodes: dict[_Name, NodeChoice]
    reasons: dict[_Name, ShortText] = Field(default_factory=dict)
    ranges: dict[_Name, _Range]
    smooth: dict[_Name, _Factors] = Field(default_factory=dict)
    bias_correction: dict[_Name, _Corrections] = Field(
        default_factory=dict, validation_alias=AliasChoices("bias_correction", "shifts")
    )
    errors: dict[ShortText, _Size] = Field(default_factory=dict)
    trials: list[Trial] = Field(default_factory=list)
    front: list[Point] = Field(default_factory=list)
    psnr: float | None = None
    verdict: ShortText = ""

    @model_validator(mode="after")
    def _choices_of_the_target(self) -> Int8Plan:
        expected = choice_of(self.target)
        for name, choice in self.nodes.items():
            if choice not in (expected, "float"):
                raise ValueError(
                    f"{name!r} is {choice!r} in a plan for {self.target}; expected {expected!r} or 'float'"
                )
        return self

    @model_validator(mode="after")
    def _ranges_in_order(self) -> Int8Plan:
        for name, (low, high) in self.ranges.items():
            if not low <= high:
                raise ValueError(f"the range of {name!r} is {low} to {high}; expected the lower number first")
        return self

    @property
    def chosen(self) -> list[str]:
        """Nodes in INT8 or FP8."""
        return [name for name, choice in self.nodes.items() if choice != "float"]

    def check(self, candidates: Iterable[str], needed: Iterable[str]) -> None:
        """Checks that a plan fits its graph.

        Args:
            candidates: names of the nodes that could be quantized.
            needed: names of the activations that need a range.

        Raises:
            ExportError: names the first node or range that is unknown or missing.
        """
        there = set(candidates)
        if strange := set(self.nodes) - there:
            raise ExportError(f"the INT8 plan of {self.graph} names a node {min(strange)!r} that cannot be in INT8")
        # The CPU has got more operators: an older plan for it leaves the nodes that it does not know in float.
        if (missing := there - set(self.nodes)) and self.target != "ort-cpu":
            raise ExportError(f"the INT8 plan of {self.graph} has no entry for the node {min(missing)!r}; add it")
        if missing := set(needed) - set(self.ranges):
            raise ExportError(
                f"the INT8 plan of {self.graph} has no range of {min(missing)!r}, which a node in INT8 reads; "
                "add it, or calibrate again"
            )


def choice_of(target: Target) -> NodeChoice:
    """The name of quantized nodes in a plan for the target."""
    return "fp8" if target == "tensorrt-fp8" else "int8"


def plan_bytes(plan: Int8Plan) -> bytes:
    """Returns the plan as JSON, one entry per line."""
    return json_lines({"schema_version": plan.schema_version} | plan.model_dump(mode="json", exclude_defaults=True))


def write_plan(plan: Int8Plan, path: Path) -> None:
    """Writes a plan, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(plan_bytes(plan))


def read_plan(path: Path) -> Int8Plan:
    """Returns the plan of a file; `ExportError` as `moebius_runtime.bundle.json_files.read_json`."""
    return read_json(path, Int8Plan, MAX_PLAN_BYTES, "an INT8 plan of `moebius-export int8`", ExportError)
