"""Parameters and MACs of the networks of the paper's table 2, with the figures of the paper."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    from torch import nn

    from moebius import StudentConfig

PAPER_RULE = (
    "products of the convolutions and linear layers, and a few operations an element of the layer norms and of the λ "
    "layers' batch norms and softmaxes; products between activations are left out"
)


@dataclass(frozen=True)
class PaperRow:
    """An architecture of table 2: its experiments, its layers, millions of parameters and GFLOPs as printed there."""

    experiments: str
    self_attention: str
    cross_attention: str
    feed_forward: str
    convolution: str
    parameters: int
    gflops: float

    @property
    def layers(self) -> dict[str, str]:
        """The fields of `StudentConfig` that make this architecture."""
        names = ("self_attention", "cross_attention", "feed_forward", "convolution")
        return {name: getattr(self, name) for name in names}


# Moebius (ECCV 2026), table 2. Two experiments with one architecture differ in the training: with distillation or not.
PAPER = (
    PaperRow("1, 11", "gla", "attention", "geglu", "full", 526, 314.30),
    PaperRow("2, 12", "local_lambda", "attention", "geglu", "full", 496, 318.90),
    PaperRow("3, 13", "gla", "interactive_lambda", "geglu", "full", 514, 307.91),
    PaperRow("4, 14", "gla", "attention", "mix", "full", 478, 286.51),
    PaperRow("5, 15", "gla", "attention", "geglu", "separable", 315, 183.59),
    PaperRow("6, 7", "local_lambda", "interactive_lambda", "geglu", "full", 485, 312.50),
    PaperRow("8", "local_lambda", "interactive_lambda", "geglu", "separable", 274, 181.79),
    PaperRow("9, 10", "local_lambda", "interactive_lambda", "mix", "separable", 226, 154.00),
)


@dataclass(frozen=True)
class Counted:
    """A network of one sample: parameters, operations by the paper's rule, and products (MAC) of its own operators."""

    parameters: int
    paper_operations: int
    macs: int
    convolution_macs: int


@dataclass(frozen=True)
class StudentRow:
    """One architecture: counted here, and the paper's figures, which are of the sizes of preset full."""

    paper: PaperRow
    counted: Counted


def count_students(preset_name: str, announce: Callable[[str], None]) -> list[StudentRow]:
    """Every architecture of table 2 in the sizes of a preset, counted on the meta device: no weights, no work.

    Raises:
        CheckpointError: there is no such preset.
    """
    from moebius import preset

    base = preset(preset_name).student
    rows = []
    for paper in PAPER:
        announce(f"counting experiment {paper.experiments}: {', '.join(paper.layers.values())}")
        rows.append(StudentRow(paper, count_student(replace(base, **paper.layers))))  # type: ignore[arg-type]
    return rows


def count_student(config: StudentConfig) -> Counted:
    """The cost of one sample (one guidance branch) of a student, as it is written in PyTorch.

    The MACs of GLA are those of its chunked implementation, which every device runs.
    """
    import torch

    from moebius import Moebius
    from moebius_export.network.module_cost import module_macs

    side = config.sample_size
    with torch.device("meta"):
        student = Moebius(config).eval()
        sample = torch.empty(1, config.in_channels, side, side)
        inputs = (sample, torch.empty(1, dtype=torch.int64), torch.empty(1, config.tokens, dtype=torch.int64))
        operations, macs = paper_operations(student, inputs), module_macs(student, inputs)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    return Counted(parameters, operations, macs["all"], macs["convolutions"])


def paper_operations(network: nn.Module, inputs: Sequence[Any]) -> int:
    """Operations of one call by the rule that gives the paper's figures (docs/variants.md explains how it was found).

    Counted are layers, not operators: a convolution or linear layer by its products, without bias; a layer norm, and a
    batch norm of a λ layer, by 4 an element; a λ layer's softmax over n keys by 3n - 1. Group norms and the separable
    convolutions' batch norms are not counted, nor is what has no layer of its own, such as queries by keys.
    """
    from torch import Tensor, nn

    from moebius.network.lambda_layers import InteractiveLambda, LocalLambda

    total = 0
    in_lambda = {
        id(part)
        for layer in network.modules()
        if isinstance(layer, LocalLambda | InteractiveLambda)
        for part in layer.children()
    }

    def count(layer: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal total
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            total += output.numel() * layer.weight[0].numel()
        elif isinstance(layer, nn.Linear):
            total += output.numel() * layer.in_features
        elif isinstance(layer, nn.LayerNorm) or (
            isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and id(layer) in in_lambda
        ):
            total += 4 * output.numel()
        elif isinstance(layer, LocalLambda):
            tokens: Tensor = given[0]  # [B, n, C]: K is [B, k, n]
            total += tokens.shape[0] * layer.to_k.out_channels * (3 * tokens.shape[1] - 1)
        elif isinstance(layer, InteractiveLambda):
            context: Tensor = given[1]  # [B, m, context_dim]: K is [B, k, m]
            total += context.shape[0] * layer.to_k.out_features * (3 * context.shape[1] - 1)

    hooks = [layer.register_forward_hook(count) for layer in network.modules()]
    try:
        network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


_WORDS = {
    "gla": "GLA",
    "local_lambda": "Local-λ",
    "attention": "attention",
    "interactive_lambda": "Interactive-λ",
    "geglu": "GEGLU",
    "mix": "Mix-FFN",
    "full": "3x3",
    "separable": "separable",
}


def students_table(rows: Sequence[StudentRow], preset_name: str) -> Table:
    """One line an architecture; the paper's columns only for its own sizes, preset full."""
    quoted = preset_name == "full"
    caption = (
        f"One sample (one guidance branch). GFLOPs by the paper's rule: {PAPER_RULE}.\n"
        "GMAC: all MACs of the unfused network, GLA in chunks; conv.: the convolutions' share of them."
    )
    table = Table(box=None, header_style="bold", pad_edge=False, caption=caption, caption_justify="left")
    table.add_column("exp.", no_wrap=True)
    for name in ("self", "cross", "feed-forward", "convolution"):
        table.add_column(name, no_wrap=True)
    columns = ["parameters", *["paper"] * quoted, "GFLOPs", *["paper"] * quoted, "GMAC", "conv."]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True, style="dim" if name == "paper" else "")
    for row in rows:
        counted, paper = row.counted, row.paper
        table.add_row(
            paper.experiments,
            *(_WORDS[value] for value in paper.layers.values()),
            _millions(counted.parameters),
            *[f"{paper.parameters} M"] * quoted,
            _billions(counted.paper_operations),
            *[f"{paper.gflops:.2f}"] * quoted,
            _billions(counted.macs),
            _billions(counted.convolution_macs),
        )
    return table


def to_json(rows: Sequence[StudentRow], preset_name: str) -> str:
    """All figures, unrounded; the paper's are of preset full, whatever was counted."""
    content = {
        "schema_version": 1,
        "preset": preset_name,
        "paper_rule": PAPER_RULE,
        "rows": [asdict(row) for row in rows],
    }
    return json.dumps(content, indent=1) + "\n"


def _millions(value: int) -> str:
    return f"{value / 1e6:.2f} M"


def _billions(value: int) -> str:
    return f"{value / 1e9:.2f}" if value >= 1e9 else f"{value / 1e9:.3g}"
