"""The efficiency columns of the paper's tables 1 and 2, measured for this model, with the figures of the paper."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from rich.table import Table

from moebius_bench.measure.worker_job import Job
from moebius_runtime.errors import OutputError, RuntimeUnavailableError

SAMPLE_NOTE = "as the paper counts: multiply-accumulates of the convolutions, one sample (one guidance branch)"


@dataclass(frozen=True)
class Row:
    """One model. `gflops` is 10^9 FLOPs as the paper counts them; None stands for what was not measured."""

    name: str
    parameters: float
    gflops: float | None
    ms_per_step: float | None
    steps: int
    total_seconds: float | None
    source: str
    quoted: bool = True


# Moebius (ECCV 2026), table 1, columns Param., TFLOPs, Latency, Steps and Total Time, and section 4.1 for the device.
_QUOTED = "quoted from the paper, measured there on one L40S, batch 1, 512x512"
QUOTED = (
    Row("Moebius (paper)", 0.226e9, 154.0, 26.01, 20, 0.52, _QUOTED),
    Row("PixelHacker", 0.862e9, 338.0, 46.89, 20, 0.94, _QUOTED),
    Row("SD3.5 Large-Inpainting", 8.057e9, 8657.0, 151.02, 28, 4.23, _QUOTED),
    Row("FLUX.1-Fill-Dev", 11.902e9, 9927.0, 161.01, 50, 8.05, _QUOTED),
)


def measured_row(
    bundle: str | None, steps: int, threads: int | None, rounds: int, announce: Callable[[str], None]
) -> Row:
    """This model's row: parameters and FLOPs counted, and the time of a guided step where there is a bundle.

    Total is steps times ms a step, as in the paper; it leaves out the VAE and the pasting.

    Raises:
        MoebiusError: the bundle cannot be used, or counting needs a package that is not installed.
        OutputError: the measurement failed.
    """
    from moebius_bench.measure.costs import branches_of, count_bundle, count_torch

    if bundle is None:
        from moebius_export.network.torch_runtime import import_torch

        import_torch()
        announce("counting the released network on the meta device")
        counted = count_torch("full", parameters=True)
        return Row(
            "Moebius (counted)",
            counted["parameters"]["all"],
            counted["unet_conditional"]["convolutions"] / 1e9,
            None,
            steps,
            None,
            "counted from the unfused network; name a bundle to measure it",
            quoted=False,
        )
    from moebius_bench.measure.processes import run_worker
    from moebius_bench.measure.rounds import Plan, bundle_facts, measure_variants
    from moebius_bench.measure.variants import Variant
    from moebius_runtime.bundle.bundle import Bundle

    facts = bundle_facts(bundle)
    announce("counting the bundle's graphs")
    counted = count_bundle(Job(kind="cost", runtime="ort-cpu", bundle=bundle))
    graph = "unet_conditional" if "unet_conditional" in counted else "unet"
    manifest = Bundle.open(bundle).manifest
    branches = branches_of(graph, manifest)
    each = "steps of one sample" if manifest.guidance else "guided steps (two samples each)"
    sample = counted[graph]["all"] / branches / 1e9
    variant = Variant(bundle, "ort-cpu", "fp32", threads, steps, "this bundle")
    measured = measure_variants(
        [variant], Plan(rounds=rounds), run_worker, lambda number, what: announce(f"round {number}: {what}")
    )
    result = measured.variants[0]
    if result.status != "ok" or result.step is None:
        raise OutputError(f"{bundle}: {result.reason}")
    ms = result.step.p50 * 1e3
    gflops: float | None = counted[graph]["convolutions"] / branches / 1e9
    form = f"unfused graph, {sample:.4g} GMAC a sample in all"
    if facts.rewrites:  # it has turned convolutions into other products, which the paper's count would leave out
        gflops = _as_written(facts.preset)
        form = f"rewritten graph, {sample:.4g} GMAC a sample in all; GFLOPs are those of the unfused network"
    weights = ", random test weights" if facts.stand_in else ""
    return Row(
        f"Moebius, preset {facts.preset}",
        facts.parameters,
        gflops,
        ms,
        steps,
        steps * ms / 1e3,
        f"measured here: {each}, {result.described.get('runtime', '')}, threads "
        f"{result.described.get('threads', '?')}, {form}{weights}",
        quoted=False,
    )


def efficiency_table(row: Row) -> Table:
    """This model's row over the quoted ones."""
    caption = f"GFLOPs {SAMPLE_NOTE}.\n{row.name}: {row.source}.\nThe rest: {_QUOTED}."
    table = Table(box=None, header_style="bold", pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("model", overflow="fold")
    for name in ("parameters", "GFLOPs", "ms/step", "steps", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("figures")
    for entry in (row, *QUOTED):
        table.add_row(
            entry.name,
            f"{entry.parameters / 1e6:,.0f} M" if entry.parameters >= 1e6 else f"{entry.parameters / 1e6:.2f} M",
            _gflops(entry.gflops),
            "not measured" if entry.ms_per_step is None else f"{entry.ms_per_step:,.2f}",
            str(entry.steps),
            "not measured" if entry.total_seconds is None else f"{entry.total_seconds:.2f} s",
            "quoted" if entry.quoted else "our own",
            style="dim" if entry.quoted else "",
        )
    return table


def _as_written(preset: str) -> float | None:
    """GFLOPs of the unfused network of a preset; None where PyTorch, which builds it, is not installed."""
    from moebius_bench.measure.costs import count_torch
    from moebius_export.network.torch_runtime import import_torch

    try:
        import_torch()
    except RuntimeUnavailableError:
        return None
    return count_torch(preset)["unet_conditional"]["convolutions"] / 1e9


def _gflops(value: float | None) -> str:
    if value is None:
        return "needs torch"
    return f"{value:,.1f}" if value >= 1 else f"{value:.3g}"


def to_json(row: Row) -> str:
    """All rows, with whether each is quoted."""
    content = {"schema_version": 1, "gflops": SAMPLE_NOTE, "rows": [asdict(entry) for entry in (row, *QUOTED)]}
    return json.dumps(content, indent=1) + "\n"
