"""The report of a machine: the content of docs/hardware/NAME.json. Seconds, bytes, multiply-accumulates (MAC)."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moebius_bench.measure.results import Summary
from moebius_runtime.errors import InputError

SCHEMA_VERSION = 1
MAX_BYTES = 4 << 20

Status = Literal["ok", "failed", "timed out", "not installed", "not run"]
"""Of a stage. Of a failed or timed-out stage the report holds what was recorded until then."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Check(_Strict):
    """The result of one check; `measured` and `limit` where it compares figures."""

    subject: str
    name: str
    passed: bool
    measured: float | None = None
    limit: float | None = None
    detail: str = ""


class Bound(_Strict):
    """The least time that the chip needs: the larger of bytes over bandwidth and MACs over matrix rate, in seconds.

    `bytes` are the weights, inputs and outputs, each once; `macs` are those of the fused network.
    """

    bytes: int
    macs: int
    seconds_by_bytes: float
    seconds_by_macs: float

    @property
    def seconds(self) -> float:
        """The larger of both."""
        return max(self.seconds_by_bytes, self.seconds_by_macs)


class Timing(_Strict):
    """Seconds of one variant of a piece of work. `share` is the bound's seconds over the measured ones."""

    subject: str
    variant: str
    precision: str
    seconds: Summary
    bound: Bound | None = None
    share: float | None = None
    device_memory: int | None = None


class Speedup(_Strict):
    """Seconds of `above` over those of `below`, round by round; both ran next to each other in every round."""

    subject: str
    precision: str
    above: str
    below: str
    ratio: Summary


class ChipRate(_Strict):
    """A measured rate of the chip: `matmul` in MAC/s of a square product of `size`, or `copy` in bytes/s.

    A copy of n bytes counts 2n: they are read and written.
    """

    kind: Literal["matmul", "copy"]
    precision: str
    size: int
    per_second: Summary


class StageOutput(_Strict):
    """The results that a stage recorded, in order."""

    checks: list[Check] = []
    timings: list[Timing] = []
    speedups: list[Speedup] = []
    rates: list[ChipRate] = []
    facts: dict[str, str] = {}
    notes: list[str] = []


class StageResult(_Strict):
    """A stage: its status and reason, its time and time limit, and its results."""

    name: str
    title: str
    status: Status
    reason: str = ""
    seconds: float
    budget_seconds: float
    output: StageOutput = StageOutput()

    @property
    def verdict(self) -> str:
        """`passed`, `failed` or `skipped`, with the number of checks or the reason."""
        failed = sum(not check.passed for check in self.output.checks)
        count = f"{failed} of {len(self.output.checks)} checks failed" if failed else ""
        if not self.held:
            words = [self.status] if self.status == "timed out" else []
            return "failed: " + "; ".join(filter(None, [*words, count, self.reason]))
        if self.status == "ok":
            return f"passed, {len(self.output.checks)} checks"
        return f"skipped ({self.status}): {self.reason}"

    @property
    def held(self) -> bool:
        """Whether no check failed and the stage ended or did not have to run."""
        return self.status not in ("failed", "timed out") and all(check.passed for check in self.output.checks)


class HardwareReport(_Strict):
    """The results of one run of `scripts/prove-on-gpu.sh` on a machine.

    Attributes:
        name: of the report's files.
        commit: of the sources, None where it is not known.
        profile: which stages were asked for, see `stages.PROFILES`.
        budget_seconds: for all stages together.
        dry_run: whether this is a rehearsal of tiny networks on a CPU, whose times mean nothing.
        device: `cuda` or `cpu`.
        libraries: name -> version, or "not installed".
        preset: sizes of the networks that were asked for; a reduction stands in the notes of its stage.
    """

    schema_version: Literal[1] = 1
    name: str
    created: str
    version: str
    commit: str | None
    profile: str
    dry_run: bool
    device: Literal["cuda", "cpu"]
    machine: dict[str, str]
    gpus: list[dict[str, str]]
    libraries: dict[str, str]
    preset: str
    weights: str
    seconds: float
    budget_seconds: float
    stages: list[StageResult]

    @property
    def exit_code(self) -> int:
        """1 where a check failed or a stage broke off, 0 otherwise."""
        return 0 if all(stage.held for stage in self.stages) else 1

    def output(self, name: str) -> StageOutput:
        """The results of the stage of that name; empty where it was not run."""
        return next((stage.output for stage in self.stages if stage.name == name), StageOutput())


def read_report(path: Path) -> HardwareReport:
    """The report in a file.

    Raises:
        InputError: it cannot be read, is too large, or is not a report of this version.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{path} is larger than {MAX_BYTES >> 20} MiB; expected a report of prove-on-gpu.sh")
        return HardwareReport.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InputError(
            f"{path} is not a hardware report of schema version {SCHEMA_VERSION} ({place}: {first['msg']}); make it "
            "again with scripts/prove-on-gpu.sh"
        ) from error
