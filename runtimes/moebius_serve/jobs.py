"""Jobs: a bounded queue, one worker thread over one pipeline, progress to listeners, results kept for a while."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from moebius_runtime.errors import (
    BundleError,
    CancelledError,
    EngineError,
    InputError,
    MoebiusError,
    RuntimeUnavailableError,
)
from moebius_runtime.files import atomic_write
from moebius_runtime.images.pictures import Picture
from moebius_runtime.images.saving import picture_bytes
from moebius_runtime.pipeline import InpaintOptions, InpaintResult
from moebius_serve.limits import Limits

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINAL: tuple[State, ...] = ("done", "failed", "cancelled")
Listener = Callable[[], None]


class Inpainter(Protocol):
    """What the worker needs of an `InpaintPipeline`."""

    def inpaint(
        self,
        picture: Picture,
        mask: npt.NDArray[np.bool_],
        options: InpaintOptions,
        on_step: Callable[[int, int], None] | None = None,
        *,
        cancelled: Callable[[], bool] | None = None,
    ) -> InpaintResult:
        """See `InpaintPipeline.inpaint`."""
        ...


class QueueFullError(Exception):
    """No more jobs are taken at present; `retry_after` is in seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


@dataclass(eq=False)
class Job:
    """One picture on its way. Fields change under the queue's lock; `mask` and `picture` go when it ends.

    Attributes:
        picture: as it came, with everything that its file holds.
        mask: bool [H, W], True = fill.
        options: of the filling.
        name: the picture's file name.
        suffix: what the result is encoded as, `.png` and the like.
        quality: of a JPEG or AVIF result.
        notes: what the user should know of reading, filling and writing.
    """

    picture: Picture | None
    mask: npt.NDArray[np.bool_] | None
    options: InpaintOptions
    name: str
    suffix: str = ".png"
    quality: int = 95
    notes: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    state: State = "queued"
    done_steps: int = 0
    all_steps: int = 0
    created: float = field(default_factory=time.monotonic)
    started: float | None = None
    finished: float | None = None
    result: Picture | None = None
    file: bytes = b""  # the result as `suffix`
    status: int = 200  # what a synchronous call answers
    error: str | None = None
    pixels: int = 0
    listeners: set[Listener] = field(default_factory=set)
    cancel: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        assert self.picture is not None
        height, width = self.picture.shape
        self.pixels = height * width

    def seconds_left(self) -> float | None:
        """Estimate from the steps so far; None before the first step."""
        if self.state != "running" or not self.done_steps or self.started is None:
            return None
        return (time.monotonic() - self.started) / self.done_steps * (self.all_steps - self.done_steps)


