"""Fills the pictures of one shard, in every engine: resumes, records, and finishes it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from moebius_batch.destination import Destination, Line, Summary
from moebius_batch.fill import FAILURES, Failure, Filled, Filler, result_file
from moebius_batch.items import Item, Shard
from moebius_batch.job import Settings
from moebius_batch.keys import seed_of
from moebius_batch.sources import items_of
from moebius_runtime.errors import one_line
from moebius_runtime.filling import groups

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
            waiting = [item for item in items if item.key not in opened.lines]
            alone = opened.after_death  # so that the picture at which the process died can be told apart
            for several in groups(waiting, 1 if alone else settings.batch):
                for line in _lines(several, settings, fill, opened.save):
                    opened.record(line)
                    summary.add(line)
                    on_line(line)
        except BaseException:
            opened.stopped()
            raise
        opened.finish(items)
    return summary


def _lines(
    items: Sequence[Item], settings: Settings, fill: Filler, save: Callable[[str, bytes], None]
) -> Iterator[Line]:
    """Fills pictures at once and yields their lines, each when its result is written; they share the time."""
    started = time.perf_counter()
    filled: Sequence[Filled | Failure]
    if len(items) == 1:
        try:
            filled = [fill(items[0])]
        except FAILURES as error:
            filled = [error]
    else:
        filled = fill.several(items)
    share = (time.perf_counter() - started) / len(items)
    for item, result in zip(items, filled, strict=True):
        started, seed = time.perf_counter(), seed_of(item.key, settings.seed)
        if isinstance(result, Filled):
            save(result.file, result.data)
        seconds = round(share + time.perf_counter() - started, 4)
        if isinstance(result, Filled):
            yield Line(item.key, "ok", result.file, seed, seconds, tuple(map(one_line, result.notes)))
            continue
        reason = "not enough memory for it" if isinstance(result, MemoryError) else one_line(str(result))
        yield Line(item.key, "failed", seed=seed, seconds=seconds, error=reason)
