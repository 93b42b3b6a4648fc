"""The four losses of the distillation, all on latents (paper, section 3.3).

| name         | paper        | compares                                                                           |
| ------------ | ------------ | ---------------------------------------------------------------------------------- |
| `coarse`     | L_C_KD       | features at 16x16: student's after its last down level, teacher's after its first up |
| `task`       | L_task       | the student's output and the noise that was added (or the velocity)                |
| `fine`       | L_F_KD       | the student's output and the teacher's                                              |
| `perceptual` | L_perceptual | the clean latents that the student's output and the true one lead to in one step    |

Squared norms are means over all elements, as in the released code: the paper's sums differ by a constant per loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from moebius.distill.objectives.timesteps import Noised, predict_clean
from moebius.errors import TrainingError

LossName = Literal["coarse", "task", "fine", "perceptual"]
NAMES: tuple[LossName, ...] = ("coarse", "task", "fine", "perceptual")
OUTPUT_NAMES: tuple[LossName, ...] = ("task", "fine", "perceptual")
"""The losses on the network's output. The others are balanced to the first enabled one."""


class Distance(Protocol):
    """A perceptual distance on latents, such as `moebius.distill.objectives.perceptual.ELatentLpips`."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances of x and y, both [B, 4, h, w] scaled latents, in any shape: their mean is the loss."""


class Prediction(NamedTuple):
    """Result of a network's `forward_features`: output [B, 4, S, S] and feature maps [B, C, H, W] in order."""

    output: Tensor
    features: Sequence[Tensor]


@dataclass(frozen=True)
class Tap:
    """A pair of feature maps, by their index in `Prediction.features`, and the weight of their MSE."""

    student: int
    teacher: int
    weight: float = 1.0


@dataclass(frozen=True)
class LossOptions:
    """A multiplier per loss, 0 to switch it off (paper, table 5), and the taps of `coarse`.

    The defaults are the paper's: all ones, student feature 2 against teacher feature 5. `RELEASED_LOSSES` has the
    multipliers of the released command. The last tap's student feature is the one at which losses are balanced.

    Raises:
        TrainingError: a multiplier is negative or not finite, all are 0, or `coarse` has no tap.
    """

    coarse: float = 1.0
    task: float = 1.0
    fine: float = 1.0
    perceptual: float = 1.0
    taps: tuple[Tap, ...] = (Tap(2, 5),)

    def __post_init__(self) -> None:
        for name, value in (*((name, self.multiplier(name)) for name in NAMES), *self._tap_weights()):
            if not (math.isfinite(value) and value >= 0):
                raise TrainingError(f"the multiplier of {name} is {value}; expected 0 (off) or a number above 0")
        if not self.active:
            raise TrainingError(f"all losses are off; give one of {', '.join(NAMES)} a multiplier above 0")
        if self.coarse and not any(tap.weight for tap in self.taps):
            raise TrainingError("the coarse loss is on and compares no features; give it a tap, or multiplier 0")

    def _tap_weights(self) -> list[tuple[str, float]]:
        return [(f"tap {tap.student}:{tap.teacher}", tap.weight) for tap in self.taps]

    def multiplier(self, name: LossName) -> float:
        """The multiplier of one loss."""
        return {"coarse": self.coarse, "task": self.task, "fine": self.fine, "perceptual": self.perceptual}[name]

    @property
    def active(self) -> tuple[LossName, ...]:
        """The enabled losses, in the order of `NAMES`."""
        return tuple(name for name in NAMES if self.multiplier(name))

    @property
    def needs_teacher(self) -> bool:
        """Whether an enabled loss compares with the teacher."""
        return bool(self.coarse or self.fine)


RELEASED_LOSSES = LossOptions(coarse=0.01, task=0.5, fine=0.01, perceptual=0.5)
"""The multipliers of the released command. Its balance differs too: `balance.RELEASED_BALANCE`."""


def distillation_losses(
    options: LossOptions,
    student: Prediction,
    batch: Noised,
    bars: Tensor,
    *,
    teacher: Prediction | None = None,
    perceptual: Distance | None = None,
    weight: Tensor | None = None,
) -> dict[LossName, Tensor]:
    """Computes the enabled losses, each a scalar without its multiplier, float32 at least.

    Call it outside of autocast, as the released code does; otherwise the perceptual network runs in half precision.

    Args:
        options: which losses, and the taps of `coarse`.
        student: with its graph.
        batch: the student's input: noisy latents, prediction target, timesteps.
        bars: `moebius.distill.objectives.timesteps.alphas_cumprod()`.
        teacher: its prediction for the same input; detached.
        perceptual: the distance of the `perceptual` loss. Must let gradients through to its first argument.
        weight: weights [B, 1, S, S] of squared errors in `task` and `fine`; None is uniform, as in the paper.

    Raises:
        TrainingError: an input of an enabled loss is missing, or shapes or tap indices do not fit.
    """
    ours = _wide(student.output)
    losses: dict[LossName, Tensor] = {}
    if options.needs_teacher and teacher is None:
        wanted = " and ".join(name for name in ("coarse", "fine") if name in options.active)
        raise TrainingError(f"{wanted} compare with a teacher and there is none; give one, or multiplier 0")
    if options.coarse and teacher is not None:
        losses["coarse"] = _coarse(options.taps, student.features, teacher.features)
    if options.task:
        losses["task"] = mean_squared_error(ours, batch.target, "what is to be predicted", weight)
    if options.fine and teacher is not None:
        losses["fine"] = mean_squared_error(ours, teacher.output.detach(), "the teacher's output", weight)
    if options.perceptual:
        if perceptual is None:
            raise TrainingError(
                "the perceptual loss is on and there is no distance for it; give E-LatentLPIPS' weights file, or "
                "multiplier 0 to train without it"
            )
        noisy = _wide(batch.latents)
        reached, wanted_clean = (
            predict_clean(noisy, value, batch.timesteps, bars, batch.prediction_type)
            for value in (ours, _wide(batch.target))
        )
        losses["perceptual"] = _wide(perceptual(reached, wanted_clean)).mean()
    return losses


def _coarse(taps: Sequence[Tap], student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    terms = []
    for tap in taps:
        ours = _wide(_feature(student, tap.student, "student"))
        theirs = _feature(teacher, tap.teacher, "teacher").detach()
        terms.append(tap.weight * mean_squared_error(ours, theirs, f"teacher feature {tap.teacher}"))
    return torch.stack(terms).sum()


def _feature(features: Sequence[Tensor], index: int, whose: str) -> Tensor:
    if not 0 <= index < len(features):
        raise TrainingError(f"there is no {whose} feature {index}; the {whose} has 0 to {len(features) - 1}")
    return features[index]


def mean_squared_error(ours: Tensor, theirs: Tensor, name: str, weight: Tensor | None = None) -> Tensor:
    """The mean squared difference. Shapes must be equal: broadcasting would hide a wrong tap."""
    if ours.shape != theirs.shape:
        raise TrainingError(
            f"{name} has shape {list(theirs.shape)} and the student's {list(ours.shape)}; expected equal shapes, "
            "choose taps of the same resolution and width"
        )
    if weight is None:
        return F.mse_loss(ours, theirs.to(ours.dtype))
    return ((ours - theirs.to(ours.dtype)).square() * weight).mean()


def _wide(value: Tensor) -> Tensor:
    """Converts 16-bit values to float32, because squares of small differences underflow in 16 bits."""
    return value.to(torch.promote_types(value.dtype, torch.float32))