class Jobs:
    """The queue and its worker. Every method may be called from any thread."""

    def __init__(self, pipeline: Inpainter, limits: Limits, save_dir: Path | None = None) -> None:
        self.limits = limits
        self._save_dir = save_dir
        self._pipeline = pipeline
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._running: Job | None = None
        self._stopping = False
        self._worker = threading.Thread(target=self._work, name="moebius-serve worker", daemon=True)
        self._worker.start()

    def submit(self, job: Job) -> None:
        """Puts a job into the queue.

        Raises:
            QueueFullError: too many jobs, or too many pixels, wait; or the server is stopping.
        """
        with self._lock:
            self._drop_old()
            self._check_room(job.pixels)
            self._jobs[job.id] = job
            self._waiting.append(job)
            self._lock.notify_all()

    def check_room(self) -> None:
        """Raises `QueueFullError` where no job would be taken now; asked before a picture is decoded for one."""
        with self._lock:
            self._check_room(0)

    def _check_room(self, more: int) -> None:
        if self._stopping:
            raise QueueFullError("the server is stopping; try again later", 30)
        pending = [*self._waiting, *([self._running] if self._running else [])]
        pixels = sum(one.pixels for one in pending)
        if len(pending) >= self.limits.queue:
            raise QueueFullError(f"{len(pending)} jobs wait, the most that are taken; try again later", 10)
        if pending and pixels + more > self.limits.pending_pixels:
            raise QueueFullError(f"{pixels / 1e6:.0f} megapixels wait already; try again when some jobs are done", 10)

    def get(self, job_id: str) -> Job | None:
        """The job of an id, or None where there is none (any more)."""
        with self._lock:
            self._drop_old()
            return self._jobs.get(job_id)

    def position(self, job: Job) -> int:
        """Jobs before this one: 0 for one that runs or is over."""
        with self._lock:
            if job not in self._waiting:
                return 0
            return self._waiting.index(job) + (self._running is not None)

    def cancel(self, job: Job) -> None:
        """Ends a job: at once where it waits, within a step where it runs. One that is over stays as it is."""
        with self._lock:
            if job.state == "queued":
                self._waiting.remove(job)
                self._finish(job, "cancelled", 499, "the job was cancelled")
            elif job.state == "running":
                job.cancel.set()

    def forget(self, job: Job) -> None:
        """Cancels a job and drops its result."""
        self.cancel(job)
        with self._lock:
            if job.state in FINAL:
                self._jobs.pop(job.id, None)

    def watch(self, job: Job, listener: Listener) -> None:
        """Calls `listener` on every change of the job, in the thread that made it; it must not block."""
        with self._lock:
            job.listeners.add(listener)

    def unwatch(self, job: Job, listener: Listener) -> None:
        """Ends `watch`."""
        with self._lock:
            job.listeners.discard(listener)

    def facts(self) -> dict[str, Any]:
        """Counts for `/health`."""
        with self._lock:
            return {"waiting": len(self._waiting), "running": int(self._running is not None), "kept": len(self._jobs)}

    def stop(self) -> None:
        """Takes no more jobs and cancels what waits and runs. Returns at once; may be called from a signal handler."""
        self._stopping = True
        running = self._running
        if running is not None:
            running.cancel.set()
        threading.Thread(target=self._end_waiting, daemon=True).start()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the worker to end after `stop`; whether it did."""
        self._worker.join(timeout)
        return not self._worker.is_alive()

    def _end_waiting(self) -> None:
        with self._lock:
            while self._waiting:
                self._finish(self._waiting.popleft(), "cancelled", 503, "the server is stopping")
            self._lock.notify_all()

    def _work(self) -> None:
        while True:
            with self._lock:
                while not self._waiting and not self._stopping:
                    self._lock.wait()
                if self._stopping:
                    return
                job = self._running = self._waiting.popleft()
                job.state, job.started = "running", time.monotonic()
                self._notify(job)
            try:
                self._run(job)
            finally:
                with self._lock:
                    self._running = None

    def _run(self, job: Job) -> None:
        deadline = time.monotonic() + self.limits.job_seconds

        def on_step(done: int, of: int) -> None:
            with self._lock:
                job.done_steps, job.all_steps = done, of
                self._notify(job)

        def cancelled() -> bool:
            return job.cancel.is_set() or time.monotonic() > deadline

        state: State = "failed"
        status, error = 500, None
        result: Picture | None = None
        data = b""
        try:
            assert job.picture is not None
            assert job.mask is not None
            found = self._pipeline.inpaint(job.picture, job.mask, job.options, on_step, cancelled=cancelled)
            data, lost = picture_bytes(found.picture, f"the result{job.suffix}", job.quality)
            self._save(job, data)
            state, status, result = "done", 200, found.picture
            job.notes = (*job.notes, *found.notes, *lost)
        except CancelledError:
            if job.cancel.is_set():
                state, status, error = "cancelled", 499, "the job was cancelled"
            else:
                status = 408
                error = f"the job took longer than {self.limits.job_seconds:.0f} s, the limit of this server"
        except InputError as problem:
            status, error = 400, str(problem)
        except (BundleError, EngineError, RuntimeUnavailableError) as problem:
            status, error = 503, str(problem)
        except MoebiusError as problem:
            status, error = 500, str(problem)
        except MemoryError:
            status, error = 503, "not enough memory for this picture; try a smaller one"
        except Exception as problem:  # a bug: the server goes on, and the client learns no more than its kind
            status, error = 500, f"the job failed inside the server ({type(problem).__name__})"
            _log_bug(problem)
        with self._lock:
            job.result, job.file = result, data if result is not None else b""
            self._running = None  # before anyone learns of the end, and asks for the place
            self._finish(job, state, status, error)

    def _save(self, job: Job, data: bytes) -> None:
        """Writes a result to the folder of `--save-dir`, under a name that no other result has."""
        if self._save_dir is None:
            return
        stem = re.sub(r"[^\w.-]+", "_", job.name.rpartition(".")[0] or job.name).strip(".")[:80]
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{job.id[:8]}-{stem}-filled{job.suffix}"
        with atomic_write(self._save_dir / name) as stream:
            stream.write(data)

    def _finish(self, job: Job, state: State, status: int, error: str | None) -> None:
        job.state, job.status, job.error, job.finished = state, status, error, time.monotonic()
        job.mask = job.picture = None
        self._jobs.move_to_end(job.id)
        self._notify(job)
        self._drop_old()

    def _notify(self, job: Job) -> None:
        for listener in tuple(job.listeners):
            listener()

    def _drop_old(self) -> None:
        """Drops finished jobs that are too old or too many, the oldest first."""
        now = time.monotonic()
        over = [job for job in self._jobs.values() if job.state in FINAL]
        pixels = sum(job.pixels for job in over)
        for index, job in enumerate(over):
            assert job.finished is not None
            too_many = len(over) - index > self.limits.kept_results
            newest = index == len(over) - 1
            if (
                now - job.finished > self.limits.kept_seconds
                or too_many
                or (pixels > self.limits.kept_pixels and not newest)
            ):
                del self._jobs[job.id]
                pixels -= job.pixels


def _log_bug(problem: BaseException) -> None:
    import logging

    logging.getLogger("moebius_serve").error("a job failed", exc_info=problem)
