"""Optimizer (Muon for matrices and kernels, AdamW for the rest), learning rate schedule, and averaged weights.

Muon (Jordan et al. 2024) replaces a matrix' momentum by the nearest orthogonal matrix, by five Newton-Schulz steps.
With the update scaled by 0.2 sqrt(max(rows, columns)) its entries have AdamW's size, so that both share one learning
rate (Liu et al. 2025, "Muon is Scalable for LLM Training", section 2.2). `torch.optim.Muon` does both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from moebius.errors import TrainingError


@dataclass(frozen=True)
class OptimizerOptions:
    """Options of `MuonAdamW`. `weight_decay` is the paper's 0.1; `adamw_weight_decay` applies to gains and biases.

    The paper gives one weight decay and does not mention gains and biases. Decay would pull the gain of a norm to 0
    rather than to 1, so we choose 0.

    Raises:
        TrainingError: a number out of range.
    """

    learning_rate: float = 2e-4
    weight_decay: float = 0.1
    momentum: float = 0.95
    ns_steps: int = 5
    adamw_weight_decay: float = 0.0
    adamw_betas: tuple[float, float] = (0.9, 0.95)
    adamw_eps: float = 1e-8

    def __post_init__(self) -> None:
        for name in ("learning_rate", "weight_decay", "adamw_weight_decay", "adamw_eps"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise TrainingError(f"{name} is {value}; expected 0 or a number above it")
        for name, value in (("momentum", self.momentum), *(("an AdamW beta", beta) for beta in self.adamw_betas)):
            if not 0 <= value < 1:
                raise TrainingError(f"{name} is {value}; expected 0 or more, and below 1")
        if not 1 <= self.ns_steps < 100:
            raise TrainingError(f"ns_steps is {self.ns_steps}; expected 1 to 99 (default 5)")


def split_parameters(parameters: Iterable[nn.Parameter]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits trainable parameters by rank: 2 and more for Muon, the rest for AdamW."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer of two: `torch.optim.Muon` on tensors of rank 2 and more, `torch.optim.AdamW` on the rest.

    Muon takes matrices only, so a kernel [out, in, ...] is passed to it as the matrix [out, in * ...], a view of the
    same memory that is remade at each step. Groups, state, hooks, `zero_grad`, schedulers and gradient scalers see the
    network's own parameters. The first of the two groups is Muon's. If FSDP has replaced parameters by DTensors, the
    matrices are DTensors as well: momenta stay sharded, and Newton-Schulz multiplies whole matrices.

    `state_dict` holds momenta in matrix shape.

    Args:
        parameters: a network's, contiguous. Those that need no gradient are left out.
        options: the recipe.

    Raises:
        TrainingError: nothing to train, or a parameter whose memory is not in order (`channels_last`).
    """

    def __init__(self, parameters: Iterable[nn.Parameter], options: OptimizerOptions | None = None) -> None:
        options = options or OptimizerOptions()
        matrices, vectors = split_parameters(parameters)
        if not matrices and not vectors:
            raise TrainingError("no parameter needs a gradient; there is nothing to train")
        for parameter in matrices:
            if not parameter.is_contiguous():
                raise TrainingError(
                    f"a parameter of shape {list(parameter.shape)} is not contiguous, so it has no view as a matrix; "
                    "make the optimizer for a network in the default memory format"
                )
        self._frozen_groups = False
        muon: dict[str, Any] = {
            "lr": options.learning_rate,
            "weight_decay": options.weight_decay,
            "momentum": options.momentum,
            "ns_steps": options.ns_steps,
        }
        adamw: dict[str, Any] = {
            "lr": options.learning_rate,
            "weight_decay": options.adamw_weight_decay,
            "betas": options.adamw_betas,
            "eps": options.adamw_eps,
        }
        super().__init__([{"params": matrices, **muon}, {"params": vectors, **adamw}], {})
        self._frozen_groups = True
        self._views = [nn.Parameter(_matrix(parameter.detach())) for parameter in matrices]
        self._spread = False
        # torch's optimizers refuse an empty list of parameters.
        self._muon = torch.optim.Muon(self._views, adjust_lr_fn="match_rms_adamw", **muon) if matrices else None
        self._adamw = torch.optim.AdamW(vectors, **adamw) if vectors else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Used by the base class only; the two groups are fixed.

        Raises:
            TrainingError: called afterwards.
        """
        if self._frozen_groups:
            raise TrainingError("MuonAdamW takes no further parameter groups; make it with all parameters at once")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient. `closure` recomputes the loss, which is then returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrices, vectors = self.param_groups
        if self._muon is not None:
            self._step_muon(self._muon, matrices)
        if self._adamw is not None:
            _take_options(self._adamw.param_groups[0], vectors)
            self._adamw.param_groups[0]["params"] = vectors["params"]  # FSDP puts others in their place
            self._adamw.state = self.state  # both have the same parameters as keys
            self._adamw.step()
        return loss

    def _step_muon(self, muon: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        _take_options(muon.param_groups[0], group)
        if not self._spread and any(isinstance(parameter.data, DTensor) for parameter in group["params"]):
            self._views = [nn.Parameter(_matrix(parameter.detach())) for parameter in group["params"]]
            muon.param_groups[0]["params"] = self._views
            self._spread = True
        pairs = list(zip(group["params"], self._views, strict=True))
        for parameter, view in pairs:
            view.data = _matrix(parameter.data)  # a network may have been moved to another device since
            view.grad = None if parameter.grad is None else parameter.grad.reshape(view.shape)
            if parameter in self.state:
                muon.state[view] = self.state[parameter]
        muon.step()
        for parameter, view in pairs:
            view.grad = None
            if view in muon.state:
                self.state[parameter] = muon.state[view]


def _matrix(kernel: Tensor) -> Tensor:
    """[out, in, ...] -> [out, in * ...], the same memory."""
    return kernel.view(kernel.shape[0], -1)


def _take_options(into: dict[str, Any], group: dict[str, Any]) -> None:
    into.update({name: value for name, value in group.items() if name in into and name != "params"})


@dataclass(frozen=True)
class ScheduleOptions:
    """The learning rate over a run: linear warm-up, then constant, times `decay` at each milestone (in steps).

    With `cosine`, a number of steps, the rate also falls as half a cosine from 1 to 0 over so many steps (Loshchilov
    and Hutter 2017, "SGDR", equation 5 without restarts).

    The defaults are the paper's: x 0.1 at 111,000 and at 129,000 of 138,000 steps. It names no warm-up.

    Raises:
        TrainingError: a negative warm-up, milestones that do not rise, a decay that is not above 0, or a cosine over
            fewer than 1 step.
    """

    warm_up: int = 0
    milestones: Sequence[int] = field(default=(111_000, 129_000))
    decay: float = 0.1
    cosine: int | None = None

    def __post_init__(self) -> None:
        if self.warm_up < 0:
            raise TrainingError(f"the warm-up is {self.warm_up} steps; expected 0 or more")
        steps = [0, *self.milestones]
        if any(later <= earlier for earlier, later in itertools.pairwise(steps)):
            raise TrainingError(f"the milestones are {list(self.milestones)}; expected rising numbers of steps above 0")
        if not (math.isfinite(self.decay) and self.decay > 0):
            raise TrainingError(f"the decay is {self.decay}; expected a number above 0 (the paper's is 0.1)")
        if self.cosine is not None and self.cosine < 1:
            raise TrainingError(f"the cosine is over {self.cosine} steps; expected 1 or more, the steps of the run")

    def factor(self, step: int) -> float:
        """Factor of the learning rate at `step`, counted from 0. Warm-up over n steps begins with 1 / n."""
        rising = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        falling = self.decay ** sum(step >= milestone for milestone in self.milestones)
        if self.cosine is not None:
            falling *= (1 + math.cos(math.pi * min(step / self.cosine, 1))) / 2
        return rising * falling


def learning_rate_schedule(optimizer: torch.optim.Optimizer, options: ScheduleOptions) -> LambdaLR:
    """A scheduler for all groups. Call its `step` after each step of the optimizer."""
    return LambdaLR(optimizer, lambda step: options.factor(step))


def restore_schedule(schedule: LambdaLR, state: dict[str, Any], options: ScheduleOptions, learning_rate: float) -> None:
    """Restores a scheduler's number of steps; everything else comes from the current settings.

    The optimizer's groups get the learning rate of the next step. (`LambdaLR.load_state_dict` leaves them at the saved
    rate until the scheduler's next step.)

    Args:
        schedule: of `learning_rate_schedule`.
        state: what its `state_dict` gave.
        options: of the schedule now.
        learning_rate: of the settings now, before the schedule's factor.
    """
    schedule.load_state_dict(state)
    groups = schedule.optimizer.param_groups
    rate = learning_rate * options.factor(schedule.last_epoch)
    for group in groups:
        group["initial_lr"], group["lr"] = learning_rate, rate
    schedule.base_lrs = [learning_rate for _ in groups]
    schedule._last_lr = [rate for _ in groups]


def averaged(network: nn.Module, decay: float = 0.9999, *, device: torch.device | None = None) -> AveragedModel:
    """Creates an exponential moving average (EMA): average = decay * average + (1 - decay) * weights.

    Call `update_parameters(network)` after each step. The n-th update uses min(decay, (1 + n) / (10 + n)), as the
    released code, so that the initial weights are soon forgotten. Buffers such as batch norm statistics are copied.
    `.module` is the averaged network; `state_dict` includes the count.

    Raises:
        TrainingError: a decay outside 0 to 1.
    """
    if not 0 <= decay <= 1:
        raise TrainingError(f"the averaging decay is {decay}; expected 0 to 1 (the released recipe's is 0.9999)")

    def update(average: Any, current: Any, count: Any) -> None:
        now = min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(average, current, 1 - now)

    ema = AveragedModel(network, device=device, multi_avg_fn=update)
    return ema.requires_grad_(False)
