"""Weights of the losses from the norms of their gradients (paper, section 3.3, equations 4 and 5).

Inside the output losses, at θ_F, the network's last weight: a loss gets the weight that makes its gradient as large as
that of the task loss. Between them and the coarse loss, at θ_C, the last weight before the tapped feature: L_out gets
the weight that makes its gradient as large as the coarse loss'. The weights are constants: no gradient goes into them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from moebius.distill.losses import OUTPUT_NAMES, LossName, LossOptions
from moebius.errors import TrainingError
from moebius.student import Level, Moebius, SeparableConv


@dataclass(frozen=True)
class BalanceOptions:
    """How the norms become weights: (|∇a| / (|∇b| + epsilon)) ** exponent, at most `limit`.

    The defaults are the paper's equations: norms squared, `coarse` balanced against the whole of L_out. What the
    equations leave open (division by 0, a bound) is the released code's. That code takes the norms as they are and, at
    θ_C, the task loss alone: `RELEASED_BALANCE`.

    Raises:
        TrainingError: an exponent, epsilon or limit out of range.
    """

    enabled: bool = True
    exponent: float = 2.0
    against: Literal["out", "task"] = "out"
    fine_epsilon: float = 1e-6
    coarse_epsilon: float = 1e-4
    fine_limit: float = 1e6
    coarse_limit: float = 1e4

    def __post_init__(self) -> None:
        """Refuse what gives no weights."""
        if not (math.isfinite(self.exponent) and self.exponent > 0):
            raise TrainingError(f"the balance's exponent is {self.exponent}; expected above 0 (the paper's is 2)")
        if self.against not in ("out", "task"):
            raise TrainingError(f"the balance is against {self.against!r}; expected 'out' (paper) or 'task' (released)")
        for name, value in (("epsilon", self.fine_epsilon), ("epsilon", self.coarse_epsilon)):
            if not (math.isfinite(value) and value >= 0):
                raise TrainingError(f"the balance's {name} is {value}; expected 0 or a small number above it")
        for name, value in (("limit", self.fine_limit), ("limit", self.coarse_limit)):
            if not value > 0:
                raise TrainingError(f"the balance's {name} is {value}; expected a number above 0")


RELEASED_BALANCE = BalanceOptions(exponent=1.0, against="task")
"""The released code's balance, where it differs from the paper's equations."""


class Balanced(NamedTuple):
    """The loss to call `backward` on, and what it is made of, detached scalars for a log.

    `weights`: of `fine` and `perceptual` in L_out and of `out` in the total, where they are on.
    `norms`: gradient norms, named "task at θ_F" and so on; those that a weight needed.
    """

    total: Tensor
    weights: dict[str, Tensor]
    norms: dict[str, Tensor]


def balance(
    losses: Mapping[LossName, Tensor],
    options: LossOptions,
    settings: BalanceOptions,
    *,
    fine: nn.Parameter,
    coarse: nn.Parameter,
    scale: float = 1.0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Balanced:
    """The sum of the losses with multipliers and balancing weights: L = m_C L_C + w_out L_out.

    L_out = m_task L_task + m_fine w_fine L_fine + m_perceptual w_perceptual L_perceptual. The weights are found without
    the multipliers, so that a multiplier says what share a loss has once all are balanced. With the task loss off, the
    first output loss that is on takes its place (weight 1); with `coarse` or all output losses off, w_out is 1. The
    paper does not say what its ablation did there.

    The forward pass' graph is kept for the backward pass of the total, and no `.grad` is touched, so gradients of
    earlier batches may be there (accumulation): each batch is balanced on its own. Costs, beside the passes anyway
    needed: short ones at θ_F, and at θ_C one through the upper half of the network.

    Args:
        losses: of `distillation_losses`, with their graph.
        options: the multipliers.
        settings: how norms become weights.
        fine: θ_F, see `fine_parameter`.
        coarse: θ_C, see `coarse_parameter`.
        scale: a gradient scaler's present factor. Losses are multiplied by it before, and norms divided after, so that
            float16 gradients do not vanish on the way. Where they overflow, weights and total are NaN, so that the
            scaler skips the step.
        reduce: averages a gradient over processes, so that the weights are those of the global batch. None: each
            process has weights of its own.

    Raises:
        TrainingError: a loss is on and not given, or does not depend on θ.
    """
    if missing := ", ".join(name for name in options.active if name not in losses):
        raise TrainingError(f"the losses {missing} are on and have no value; compute them or switch them off")
    measure = _Measure(scale, reduce)
    weights: dict[str, Tensor] = {}
    outputs = [name for name in OUTPUT_NAMES if name in options.active]
    if settings.enabled and len(outputs) > 1:
        first = measure(outputs[0], losses[outputs[0]], "θ_F", fine)
        for name in outputs[1:]:
            norm = measure(name, losses[name], "θ_F", fine)
            weights[name] = _ratio(first, norm, settings.exponent, settings.fine_epsilon, settings.fine_limit)
    if settings.enabled and outputs and options.coarse:
        above = measure("coarse", losses["coarse"], "θ_C", coarse)
        if settings.against == "out":
            output = torch.stack([weights.get(name, 1.0) * losses[name] for name in outputs]).sum()
            below = measure("out", output, "θ_C", coarse)
        else:
            below = measure(outputs[0], losses[outputs[0]], "θ_C", coarse)
        weights["out"] = _ratio(above, below, settings.exponent, settings.coarse_epsilon, settings.coarse_limit)

    terms = [options.multiplier(name) * weights.get(name, 1.0) * losses[name] for name in outputs]
    terms = [weights.get("out", 1.0) * term for term in terms]
    if options.coarse:
        terms.append(options.coarse * losses["coarse"])
    return Balanced(torch.stack(terms).sum(), weights, measure.norms)


def fine_parameter(student: Moebius) -> nn.Parameter:
    """θ_F: the weight of the network's last convolution, [4, C, 1, 1], or [4, C, 3, 3] where convolutions are full."""
    last = student.diff_model.conv_out
    return last.get_parameter("conv_pw.weight" if isinstance(last, SeparableConv) else "weight")


