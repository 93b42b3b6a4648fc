"""Measured figures for a model card: from the manifest, the plans in the bundle, and reports of this bundle.

Only what was measured on the bundle's own files is taken: a report of other files is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter

from moebius_export.errors import ExportError
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.json_files import read_json

_MAX_REPORT_BYTES = 256 << 20
_MAX_PLAN_BYTES = 64 << 20


class _Part(BaseModel):
    """The fields of a file that the card needs; further fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Figures(_Part):
    """Of a precision or quantization plan: relative L2 errors of the graph's output, and PSNR in dB."""

    errors: dict[str, float] = Field(default_factory=dict)
    psnr: float | None = None


class _Summary(_Part):
    median: float
    min: float
    max: float


class _Step(_Part):
    p50: float


class _Facts(_Part):
    sha256: dict[str, str]


class _Variant(_Part):
    name: str
    status: str
    runtime: str
    precision: str
    threads: int | None
    steps: int
    baseline: bool
    bundle: _Facts | None = None
    total_seconds: _Summary | None = None
    step: _Step | None = None
    peak_memory: int | None = None


class _Latency(_Part):
    """`moebius-bench BUNDLE --json`."""

    created: str
    version: str
    machine: dict[str, str]
    variants: list[_Variant]


class _Check(_Part):
    area: str
    subject: str
    name: str
    status: str
    measured: float | str | None = None
    budget: float | str | None = None


class _Verification(_Part):
    """`moebius-export verify --json`."""

    held: bool
    facts: dict[str, str]
    checks: list[_Check]


def _kind(content: object) -> str:
    return "verification" if isinstance(content, dict) and "checks" in content else "latency"


_Report = TypeAdapter[_Latency | _Verification](
    Annotated[Annotated[_Latency, Tag("latency")] | Annotated[_Verification, Tag("verification")], Discriminator(_kind)]
)


@dataclass(frozen=True)
class Table:
    """A table of the card: a sentence above it, column heads, and rows of text."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def export_tables(bundle: Bundle) -> list[Table]:
    """Errors against PyTorch at the export, errors of the plans, and MACs, as far as the bundle records them."""
    manifest = bundle.manifest
    parity = tuple(
        (name, f"{found.relative_error:.1e}", f"{found.max_error:.1e}") for name, found in manifest.parity.items()
    )
    tables = (
        [Table("Error of each fp32 graph against PyTorch when it was exported.", _PARITY, parity)] if parity else []
    )
    rows = []
    for name, graph in manifest.graphs.items():
        for precision, file in graph.files.items():
            if file.plan is not None:
                found = _plan_figures(bundle.file(file.plan))
                if "plan" in found.errors or found.psnr is not None:
                    error = f"{found.errors['plan']:.1e}" if "plan" in found.errors else ""
                    rows.append((precision, name, error, "" if found.psnr is None else f"{found.psnr:.1f} dB"))
    if rows:
        title = "Error against fp32 when the precision was chosen. PSNR is that of a whole picture inside the mask."
        tables.append(Table(title, ("precision", "graph", "relative L2 error", "PSNR"), tuple(rows)))
    last = {rewrite.graph: rewrite.macs_after for rewrite in manifest.rewrites if rewrite.macs_after is not None}
    macs = tuple((name, f"{count / 1e9:,.2f}") for name, count in last.items())
    if macs:
        tables.append(Table("Multiply-accumulates of one call.", ("graph", "GMAC"), macs))
    return tables


_PARITY = ("graph", "relative L2 error", "worst absolute error")


def _plan_figures(path: Path) -> _Figures:
    return read_json(path, _Figures, _MAX_PLAN_BYTES, "a plan that `precision` or `int8` wrote", ExportError)


def report_tables(bundle: Bundle, paths: Sequence[Path]) -> list[Table]:
    """The figures of reports that `moebius-bench BUNDLE --json` and `moebius-export verify BUNDLE --json` wrote.

    Raises:
        ExportError: a file is no such report, measured other files than the bundle's, or holds no figures.
    """
    expected = "a report of `moebius-bench BUNDLE --json` or `moebius-export verify BUNDLE --json`"
    tables = []
    for path in paths:
        report = read_json(path, _Report, _MAX_REPORT_BYTES, expected, ExportError)
        tables.append(
            _latency(bundle, path, report) if isinstance(report, _Latency) else _verification(bundle, path, report)
        )
    return tables


def _latency(bundle: Bundle, path: Path, report: _Latency) -> Table:
    rows = []
    for variant in report.variants:
        if variant.status != "ok" or variant.total_seconds is None or variant.bundle is None or variant.baseline:
            continue
        _check_files(bundle, path, variant)
        total, memory = variant.total_seconds, variant.peak_memory
        rows.append(
            (
                variant.runtime,
                variant.precision,
                "" if variant.threads is None else str(variant.threads),
                str(variant.steps),
                f"{total.median:.3g} ({total.min:.3g} to {total.max:.3g})",
                "" if variant.step is None else f"{variant.step.p50 * 1000:.3g}",
                "" if memory is None else f"{memory / (1 << 20):,.0f}",
            )
        )
    if not rows:
        raise ExportError(f"{path}: no variant of it was measured; expected a report with figures of this bundle")
    processor = next((report.machine[key] for key in ("processor", "cpu", "machine") if key in report.machine), "")
    title = f"Latency, measured {report.created} with moebius-edge {report.version}" + (
        processor and f" on {processor}"
    )
    head = ("runtime", "precision", "threads", "steps", "s a picture (range)", "ms a step", "peak MiB")
    return Table(f"{title}.", head, tuple(rows))


def _check_files(bundle: Bundle, path: Path, variant: _Variant) -> None:
    """Refuses figures of other files than the bundle's U-Net of that precision."""
    assert variant.bundle is not None
    files = bundle.graph("unet").files
    own = files[variant.precision].paths if variant.precision in files else []
    if not own or any(variant.bundle.sha256.get(name) != bundle.manifest.files[name].sha256 for name in own):
        raise ExportError(
            f"{path}: {variant.name} was measured with another {variant.precision} file than {bundle.name} holds; "
            "measure this bundle: moebius-bench BUNDLE --json FILE"
        )


def _verification(bundle: Bundle, path: Path, report: _Verification) -> Table:
    model = bundle.manifest.model
    for fact, weights in (("U-Net", model.unet), ("VAE", model.vae)):
        named = re.search(r"SHA-256 ([0-9a-f]{16})", report.facts.get(fact, ""))
        if named is None or not weights.sha256.startswith(named[1]):
            raise ExportError(
                f"{path}: it verified a bundle of other weights ({fact}); verify this one: moebius-export verify BUNDLE"
            )
    rows = [
        (check.area, check.subject, check.name, _number(check.measured), _number(check.budget), check.status)
        for check in report.checks
        if check.measured is not None or check.status != "pass"
    ]
    passed = sum(check.status == "pass" for check in report.checks)
    verdict = "every check held" if report.held else "NOT every check held"
    title = f"Verification against PyTorch: {passed} of {len(report.checks)} checks passed, {verdict}."
    return Table(title, ("area", "subject", "check", "measured", "budget", "result"), tuple(rows))


def _number(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"
