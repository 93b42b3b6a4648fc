"""The training loop. Distribution, precision and gradient accumulation are `accelerate`'s."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from moebius.data.encoded import EncodedStream
from moebius.distill.loop import checkpoints
from moebius.distill.loop.assembly import Stream, build_stream, build_task
from moebius.distill.loop.checkpoints import RankState, RunState
from moebius.distill.loop.context import TrainContext
from moebius.distill.loop.finishing import write_weights
from moebius.distill.loop.sharding import (
    before_prepare,
    check_distribution,
    check_environment,
    check_precision,
    load_whole_state,
    to_average,
    whole,
    whole_state,
)
from moebius.distill.loop.tasks import Task, freeze_statistics, statistics
from moebius.distill.optimizers import MuonAdamW, averaged, learning_rate_schedule, restore_schedule
from moebius.distill.settings import Settings, changed
from moebius.errors import TrainingError

_Value = TypeVar("_Value")
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_LEAST_SCALE = 1e-4
"""A gradient scaler's factor below which a run has diverged: fairseq's default of `--min-loss-scale`. From the initial
65536 it takes 30 steps that overflow."""


class DivergedError(TrainingError):
    """A loss, gradient or weight became NaN or infinite. The last checkpoint is unchanged."""

    exit_code = 1


@dataclass(frozen=True)
class Report:
    """Result of a step: the number of steps done, and means over all processes by name."""

    step: int
    values: dict[str, float]


class Trainer:
    """Runs the training that the settings describe and writes its weights.

    Args:
        settings: checked.
        progress: called with a line of text at each stage.
        on_skip: called with name and reason of each skipped picture.

    Attributes:
        on_step: called with a `Report` after each step.
        on_samples: called in the main process with step, task and averaged network when sample pictures are due.

    Raises:
        TrainingError, CheckpointError, DataError: something that the settings name is missing or unusable.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        progress: Callable[[str], None] = lambda text: None,
        on_skip: Callable[[str, str], None] | None = None,
    ) -> None:
        self.settings, self._progress = settings, progress
        self.on_step: Callable[[Report], None] = lambda report: None
        self.on_samples: Callable[[int, Task, nn.Module], None] | None = None
        check_environment()
        self._accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),
            mixed_precision=_PRECISIONS[settings.precision],
            gradient_accumulation_steps=settings.accumulate,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=_partial(settings))],
        )
        unaveraged = settings.samples is not None and settings.ema is None
        check_distribution(self._accelerator, samples_need_average=unaveraged)
        check_precision(self._accelerator)
        self._rank, self._world = self._accelerator.process_index, self._accelerator.num_processes
        torch.manual_seed(settings.seed)
        self.task = build_task(settings, progress)
        self.stream: Stream = build_stream(settings, self._rank, self._world, on_skip)
        module = self.task.module
        if settings.batch_norm == "sync":
            if self._accelerator.device.type == "cpu":
                raise TrainingError("batch_norm: sync needs CUDA; on CPUs write `frozen` or `train`")
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        self.average: AveragedModel | None = None
        if settings.ema is not None:
            self.average = averaged(self.task.network, settings.ema.decay, device=self._accelerator.device)
            self.task.average = self.average.module.eval()
        self.optimizer = MuonAdamW(module.parameters(), settings.optimizer)
        self._schedule = learning_rate_schedule(self.optimizer, settings.schedule)
        before_prepare(self._accelerator, module)
        self._module, self._prepared = self._accelerator.prepare(module, self.optimizer)
        for frozen in self.task.frozen:
            frozen.to(self._accelerator.device)
        draws = torch.Generator().manual_seed(settings.seed)
        self._context = TrainContext(self._accelerator.device, draws, self._rank, self._world, self._accelerator)
        self.step = 0
        self._saved: Path | None = None

    def resume(self) -> int:
        """Continues from the newest checkpoint in `settings.out`, if there is one. Returns the number of steps done.

        Settings that may change (learning rate, schedule, precision) come from `settings`, not from the checkpoint.

        Raises:
            TrainingError: the checkpoint belongs to other settings, or is damaged.
        """
        folder = self._from_main(checkpoints.latest(self.settings.out))
        if folder is None:
            return 0
        shared, own = self._context.together(lambda: checkpoints.read(folder, self._rank))
        self._check_identity(shared.numbers["settings"], folder)
        checkpoints.load_optimizer(
            self.task.module, self.optimizer, shared.optimizer, shared.numbers["optimizer_groups"]
        )
        load_whole_state(self.task.network, shared.network)
        if self.average is not None and shared.average is not None:
            self.average.load_state_dict(shared.average, strict=True)
        settings = self.settings
        restore_schedule(
            self._schedule, shared.numbers["schedule"], settings.schedule, settings.optimizer.learning_rate
        )
        if self._accelerator.scaler is not None and shared.numbers["scaler"]:  # None: it was another precision
            self._accelerator.scaler.load_state_dict(shared.numbers["scaler"])
        self.stream.load_state_dict(own.position)
        self._context.generator.set_state(own.generators["draws"])
        torch.set_rng_state(own.generators["torch"])
        if torch.cuda.is_available() and "cuda" in own.generators:
            torch.cuda.set_rng_state(own.generators["cuda"])
        self.step, self._saved = int(shared.numbers["step"]), folder
        self._progress(f"resuming from step {self.step} ({folder})")
        return self.step

    def run(self, stop: Callable[[], bool] = lambda: False) -> Path | None:
        """Trains to the last step, saves checkpoints, and writes the weights. Returns their folder.

        `stop` is called after each step. If it returns True in any process, all of them stop after that step with a
        checkpoint, do not write weights, and return None.

        Raises:
            DivergedError: a loss, gradient or weight is NaN or infinite; with fp16, where steps are skipped until the
                gradient scaler's factor fits, that factor falls below 1e-4.
        """
        settings, main = self.settings, self._accelerator.is_main_process
        self._module.train()
        if settings.batch_norm == "frozen":
            freeze_statistics(self.task.module)
        batches = iter(self.stream)
        try:
            while self.step < settings.steps:
                report = self._one_step(batches)
                self.on_step(report)
                last = self.step == settings.steps or self._context.any(stop())
                if last or self.step % settings.save_every == 0:
                    self._save()
                shown = settings.samples
                if main and shown and self.on_samples and (last or self.step % shown.every == 0):
                    self.on_samples(self.step, self.task, self.weights)
                if last and self.step < settings.steps:
                    return None
            if self.average is not None and settings.average_statistics:
                self._measure_statistics(self.average.module, batches)
        finally:
            self.stream.close()
        state = whole_state(self.weights)
        self._context.together(lambda: self._write_weights(state) if main else None)
        return settings.out

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self._accelerator.is_main_process

    @property
    def weights(self) -> nn.Module:
        """The network whose weights are written: the averaged one if averaging is on."""
        return self.task.network if self.average is None else self.average.module

    def _one_step(self, batches: Iterator[Any]) -> Report:
        sums: dict[str, Tensor] = {}
        scaler = self._accelerator.scaler
        before = [value.clone() for value in statistics(self.task.module)] if scaler is not None else []
        for _ in range(self.settings.accumulate):
            with self._accelerator.accumulate(self._module):
                outcome = self.task.outcome(self._module, next(batches), self._context)
                values = {"loss": outcome.total.detach(), **outcome.values}
                for name, value in self._means(values).items():
                    sums[name] = sums.get(name, 0) + value / self.settings.accumulate
                if scaler is None:  # a gradient scaler skips the step and lowers its factor
                    self._check_finite("loss", sums["loss"], self.step + 1)
                self._accelerator.backward(outcome.total)
                if self._accelerator.sync_gradients:
                    limit = math.inf if self.settings.clip is None else self.settings.clip
                    norm = whole(self._accelerator.clip_grad_norm_(self._module.parameters(), limit))
                    if scaler is None:
                        self._check_finite("gradient's norm", norm, self.step + 1)
                    sums["gradient_norm"] = norm.detach()
                sums["learning_rate"] = torch.tensor(self._schedule.get_last_lr()[0])
                self._prepared.step()
                self._prepared.zero_grad()
        skipped = self._accelerator.optimizer_step_was_skipped
        if scaler is not None:
            sums |= {"skipped": torch.tensor(float(skipped)), "loss_scale": torch.tensor(self._context.scale)}
        if skipped:
            # The forward pass put the overflow into the batch norms' running statistics, where it would stay.
            for value, kept in zip(statistics(self.task.module), before, strict=True):
                value.copy_(kept)
            self._check_scale()
        else:
            self._schedule.step()
            if self.average is not None:
                self.average.update_parameters(to_average(self.task.network))
        self.step += 1
        return Report(self.step, {name: float(value) for name, value in sums.items()})

    def _measure_statistics(self, network: nn.Module, batches: Iterator[Any]) -> None:
        """Measures the batch norm statistics of the averaged weights on further batches.

        Averaged weights have no statistics of their own (Izmailov et al. 2018, section 3.2). Each process measures its
        own; those of the first process are written.
        """
        count = self.settings.average_statistics
        self._progress(f"measuring the averaged network's batch norms on {count} batches")
        forward = _Forward(self.task, network, self._context)
        update_bn(((next(batches),) for _ in range(count)), forward)

    def _means(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._world == 1:
            return values
        stacked = self._context.mean(torch.stack([value.float() for value in values.values()]))
        return dict(zip(values, stacked, strict=True))

    def _check_finite(self, name: str, value: Tensor, step: int) -> None:
        if not bool(torch.isfinite(value)):
            raise DivergedError(
                f"the {name} is {float(value)} in step {step}; {self._last_good}. Lower "
                "`optimizer: {learning_rate: ...}`, warm up longer, or write `precision: fp32`, and use --resume"
            )

    def _check_scale(self) -> None:
        if (scale := self._context.scale) < _LEAST_SCALE:
            raise DivergedError(
                f"float16 overflowed in so many steps that the gradient scaler's factor is {scale:.3g} after step "
                f"{self.step + 1}; {self._last_good}. Write `precision: bf16` or fp32, or lower "
                "`optimizer: {learning_rate: ...}`, and use --resume"
            )

    @property
    def _last_good(self) -> str:
        return f"the last good state is {self._saved}" if self._saved else "no checkpoint was written yet"

    def _check_weights(self, state: Mapping[str, Tensor]) -> None:
        """Checks that all weights are finite. Batch norm statistics differ by process: call under `together`."""
        for name, value in state.items():
            if value.is_floating_point():
                self._check_finite(f"sum of {name}", value.sum(), self.step)

    def _write_weights(self, state: Mapping[str, Tensor]) -> None:
        self._check_weights(state)
        latents = self.stream.index.encoding if isinstance(self.stream, EncodedStream) else None
        vae = self.task.vae_sha256 if latents is None else latents.vae_sha256
        write_weights(self.settings, state, self.step, vae)

    def _from_main(self, value: _Value) -> _Value:
        """Broadcasts the main process' value to all processes."""
        held = [value]
        if self._world > 1:
            torch.distributed.broadcast_object_list(held)
        return held[0]

    def _save(self) -> None:
        main, together = self._accelerator.is_main_process, self._context.together
        network = whole_state(self.task.network)
        tensors, groups = checkpoints.optimizer_state(self.task.module, self.optimizer)
        together(lambda: self._check_weights(network))
        own = RankState({"draws": self._context.generator.get_state(), "torch": torch.get_rng_state()})
        if torch.cuda.is_available():
            own.generators["cuda"] = torch.cuda.get_rng_state()
        own.position = self.stream.state_dict()
        part = self._from_main(together(lambda: checkpoints.begin(self.settings.out) if main else Path()))
        numbers = {
            "step": self.step,
            "settings": self.settings.identity(),
            "world": self._world,
            "optimizer_groups": groups,
            "schedule": _plain(self._schedule.state_dict()),
            "scaler": self._accelerator.scaler.state_dict() if self._accelerator.scaler else None,
        }

        def finish() -> None:
            average = None if self.average is None else whole_state(self.average)
            state = RunState(numbers, network, tensors, average)
            checkpoints.finish(part, self.settings.out, self.step, state, self.settings.keep)

        try:
            together(lambda: checkpoints.write_rank(part, self._rank, own))
            together(lambda: finish() if main else None)
        except BaseException:
            if main:
                checkpoints.remove(part)
            raise
        self._saved = checkpoints.folder_of(self.settings.out, self.step)

    def _check_identity(self, found: dict[str, Any], folder: Path) -> None:
        if other := changed(found, self.settings):
            raise TrainingError(
                f"{folder} belongs to a run with other settings ({', '.join(other)}); a resumed run must keep them. "
                "Restore them, or choose another `out`"
            )


class _Forward(nn.Module):
    """Adapts a task's forward pass to torch's `update_bn`."""

    def __init__(self, task: Task, network: nn.Module, context: TrainContext) -> None:
        super().__init__()
        self.network = network
        self._task, self._context = task, context

    def forward(self, batch: Any) -> None:
        self._task.forward(self.network, batch, self._context)


def _partial(settings: Settings) -> bool:
    """Whether a step leaves parameters without a gradient, which DistributedDataParallel must know."""
    return settings.train == "student" and settings.losses.active == ("coarse",)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """A scheduler's state without its functions, which come from the settings."""
    return {name: value for name, value in state.items() if name != "lr_lambdas"} | {"lr_lambdas": [None, None]}
