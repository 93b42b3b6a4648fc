"""Numbers and sentences that the text and the page share."""

from __future__ import annotations

from moebius_bench.results import Rate, Ratio, Report, VariantResult
from moebius_runtime.backends.ort_integer import SATURATES

PROFILE_ROWS = 12


def seconds(value: float) -> str:
    """A time with three significant figures: "8.12 s", "43.1 ms", "0.21 ms"."""
    if value >= 60:
        return f"{value:.0f} s"
    if value >= 0.9995:
        return f"{value:.3g} s" if value < 10 else f"{value:.1f} s"
    return f"{value * 1e3:.3g} ms"


def size(value: int) -> str:
    """Bytes in decimal units, as disks and downloads are counted: "905 MB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}"
    return f"{value} B"


def gmac(macs: float) -> str:
    """MACs in units of 10^9, at least three figures and two decimals: "315.98"."""
    value = macs / 1e9
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def ratio_line(ratio: Ratio) -> str:
    """One ratio in words, with its spread."""
    return (
        f"{ratio.above} over {ratio.below}, {ratio.what}: {ratio.median:.2f}x "
        f"({ratio.min:.2f} to {ratio.max:.2f}, {len(ratio.rounds)} round{'s' * (len(ratio.rounds) != 1)})"
    )


def step_line(row: VariantResult) -> str:
    """The steps' percentiles, in the order of trtexec's line."""
    assert row.step is not None
    step = row.step
    parts = [("min", step.min), ("max", step.max), ("mean", step.mean), ("median", step.p50)]
    parts += [("p90", step.p90), ("p99", step.p99)]
    drift = "" if step.drift is None else f", drift {step.drift:.3f}"
    line = ", ".join(f"{name} = {seconds(value)}" for name, value in parts)
    return f"step: {line}{drift} ({step.count} steps)"


def roofline_lines(row: VariantResult) -> list[str]:
    """What each stage costs, how fast it went, and the share of the machine's own rate."""
    lines = []
    for stage, cost in row.cost.items():
        share = "" if cost.share_of_rate is None else f", {cost.share_of_rate:.0%} of the matrix-product rate"
        of_bytes = f" ({cost.byte_macs / cost.macs:.0%} of bytes)" if cost.byte_macs else ""
        if share and cost.least_seconds is not None:
            share += f": at least {seconds(cost.least_seconds)}"
        lines.append(f"{stage}: {gmac(cost.macs)} GMAC a run{of_bytes}, {gmac(cost.macs_per_second)} GMAC/s{share}")
    return lines


def rate_line(rate: Rate) -> str:
    """The machine's own rate, and in what it was measured."""
    value = rate.macs_per_second
    limit = f". {SATURATES}" if rate.saturates else ""
    return (
        f"matrix-product rate of this machine: {gmac(value.median)} GMAC/s {rate.kind} ({gmac(value.min)} to "
        f"{gmac(value.max)}; {rate.size}^3 in {rate.library}, {rate.threads} thread{'s' * (rate.threads != 1)}){limit}"
    )


def warmup_line(report: Report) -> str:
    """What was left out, and how often everything ran."""
    s = report.settings
    return (
        f"{s.rounds} round{'s' * (s.rounds != 1)}, a fresh process each, in turn; {s.repeats} counted "
        f"picture{'s' * (s.repeats != 1)} a process. Not counted: the first picture of each process, with "
        f"{s.warmup_steps} step{'s' * (s.warmup_steps != 1)} (its times are the cold ones)."
    )


def machine_lines(report: Report) -> list[tuple[str, str]]:
    """Name and value of everything known of the machine, cards and installed sizes included."""
    lines = list(report.machine.items())
    for gpu in report.gpus:
        label = f"gpu {gpu.get('index', '')} {gpu.get('when', '')}".strip()
        lines.append((label, ", ".join(f"{k} {v}" for k, v in gpu.items() if k not in ("index", "when"))))
    if report.installed:
        largest = ", ".join(f"{name} {size(value)}" for name, value in list(report.installed.items())[:4])
        total = size(sum(report.installed.values()))
        lines.append(("installed", f"{total} for moebius-inpaint and all that it needs (largest: {largest})"))
    return lines


def bundle_lines(report: Report) -> list[tuple[str, str]]:
    """Path and facts of each bundle that was measured."""
    lines = {}
    for row in report.variants:
        if row.bundle is not None:
            b = row.bundle
            graphs: dict[str, int] = {}
            for name, value in b.files.items():
                folder = name.partition("/")[0]
                graphs[folder] = graphs.get(folder, 0) + value
            sizes = ", ".join(f"{name} {size(value)}" for name, value in graphs.items())
            rewrites = ", ".join(f"{name} x{count}" for name, count in b.rewrites.items()) or "none"
            lines[b.path] = (
                f"{b.preset}, {b.parameters:,} U-Net parameters, {b.image_size} pixels, weights {b.weights}; "
                f"{size(sum(b.files.values()))} ({sizes}); rewrites: {rewrites}; manifest {b.manifest_sha256[:16]}"
            )
    return list(lines.items())
