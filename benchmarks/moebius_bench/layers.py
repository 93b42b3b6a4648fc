"""Both λ layers in PyTorch, as written over their fast form, in turn in one process: forward, forward and backward.

Times count only for forms that compute the same, so outputs and all gradients of every layer are compared first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import Tensor, nn

from moebius import preset
from moebius.errors import CheckpointError
from moebius.lambda_layers import InteractiveLambda, LambdaForm, LocalLambda, set_lambda_form
from moebius.stand_in import TensorSpec, stand_in_state_dict
from moebius_bench import wording
from moebius_bench.jobs import Job
from moebius_bench.rate import measure_rate
from moebius_bench.results import Rate, Summary
from moebius_bench.stats import summary
from moebius_export.module_cost import module_macs
from moebius_runtime.errors import InputError, OutputError

Pass = Literal["forward", "forward+backward"]

_FORMS: tuple[LambdaForm, LambdaForm] = ("reference", "fast")
_PASSES: tuple[Pass, Pass] = ("forward", "forward+backward")
# Relative, in the Euclidean norm of a tensor, float32 against float32. At full size and batch 2 each form is within
# 2.2e-6 of float64 and both are within 2.3e-6 of each other, the sums being over up to 8192 positions.
TOLERANCE = 1e-5


class LayerRow(BaseModel):
    """One pass of one layer, by form where there is a dictionary.

    `macs` are the products of one forward call for the whole batch; `share_of_rate` is None for the pass whose products
    are not counted; `ratios` are as written over fast, round by round; `difference` is the largest relative one found.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: str
    side: int
    channels: int
    passes: Pass
    seconds: dict[str, Summary]
    ratios: list[float]
    ratio: Summary
    macs: dict[str, int]
    share_of_rate: dict[str, float | None]
    difference: float


class LayerReport(BaseModel):
    """Everything, in seconds and multiply-accumulates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    machine: dict[str, str]
    preset: str
    weights: str = "stand-in:0"
    batch: int
    rounds: int
    rate: Rate
    rows: list[LayerRow]


@dataclass
class LayerCase:
    """One layer with its inputs (x [B, n, C], and for Interactive-λ the context) and the gradient of its output."""

    name: str
    layer: nn.Module
    inputs: list[Tensor]
    size: tuple[int, int]
    gradient: Tensor

    def forward(self) -> Tensor:
        """In inference: running statistics, nothing kept for a backward pass. The mode is the caller's to set."""
        with torch.no_grad():
            output: Tensor = self.layer(*self.inputs, self.size)
        return output

    def both(self) -> Tensor:
        """Forward and backward. Gradients add up where `clear` was not called."""
        output: Tensor = self.layer(*self.inputs, self.size)
        output.backward(self.gradient)
        return output.detach()

    def clear(self) -> None:
        """Forgets all gradients."""
        for tensor in (*self.inputs, *self.layer.parameters()):
            tensor.grad = None


class SizedLayer(nn.Module):
    """A layer with the picture's size bound, so that its inputs are tensors only."""

    def __init__(self, case: LayerCase) -> None:
        super().__init__()
        self.layer, self.size = case.layer, case.size

    def forward(self, *inputs: Tensor) -> Tensor:
        """As the layer."""
        output: Tensor = self.layer(*inputs, self.size)
        return output


def measure_layers(
    preset_name: str, batch: int, rounds: int, threads: int | None, machine: dict[str, str], turn: Callable[[str], None]
) -> LayerReport:
    """Checks, then times, both layers at every size of a preset. The form that begins changes from round to round.

    Args:
        preset_name: `full`, `small` or `tiny`.
        batch: samples, 2 or more.
        rounds: counted ones; one more before them is not.
        threads: None takes the physical cores.
        machine: what it runs on, for the report.
        turn: is told what is being done.

    Raises:
        InputError: an unknown preset, or a batch of one.
        OutputError: the forms differ; nothing was timed.
    """
    if batch < 2:
        raise InputError(
            f"--batch {batch}: expected 2 or more; PyTorch's batch norm on a CPU (2.13) gives the form as written "
            "wrong gradients at batch 1, so there would be nothing to compare the fast form with (docs/rewrites.md)"
        )
    try:
        cases = list(layer_cases(preset_name, batch))
    except CheckpointError as error:
        raise InputError(f"--preset: {error}") from error
    turn("the machine's matrix-product rate")
    rate = measure_rate(Job(kind="rate", runtime="torch", threads=threads))  # sets the number of threads
    differences = []
    for case in cases:
        turn(f"comparing the forms of {case_title(case)}")
        differences.append(compare_forms(case))
    rows: list[LayerRow] = []
    for case, difference in zip(cases, differences, strict=True):
        turn(f"timing {case_title(case)}")
        rows += _time(case, rounds, difference, rate.macs_per_second.median)
    return LayerReport(machine=machine, preset=preset_name, batch=batch, rounds=rounds, rate=rate, rows=rows)


