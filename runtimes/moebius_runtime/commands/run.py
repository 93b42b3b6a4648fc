"""The loop of `moebius-inpaint` over its pictures: read, fill, write, and report progress, notes and a summary."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from moebius_runtime import console
from moebius_runtime.commands.pairing import Job
from moebius_runtime.errors import InputError, OutputError
from moebius_runtime.files import check_writable
from moebius_runtime.images.comparison import save_comparison
from moebius_runtime.images.masks import load_mask
from moebius_runtime.images.pictures import NamedBytes, Picture, load_picture
from moebius_runtime.images.saving import OUTPUT_FORMATS, check_can_save, picture_bytes, save_picture
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline, OnStep
from moebius_runtime.regions.plan import Plan


@dataclass(frozen=True)
class Piped:
    """What stands for `-`.

    Attributes:
        given: the bytes of standard input, {the path `-`: bytes}; empty where neither picture nor mask is `-`.
        out: standard output, where the result is written to it.
        format: the format to write there; None takes the picture's own.
    """

    given: dict[Path, bytes]
    out: BinaryIO | None
    format: str | None

    def source(self, path: Path) -> Path | NamedBytes:
        """What to read for a path: the file, or the bytes of standard input."""
        return NamedBytes("standard input", self.given[path]) if path in self.given else path


@dataclass(frozen=True)
class Files:
    """How pictures and masks are read and written.

    Attributes:
        mask: keywords of `moebius_runtime.images.masks.load_mask`.
        quality: of JPEG and AVIF, 1 to 100.
        overwrite: replace results that exist; they are skipped otherwise.
        keep_going: report a picture that fails and go on with the next one.
        piped: standard input and output.
    """

    mask: dict[str, Any]
    quality: int
    overwrite: bool
    keep_going: bool
    piped: Piped


def run_all(jobs: list[Job], out: Path, pipeline: InpaintPipeline, options: InpaintOptions, files: Files) -> int:
    """Runs the jobs sequentially and prints a summary.

    Args:
        jobs: see `moebius_runtime.commands.pairing`.
        out: the value of `--out`, which the summary names.
        pipeline: the pipeline.
        options: how to fill.
        files: how to read and write.

    Returns:
        The exit code: 0, or 1 where a picture of a folder failed.

    Raises:
        MoebiusError: a picture failed and `files.keep_going` is False, or the bundle cannot be run.
    """
    done, failed = 0, 0
    existing: list[Path] = []
    started = time.perf_counter()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console.err) as bars:
        for job in jobs:
            if there := [] if files.overwrite else [path for path in job.written if os.path.lexists(path)]:
                existing.append(there[0])
                continue
            task = bars.add_task(console.one_line(job.image.name), total=None)
            try:
                _run_one(job, pipeline, options, files, partial(_advance, bars, task))
            except BaseException as error:
                bars.remove_task(task)  # no half-filled bar beside the error
                if not (files.keep_going and isinstance(error, (InputError, OutputError))):
                    raise
                failed += 1
                console.warn(f"{job.image}: not done: {error}")
            else:
                done += 1
    summary = f"{done} picture{'s' * (done != 1)} filled"
    summary += f", {len(existing)} skipped" * bool(existing) + f", {failed} failed" * bool(failed)
    kernels = pipeline.backend.describe().get("kernels")
    took = f"{time.perf_counter() - started:.1f} s" + (f", kernels: {kernels}" if kernels else "")
    if files.piped.out is None:
        console.out.print(console.one_line(f"{summary} in {took}: {out if files.keep_going else jobs[0].out}"))
    if existing:  # the last line, because nothing was done for these
        listed = ", ".join(map(str, existing[:5])) + (f" and {len(existing) - 5} more" if len(existing) > 5 else "")
        verbs, pronoun = ("exists and is", "it") if len(existing) == 1 else ("exist and are", "them")
        console.warn(f"{listed} {verbs} kept; --overwrite replaces {pronoun}")
    return 1 if failed else 0


def _advance(bars: Progress, task: TaskID, done: int, total: int) -> None:
    bars.update(task, completed=done, total=total)


def _run_one(job: Job, pipeline: InpaintPipeline, options: InpaintOptions, files: Files, on_step: OnStep) -> None:
    """Fills one picture, writes it and prints its notes."""
    piped = files.piped
    with console.quiet_libraries():
        picture = load_picture(piped.source(job.image))
        target = job.out if piped.out is None else _stdout_name(picture, piped.format)
        check_can_save(picture, target)
        for path in job.written:
            check_writable(path, follow_links=True)
        area = load_mask(piped.source(job.mask), picture.shape, rotation=picture.orientation, **files.mask)
    forecast = _Forecast(job.image.name, on_step)
    result = pipeline.inpaint(picture, area, options, forecast.on_step, forecast.on_plan)
    if piped.out is None:
        lost = save_picture(result.picture, job.out, files.quality)
    else:
        data, lost = picture_bytes(result.picture, target, files.quality)
        console.write_binary(piped.out, data)
    common = pipeline.option_notes(options)  # printed once, before the first picture
    own = [note for note in result.notes if note not in common]
    if job.strip:
        save_comparison(picture, area, result.picture, job.strip)
    for note in (*picture.notes, *own, *lost):
        console.warn(f"{job.image.name if job.image not in piped.given else 'standard input'}: {note}")


def _stdout_name(picture: Picture, format: str | None) -> Path:
    """A name whose suffix is the format for standard output: the given one, else the picture's own, else PNG."""
    own = next((suffix for suffix, name in OUTPUT_FORMATS.items() if name == picture.format), ".png")
    return Path("standard output" + (own if format is None else f".{format.lower().lstrip('.')}"))


class _Forecast:
    """Prints what a picture of several squares will take: their number at once, the time after the second step."""

    def __init__(self, name: str, on_step: OnStep) -> None:
        self.name, self.next = name, on_step
        self.plan: Plan | None = None
        self.first = 0.0

    def on_plan(self, plan: Plan) -> None:
        if len(plan.squares) > 1:
            self.plan = plan
            console.warn(f"{self.name}: {plan.describe()}")

    def on_step(self, done: int, total: int) -> None:
        if done == 1:  # its time includes loading and encoding; the next one's is that of one step
            self.first = time.perf_counter()
        elif done == 2 and self.plan:
            seconds = time.perf_counter() - self.first
            console.warn(f"{self.name}: {self.plan.estimate(seconds)}, from the time of one step ({seconds:.2f} s)")
        self.next(done, total)