def coarse_parameter(student: Moebius, feature: int) -> nn.Parameter:
    """θ_C: the weight of the last layer before a feature map, by the index that `Tap.student` has.

    Feature 2 of the released network: `down_blocks.2.attentions.1.proj_out.weight`. A level that ends in a resampler
    has that one's convolution.

    Raises:
        TrainingError: there is no such feature.
    """
    network = student.diff_model
    levels = [*network.down_blocks, *network.up_blocks]
    if not 0 <= feature < len(levels):
        raise TrainingError(f"there is no student feature {feature}; the student has 0 to {len(levels) - 1}")
    level = levels[feature]
    assert isinstance(level, Level)
    if level.resampler_name is not None:
        return level.get_parameter(f"{level.resampler_name}.conv.weight")
    return level.get_parameter(f"attentions.{len(level.attentions) - 1}.proj_out.weight")


class _Measure:
    """Gradient norms, kept by name."""

    def __init__(self, scale: float, reduce: Callable[[Tensor], Tensor] | None) -> None:
        self.norms: dict[str, Tensor] = {}
        self._scale = scale
        self._reduce = reduce

    def __call__(self, name: str, loss: Tensor, place: str, parameter: nn.Parameter) -> Tensor:
        """|∂loss/∂parameter|, a detached scalar, float32 at least."""
        gradient = None
        if loss.requires_grad:
            scaled = loss * self._scale
            (gradient,) = torch.autograd.grad(scaled, parameter, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise TrainingError(
                f"the loss {name!r} does not depend on {place}, at which it is to be balanced; balance a network in "
                "training, at parameters of it, or switch the balance off"
            )
        if self._reduce is not None:
            gradient = self._reduce(gradient)
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        norm = torch.linalg.vector_norm(gradient.detach(), dtype=dtype) / self._scale
        # As an infinite norm it would be a weight of 0, or of the limit, and the step would not be skipped.
        norm = torch.where(norm.isfinite(), norm, torch.nan)
        self.norms[f"{name} at {place}"] = norm
        return norm


def _ratio(above: Tensor, below: Tensor, exponent: float, epsilon: float, limit: float) -> Tensor:
    """(above / (below + epsilon)) ** exponent, at most `limit`. NaN stays NaN, for the trainer to see."""
    return (above / (below + epsilon)).pow(exponent).clamp(max=limit)