def layer_cases(preset_name: str, batch: int, device: str = "cpu") -> Iterator[LayerCase]:
    """Both λ layers at every size of a preset, with random test weights and inputs of a seed, in float32.

    Raises:
        CheckpointError: an unknown preset.
    """
    sizes = preset(preset_name).student
    random = torch.Generator().manual_seed(0)
    for level, channels in enumerate(sizes.block_out_channels):
        side = sizes.sample_size >> level
        positions = side * side
        layers = {
            "Local-λ": LocalLambda(channels, sizes.num_heads, sizes.window),
            "Interactive-λ": InteractiveLambda(
                channels, sizes.num_heads, positions, sizes.tokens, sizes.cross_attention_dim
            ),
        }
        for name, layer in layers.items():
            expected = {key: TensorSpec(tuple(value.shape), value.dtype) for key, value in layer.state_dict().items()}
            layer.load_state_dict(stand_in_state_dict(expected))
            shapes = [(batch, positions, channels)]
            if isinstance(layer, InteractiveLambda):
                shapes.append((batch, sizes.tokens, sizes.cross_attention_dim))
            inputs = [torch.randn(shape, generator=random).to(device).requires_grad_() for shape in shapes]
            gradient = torch.randn(shapes[0], generator=random).to(device)
            yield LayerCase(name, layer.to(device), inputs, (side, side), gradient)


def compare_forms(case: LayerCase) -> float:
    """The largest relative difference of outputs (both modes), gradients of inputs and parameters, and statistics.

    Raises:
        OutputError: one is larger than `TOLERANCE`, or not a number.
    """
    before = {name: value.clone() for name, value in case.layer.state_dict().items()}
    expected, got = (form_results(case, form, before) for form in _FORMS)
    errors = {name: float((got[name] - value).norm() / value.norm()) for name, value in expected.items()}
    if wrong := {name: error for name, error in errors.items() if not error <= TOLERANCE}:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise OutputError(
            f"{case_title(case)}: the fast form differs from the form as written in {listed}; expected at most "
            f"{TOLERANCE:.0e}, so nothing was timed; report it with the version of PyTorch ({torch.__version__})"
        )
    return max(errors.values())


def form_results(case: LayerCase, form: LambdaForm, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs in inference and in training, every gradient, and the statistics after one training step, by name.

    Args:
        case: its layer is left in training mode, in the form, with other statistics.
        form: to compute in.
        state: the layer's state dict to begin from.

    Raises:
        OutputError: an input or a parameter has no gradient.
    """
    case.layer.load_state_dict(state)
    set_lambda_form(case.layer, form)
    case.layer.eval()
    found = {"the output in inference": case.forward()}
    case.clear()
    case.layer.train()
    found["the output in training"] = case.both()
    named = [*zip(("x", "context"), case.inputs, strict=False), *case.layer.named_parameters()]
    for name, tensor in named:
        if tensor.grad is None:
            raise OutputError(f"{case_title(case)}: the {form} form gives {name} no gradient; nothing was timed")
        found[f"the gradient of {name}"] = tensor.grad.clone()
    return found | {name: buffer.double() for name, buffer in case.layer.named_buffers()}


def _time(case: LayerCase, rounds: int, difference: float, rate: float) -> Iterator[LayerRow]:
    macs = {}
    for form in _FORMS:
        set_lambda_form(case.layer, form)
        macs[str(form)] = module_macs(SizedLayer(case).eval(), case.inputs)["all"]
    for passes in _PASSES:
        seconds: dict[str, list[float]] = {form: [] for form in _FORMS}
        case.layer.train(passes != "forward")
        work = case.forward if passes == "forward" else case.both
        for number in range(rounds + 1):
            for form in _FORMS if number % 2 else reversed(_FORMS):
                set_lambda_form(case.layer, form)
                case.clear()
                started = time.perf_counter()
                work()
                ended = time.perf_counter()
                if number:
                    seconds[form].append(ended - started)
        ratios = [above / below for above, below in zip(*(seconds[form] for form in _FORMS), strict=True)]
        medians = {form: summary(values) for form, values in seconds.items()}
        yield LayerRow(
            layer=case.name,
            side=case.size[0],
            channels=case.inputs[0].shape[2],
            passes=passes,
            seconds=medians,
            ratios=ratios,
            ratio=summary(ratios),
            macs=macs,
            share_of_rate={
                form: macs[form] / medians[form].median / rate if passes == "forward" else None for form in medians
            },
            difference=difference,
        )


def case_title(case: LayerCase) -> str:
    """The layer, its picture and its channels in words."""
    return f"{case.name} at {case.size[0]}x{case.size[1]}, C={case.inputs[0].shape[2]}"


def layers_table(report: LayerReport) -> Table:
    """A row for each pass of a layer; what the columns mean stands below them."""
    differs = max(row.difference for row in report.rows)
    caption = (
        f"{wording.rate_line(report.rate)}.\n"
        f"Medians of {report.rounds} rounds, the two forms next to each other in each; one round before them does not "
        f"count. Batch {report.batch}, float32, stand-in weights.\n"
        "GMAC: products of one forward call for the whole batch, as written / fast; share: of the matrix-product rate, "
        "likewise.\n"
        "Before any timing both forms' outputs, gradients and statistics agreed within "
        f"{differs:.1e} (relative; at most {TOLERANCE:.0e} passes)."
    )
    table = Table(box=None, header_style="bold", pad_edge=False, caption=caption, caption_justify="left")
    for name in ("layer", "size", "pass"):
        table.add_column(name, no_wrap=True)
    for name in ("as written", "fast", "ratio", "min..max", "GMAC", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rows:
        table.add_row(
            row.layer,
            f"{row.side}x{row.side} C={row.channels}",
            row.passes,
            *(wording.seconds(row.seconds[form].median) for form in _FORMS),
            f"{row.ratio.median:.2f}x",
            f"{row.ratio.min:.2f}..{row.ratio.max:.2f}",
            " / ".join(wording.gmac(row.macs[form]) for form in _FORMS),
            " / ".join("-" if (share := row.share_of_rate[form]) is None else f"{share:.0%}" for form in _FORMS),
        )
    return table
