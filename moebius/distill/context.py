"""What a training step depends on beside network and batch: device, random draws, precision, the other processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from moebius.errors import TrainingError

_Result = TypeVar("_Result")


@dataclass
class TrainContext:
    """Where and how a training step runs.

    Attributes:
        device: of the network and of the batches.
        generator: on the CPU, in the same state in every process: draws are made for the global batch.
        rank: this process among `world`.
        world: number of processes.
        accelerator: gives autocast, the gradient scaler and reductions; None means float32 in a single process.
    """

    device: torch.device
    generator: torch.Generator
    rank: int = 0
    world: int = 1
    accelerator: Accelerator | None = None

    def own(self, drawn: Tensor) -> Tensor:
        """This process' rows of what was drawn for the global batch, on its device: [B * world, ...] -> [B, ...]."""
        return drawn[self.rank :: self.world].to(self.device)

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision, where the accelerator has it on."""
        if self.accelerator is None:
            return nullcontext()
        return cast(AbstractContextManager[None], self.accelerator.autocast())

    @property
    def scale(self) -> float:
        """The gradient scaler's present factor; 1 without a scaler."""
        scaler = None if self.accelerator is None else self.accelerator.scaler
        return 1.0 if scaler is None else float(scaler.get_scale())

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes. Every process must call it, in the same order."""
        if self.accelerator is None or self.world == 1:
            return value
        return cast(Tensor, self.accelerator.reduce(value.clone(), reduction="mean"))

    def any(self, here: bool) -> bool:
        """Whether `here` is True in any process. Every process must call it, in the same order.

        Processes that branch on a condition of their own would wait for each other in different collectives.
        """
        return float(self.mean(torch.tensor(float(here), device=self.device))) > 0

    def together(self, act: Callable[[], _Result]) -> _Result:
        """Runs `act`, which contains no collective, and fails in every process if it fails in any.

        Raises:
            TrainingError: `act` raised it here, or another process failed.
        """
        failure: Exception | None = None
        try:
            result = act()
        except Exception as error:
            failure = error
        if self.any(failure is not None):
            raise failure or TrainingError("another process failed; its error is printed by that process")
        return result
