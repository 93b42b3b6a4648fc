"""`moebius-distill CONFIG.yaml`: trains the student, the teacher or the VAE."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moebius.errors import TrainingError
from moebius_runtime import console

if TYPE_CHECKING:
    from moebius.distill.loop.trainer import Trainer
    from moebius.distill.settings import Settings


def train_command(
    config: Annotated[Path, typer.Argument(help="A YAML file, see docs/distill.md.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint, if there is one.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of PyTorch on a CPU.")] = None,
) -> None:
    """Trains the student (with or without a teacher), the teacher or the VAE, as the file describes."""
    from moebius.distill.settings import load_settings

    settings = load_settings(config)
    _check_free(settings, resume)
    import torch

    from moebius.distill.loop.trainer import Trainer

    if threads:
        torch.set_num_threads(threads)
    try:
        _train(settings, resume, Trainer)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _train(settings: Settings, resume: bool, make: type[Trainer]) -> None:
    from moebius.distill.outputs.logs import Log

    progress: Callable[[str], None] = console.err.print
    shower = _Samples(settings)
    trainer = make(settings, progress=progress, on_skip=lambda name, reason: console.warn(f"skipped {name}: {reason}"))
    start = trainer.resume() if resume else 0
    log = Log(settings.out, settings.log_every, start, settings.tensorboard) if trainer.is_main else None
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[shown]}"),
    )
    with Progress(*columns, console=console.err, disable=log is None) as bars, _asked_to_stop() as asked:
        bar = bars.add_task("", total=settings.steps, completed=start, shown="")

        def on_step(report: Any) -> None:
            bars.update(bar, completed=report.step)
            if log is not None and (means := log.step(report)):
                bars.update(bar, shown=f"loss {means.get('loss', math.nan):.4g}")

        def on_samples(step: int, task: Any, network: Any) -> None:
            assert log is not None
            log.picture(step, shower(task, network))

        trainer.on_step, trainer.on_samples = on_step, on_samples
        try:
            done = trainer.run(asked)
        finally:
            if log is not None:
                log.close()
    if done is None:
        raise TrainingError(f"stopped at step {trainer.step}, a checkpoint is in {settings.out}; resume with --resume")
    if trainer.is_main:
        console.out.print(f"weights: {settings.out}")


class _Samples:
    """Draws sample pictures of the same few samples each time, from another seed than the training samples."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._held: tuple[Any, Any] | None = None

    def __call__(self, task: Any, network: Any) -> Any:
        from moebius.distill.few_step_settings import sample_steps
        from moebius.distill.loop.assembly import build_stream, decoder
        from moebius.distill.outputs.samples import sheet

        shown = self._settings.samples
        assert shown is not None
        if self._held is None:
            few = self._settings.model_copy(update={"batch": shown.count, "seed": self._settings.seed + 1})
            stream = build_stream(few)
            batch = next(iter(stream))
            stream.close()
            self._held = batch, None if self._settings.train == "vae" else decoder(self._settings)
        batch, decode = self._held
        steps = sample_steps(self._settings)
        return sheet(task, network, batch, decode, steps=steps, guidance_scale=shown.guidance_scale)


def _check_free(settings: Settings, resume: bool) -> None:
    from moebius.distill.loop.checkpoints import latest

    if not resume and (found := latest(settings.out)):
        raise TrainingError(
            f"{settings.out} holds a run ({found.name}); add --resume to continue it, or choose another `out`"
        )


@contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Lets Ctrl-C and SIGTERM end the run after the current step, with a checkpoint, however often they arrive.

    Under torchrun one Ctrl-C arrives twice, from the terminal and from torchrun. Ctrl-\\ ends the process at once.
    """
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if not asked:
            console.err.print("stopping after this step, with a checkpoint; Ctrl-\\ stops at once, without one")
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
