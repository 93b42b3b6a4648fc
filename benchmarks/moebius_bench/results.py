"""What a measurement is: the content of `--json`. Times are seconds, sizes bytes, costs multiply-accumulates (MAC)."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

RateKind = Literal["fp32", "bytes"]

STAGES = ("preprocess", "encode", "step", "decode", "paste")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Summary(_Strict):
    """Median and extremes of several values."""

    median: float
    min: float
    max: float
    count: int


class StepStats(_Strict):
    """Denoising steps, pooled over the pictures of all rounds; `drift` is the last quarter over the first."""

    min: float
    p50: float
    p90: float
    p99: float
    max: float
    mean: float
    drift: float | None
    count: int


class Ratio(_Strict):
    """Seconds of one variant over another's, from rounds in which they ran next to each other."""

    above: str
    below: str
    what: Literal["step", "total"]
    median: float
    min: float
    max: float
    rounds: list[float]


class PictureRun(_Strict):
    """One picture: seconds of every run of a stage, in order, the whole, and when it began (monotonic clock)."""

    stages: dict[str, list[float]]
    total: float
    began: float


class WorkerResult(_Strict):
    """What a worker process measured."""

    import_seconds: float
    load_seconds: dict[str, float]
    cold: PictureRun
    pictures: list[PictureRun]
    peak_memory: int
    output_sha256: str
    described: dict[str, str]


class OpShare(_Strict):
    """Time of one operator type, node, part or provider in a profiled run."""

    name: str
    seconds: float
    share: float
    count: int


class GraphProfile(_Strict):
    """One graph's profile. Shares are of the time inside its nodes."""

    graph: str
    runs: int
    by_type: list[OpShare]
    by_node: list[OpShare]
    by_part: list[OpShare]
    by_provider: list[OpShare]


class Rate(_Strict):
    """The machine's own rate of matrix products, MAC per second, and in what it was measured.

    `kind`: products of fp32 numbers, or of bytes (uint8 by int8, summed in int32). `saturates`: whether the library's
    products of bytes are wrong on this CPU where weights need more than 7 bits, so that the rate is worth less.
    """

    runtime: str
    library: str
    threads: int | None
    size: int
    macs_per_second: Summary
    kind: RateKind = "fp32"
    saturates: bool = False


class StageCost(_Strict):
    """MACs of one run of a stage, the rate that it reaches, and the share of the machine's own rate that this is.

    `byte_macs`: those of two bytes. `least_seconds`: what all would take at the machine's rates, each kind at its own;
    the share is this time over the measured one.
    """

    macs: int
    macs_per_second: float
    share_of_rate: float | None
    byte_macs: int = 0
    least_seconds: float | None = None


class Power(_Strict):
    """Energy of a picture by the machine's own sensors, in joules, and the mean power in watts."""

    source: str
    joules_per_picture: Summary
    watts: Summary


class BundleFacts(_Strict):
    """Which model it was."""

    path: str
    preset: str
    parameters: int
    image_size: int
    weights: str
    stand_in: bool
    manifest_sha256: str
    files: dict[str, int]
    sha256: dict[str, str]
    rewrites: dict[str, int]


class VariantResult(_Strict):
    """One variant over all rounds. A failed one has a reason and no figures."""

    name: str
    status: Literal["ok", "failed", "unstable"]
    reason: str | None = None
    runtime: str
    precision: str
    threads: int | None
    steps: int
    baseline: bool
    bundle: BundleFacts | None = None
    described: dict[str, str] = {}
    import_seconds: Summary | None = None
    load_seconds: dict[str, Summary] = {}
    cold_seconds: dict[str, Summary] = {}
    stage_seconds: dict[str, Summary] = {}
    total_seconds: Summary | None = None
    step: StepStats | None = None
    step_series: list[list[float]] = []
    peak_memory: int | None = None
    peak_device_memory: int | None = None
    power: Power | None = None
    cost: dict[str, StageCost] = {}
    output_sha256: list[str] = []
    difference_to_first: int | None = None
    profile: list[GraphProfile] = []


class Settings(_Strict):
    """How it was measured."""

    rounds: int
    repeats: int
    warmup_steps: int
    seed: int
    guidance_scale: float | None
    picture: str
    order: list[str]


class Report(_Strict):
    """Everything."""

    schema_version: Literal[1] = 1
    created: str
    version: str
    machine: dict[str, str]
    gpus: list[dict[str, str]] = []
    installed: dict[str, int]
    settings: Settings
    variants: list[VariantResult]
    ratios: list[Ratio]
    rates: list[Rate]
    notes: list[str]
