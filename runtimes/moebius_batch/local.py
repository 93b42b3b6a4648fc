"""The engine `local`: processes of this machine, each with a warm pipeline. One that dies is replaced."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, NoReturn

from moebius_batch.destination import DEATHS, Line
from moebius_batch.errors import FailingJobError, WorkerError
from moebius_batch.fill import Filler
from moebius_batch.items import Shard
from moebius_batch.job import Settings
from moebius_batch.shards import run_shard
from moebius_runtime.errors import MoebiusError

OnCount = Callable[[int, int], None]
"""Called with numbers of new pictures and of those that failed."""
OnNote = Callable[[str], None]


def run_here(settings: Settings, shards: Sequence[Shard], on_count: OnCount, on_note: OnNote) -> None:
    """Runs shards in this process; errors as `run_shard`, and those of `on_count`."""
    fill = Filler(settings)
    if shards:
        for note in fill.take_notes():
            on_note(note)
    for shard in shards:
        run_shard(settings, shard, fill, lambda line: on_count(1, line.status != "ok"))


def run_processes(
    settings: Settings, shards: Sequence[Shard], workers: int, on_count: OnCount, on_note: OnNote
) -> None:
    """Runs shards in `workers` processes. A process that dies is replaced, and its shard run again.

    Raises:
        WorkerError: a worker's error that ends the job, see `run_shard`.
        FailingJobError: processes die without finishing a picture, or `on_count` raises it.
    """
    waiting = deque(shards)
    pool = [_Worker(settings) for _ in range(min(workers, len(shards)))]
    deaths = 0  # since the last picture
    seen: set[str] = set()
    counted: dict[int, set[str]] = {}  # keys of the open shards: a shard that is run again reports them again
    try:
        for worker in pool:
            worker.take(waiting)
        while busy := [worker for worker in pool if worker.shard is not None]:
            for ready in wait([worker.connection for worker in busy]):
                worker = next(one for one in busy if one.connection is ready)
                message = worker.receive()
                if message is None:
                    deaths += 1
                    shard = worker.shard
                    assert shard is not None
                    on_note(f"a worker process died ({worker.end()}) in shard {shard.number}, which is run again")
                    if deaths > DEATHS * len(pool):
                        raise FailingJobError(
                            f"{deaths} worker processes died one after the other before they finished a picture; try "
                            "fewer --workers, or one picture with moebius-inpaint"
                        )
                    waiting.appendleft(shard)
                    pool[pool.index(worker)] = worker = _Worker(settings)
                    worker.take(waiting)
                elif message["what"] == "line":
                    keys = counted.setdefault(message["shard"], set())
                    if message["key"] not in keys:
                        keys.add(message["key"])
                        deaths = 0
                        on_count(1, message["failed"])
                elif message["what"] == "note" and message["note"] not in seen:
                    seen.add(message["note"])
                    on_note(message["note"])
                elif message["what"] == "done":
                    counted.pop(message["shard"], None)
                    worker.take(waiting)
                elif message["what"] == "error":
                    raise WorkerError(message["error"], message["exit_code"])
    finally:
        for worker in pool:
            worker.stop()


class _Worker:
    """A process and the shard that it works on."""

    def __init__(self, settings: Settings) -> None:
        context = multiprocessing.get_context("spawn")  # a forked ONNX Runtime would wait for threads that are gone
        self.connection, other = context.Pipe()
        arguments = (other, settings.model_dump_json())
        self.process = context.Process(target=_work, args=arguments, name="moebius-batch", daemon=True)
        self.process.start()
        other.close()
        self.shard: Shard | None = None

    def take(self, waiting: deque[Shard]) -> None:
        """Gives it the next shard, or nothing."""
        self.shard = waiting.popleft() if waiting else None
        if self.shard is not None:
            with suppress(OSError):  # it has died: the next `receive` finds out
                self.connection.send_bytes(self.shard.to_json().encode())

    def receive(self) -> dict[str, Any] | None:
        """The next message, or None where the process has died."""
        try:
            found: dict[str, Any] = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError, ValueError):
            return None
        return found

    def end(self) -> str:
        """How the process ended."""
        self.process.join(10)
        code = self.process.exitcode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def stop(self) -> None:
        self.connection.close()
        self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _work(connection: Connection, settings_json: str) -> None:
    """The process: takes shards until the pipe closes."""

    def send(what: str, **more: Any) -> None:
        connection.send_bytes(json.dumps({"what": what, **more}).encode())

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command stops its processes itself
    signal.signal(signal.SIGTERM, end)
    settings = Settings.model_validate_json(settings_json)
    fill = Filler(settings)
    noted = False
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the command has ended
        while True:
            shard = Shard.from_json(connection.recv_bytes().decode())
            try:
                if not noted:
                    for note in fill.take_notes():
                        send("note", note=note)
                    noted = True
                run_shard(settings, shard, fill, partial(_send_line, send, shard.number))
            except MoebiusError as error:
                send("error", error=str(error), exit_code=error.exit_code)
                return
            send("done", shard=shard.number)


def _send_line(send: Callable[..., None], shard: int, line: Line) -> None:
    send("line", shard=shard, key=line.key, failed=int(line.status != "ok"))
