"""What `moebius-export int8` prints: plans, Pareto fronts and verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from rich.table import Table

from moebius_calibration.plan import Int8Plan, choice_of
from moebius_runtime import console


def print_findings(plans: Collection[Int8Plan]) -> None:
    """Prints Pareto fronts, verdicts, and the PSNR of the whole picture."""
    for plan in plans:
        if plan.front:
            console.out.print(front_table(plan))
    for plan in plans:
        if not plan.chosen:
            console.warn(f"{plan.graph}: {plan.verdict}")
        elif plan.verdict:
            console.out.print(f"{plan.graph}: {plan.verdict}")
        if plan.psnr is not None and plan.graph.startswith("unet"):
            named = choice_of(plan.target).upper()
            console.out.print(f"whole picture, {named} against fp32: {plan.psnr:.1f} dB inside the mask")


def plan_table(plans: Iterable[Int8Plan]) -> Table:
    """A row per graph: numbers of quantized and float nodes, errors, and why nodes stay in float."""
    columns = ("graph", "observer", "quantized", "float", "error of all", "error of plan", "float because")
    table = Table(*columns, box=None, header_style="bold")
    for plan in plans:
        why = Counter(
            plan.reasons.get(node, "edited").partition(":")[0] for node, c in plan.nodes.items() if c == "float"
        )
        table.add_row(
            plan.graph,
            plan.observer,
            str(len(plan.chosen)),
            str(len(plan.nodes) - len(plan.chosen)),
            *(f"{plan.errors[name]:.1e}" if name in plan.errors else "" for name in ("all", "plan")),
            ", ".join(f"{reason} {count}" for reason, count in why.most_common()),
        )
    return table


def front_table(plan: Int8Plan) -> Table:
    """The Pareto front of a graph's search."""
    table = Table(f"{plan.graph}: layers", box=None, header_style="bold")
    for heading in ("error", "us saved (model)", "share of their GMAC"):
        table.add_column(heading, justify="right")
    for point in plan.front:
        table.add_row(str(point.layers), f"{point.error:.1e}", f"{point.gain:,.1f}", f"{point.share:.0%}")
    return table
