"""One call of `moebius-batch`: lists the source, takes its share of the shards, runs an engine, and reports."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from moebius_batch.destination import Destination, Summary
from moebius_batch.items import Shard
from moebius_batch.job import Settings, Write, mask_fields, record
from moebius_batch.progress import JobProgress
from moebius_batch.sources import Columns, Source, open_source
from moebius_batch.stores import normal
from moebius_runtime import console
from moebius_runtime.backends import AUTO
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import Precision, content_digest
from moebius_runtime.errors import InputError
from moebius_runtime.filling import check_batch
from moebius_runtime.pipeline import make_options


@dataclass(frozen=True)
class Request:
    """What a user asks for; see the options of `moebius-batch`.

    Attributes:
        share: (I, N) of `--shard I/N`.
        options: keywords of `make_options`, but the seed.
        masking: keywords of `load_mask`.
    """

    source: str
    out: str
    bundle: Path
    masks: str | None = None
    share: tuple[int, int] = (1, 1)
    engine: Literal["local", "ray"] = "local"
    address: str = "auto"
    workers: int | None = None
    threads: int | None = None
    batch: int = 1
    runtime: str = "ort-cpu"
    device: str | None = None
    precision: Precision | None = None
    trust: bool = False
    write: Write | None = None
    shard_size: int = 64
    columns: Columns = field(default_factory=Columns)
    max_error_share: float = 0.1
    retry_failed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    masking: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    quality: int = 95


def run_job(request: Request) -> int:
    """Runs this process's share of a job and prints a summary.

    Returns:
        0, or 1 where a picture of the share failed, now or before.

    Raises:
        MoebiusError: the source, the destination or the bundle cannot be used, or the job was stopped.
    """
    make_options(**request.options)  # refuses wrong values before anything is listed
    if request.runtime == AUTO:
        raise InputError(
            "--runtime auto: workers and later runs could take different runtimes, and a job's results come from one; "
            "name it, such as the one that `moebius-inpaint --runtime auto` takes here"
        )
    bundle = Bundle.open(request.bundle)
    check_batch(bundle.manifest, request.batch, bundle.path)
    source = open_source(request.source, request.out, request.masks, request.columns, request.shard_size)
    settings = _settings(request, source, bundle)
    destination = Destination(settings.out, settings.write)
    destination.begin(record(settings, source, request.source, content_digest(bundle.manifest.model_dump(mode="json"))))
    if bundle.manifest.stand_in:
        console.warn("this bundle has stand-in weights (random test weights): the picture inside the mask is noise")
    index, shares = request.share
    mine = [shard for shard in source.shards if shard.number % shares == index - 1]
    before = destination.finished()
    shards = [shard for shard in mine if shard.number not in before or _has_failures(destination, shard, request)]
    total = None if source.kind == "tars" else sum(len(shard.items or ()) for shard in shards)
    if shares > 1 or before:
        left = f"{len(shards)} of {len(source.shards)} shards are left for this process"
        console.warn(left if shares == 1 else f"share {index} of {shares}: {left}")
    with _terminated(), JobProgress(total, request.max_error_share) as progress:
        _run(request, settings, shards, progress)
    return _report(destination, mine, shards, len(source.shards), progress)


def _settings(request: Request, source: Source, bundle: Bundle) -> Settings:
    from moebius_runtime.hardware.processors import physical_cores

    threads, workers = request.threads, request.workers or 1
    if threads is None and request.engine == "local" and workers > 1 and request.runtime == "ort-cpu":
        threads = max(1, physical_cores() // workers)
    return Settings(
        bundle=str(request.bundle.absolute()) if bundle.remote is None else str(request.bundle),
        runtime=request.runtime,
        device=request.device,
        precision=request.precision,
        trust=request.trust,
        threads=threads,
        batch=request.batch,
        options=request.options,
        masking=request.masking,
        seed=request.seed,
        quality=request.quality,
        out=normal(request.out),
        write=request.write or ("tars" if source.kind == "tars" else "folder"),
        source=normal(request.source),
        **mask_fields(source.mask),
        retry_failed=request.retry_failed,
    )


def _has_failures(destination: Destination, shard: Shard, request: Request) -> bool:
    return request.retry_failed and any(line.status != "ok" for line in destination.report(shard.number))


def _run(request: Request, settings: Settings, shards: list[Shard], progress: JobProgress) -> None:
    if request.engine == "ray":
        from moebius_batch.ray_engine import run_ray

        run_ray(settings, shards, request.workers, request.address, progress.add, console.warn)
        return
    from moebius_batch.local import run_here, run_processes

    if (request.workers or 1) > 1:
        run_processes(settings, shards, request.workers or 1, progress.add, console.warn)
    else:
        run_here(settings, shards, progress.add, console.warn)


@contextmanager
def _terminated() -> Iterator[None]:
    """Ends the process in order at SIGTERM, which Slurm sends: journals are written, worker processes ended."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(destination: Destination, mine: list[Shard], ran: list[Shard], shards: int, progress: JobProgress) -> int:
    """Prints the summary of the share, writes that of the job if it is finished, and returns the exit code."""
    summary = Summary()
    for shard in mine:
        for line in destination.report(shard.number):
            summary.add(line)
    missing = shards - len(destination.finished())
    if not missing:
        destination.finish_job(shards, progress.seconds)
    text = f"{summary.filled} pictures filled" + f", {summary.failed} failed" * bool(summary.failed)
    if len(ran) < len(mine):
        text += f" ({len(mine) - len(ran)} of {len(mine)} shards were finished before)"
    text += f" in {progress.seconds:.1f} s: {destination.out}"
    if missing:
        text += f"; {missing} of {shards} shards of the job are not finished"
    console.out.print(console.one_line(text))
    if summary.failed:
        where = "the reports name them" if missing else "report.jsonl names them"
        console.warn(f"{summary.failed} pictures failed: {where}, in {destination.own_folder}")
    return 1 if summary.failed else 0
