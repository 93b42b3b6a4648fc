"""Fills the pictures of one shard, in every engine: resumes, records, and finishes it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from moebius_batch.destination import Destination, Line, Summary
from moebius_batch.fill import Filler, result_file
from moebius_batch.items import Item, Shard
from moebius_batch.job import Settings
from moebius_batch.keys import seed_of
from moebius_batch.sources import items_of
from moebius_runtime.errors import InputError, OutputError, one_line

OnLine = Callable[[Line], None]


def run_shard(settings: Settings, shard: Shard, fill: Filler, on_line: OnLine = lambda line: None) -> Summary:
    """Fills what is not finished of a shard and writes its report.

    Args:
        settings: of the job.
        shard: where it is finished, its failed pictures are filled again if `settings.retry_failed`, else nothing is.
        fill: fills one picture.
        on_line: called with each line, also those that an earlier process wrote.

    Returns:
        The counts of all of the shard's pictures.

    Raises:
        MoebiusError: the source or destination fails as a whole, or the bundle cannot be run. A broken picture is a
            line of the report.
    """
    destination = Destination(settings.out, settings.write)
    summary = Summary()
    if shard.number in destination.finished() and not (settings.retry_failed and destination.reopen(shard)):
        for line in destination.report(shard.number):  # Ray runs a shard again whose result was lost with a node
            summary.add(line)
            on_line(line)
        return summary
    with tempfile.TemporaryDirectory(dir=settings.scratch) as folder:
        items = items_of(shard, Path(folder))
        opened = destination.open_shard(shard)
        opened.resume([(item, result_file(item)) for item in items])
        for line in opened.lines.values():
            summary.add(line)
            on_line(line)
        try:
            if len(opened.lines) < len(items):
                fill.pipeline  # noqa: B018 - opened here, where its errors end the job, not in the line of a picture
            for item in items:
                if item.key in opened.lines:
                    continue
                line = _line(item, settings, fill, opened.save)
                opened.record(line)
                summary.add(line)
                on_line(line)
        except BaseException:
            opened.stopped()
            raise
        opened.finish(items)
    return summary


def _line(item: Item, settings: Settings, fill: Filler, save: Callable[[str, bytes], None]) -> Line:
    started = time.perf_counter()
    seed = seed_of(item.key, settings.seed)
    try:
        filled = fill(item)
    except (InputError, OutputError, MemoryError) as error:
        reason = "not enough memory for it" if isinstance(error, MemoryError) else one_line(str(error))
        return Line(item.key, "failed", seed=seed, seconds=round(time.perf_counter() - started, 4), error=reason)
    save(filled.file, filled.data)
    seconds = round(time.perf_counter() - started, 4)
    return Line(item.key, "ok", filled.file, seed, seconds, tuple(map(one_line, filled.notes)))
