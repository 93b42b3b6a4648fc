"""What every call of the API shares: errors in one sentence, a job waited for, pictures as answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from fastapi import HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from moebius_runtime.errors import BundleError, EngineError, InputError, MoebiusError, RuntimeUnavailableError
from moebius_runtime.images.saving import OUTPUT_FORMATS, picture_bytes
from moebius_serve.jobs import FINAL, Job, Jobs, QueueFullError
from moebius_serve.uploads import TooLargeError

_POLL = 0.5  # seconds between two looks at whether the client is still there


def refuse(error: Exception) -> HTTPException:
    """The HTTP answer to an error whose message is for the client."""
    if isinstance(error, QueueFullError):
        return HTTPException(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, TooLargeError):
        return HTTPException(413, str(error))
    if isinstance(error, (BundleError, EngineError, RuntimeUnavailableError)):
        return HTTPException(503, str(error))
    return HTTPException(400 if isinstance(error, InputError) else 500, str(error))


async def submitted(jobs: Jobs, make: Callable[[], Job]) -> Job:
    """Makes a job in a thread, as decoding takes time, and puts it into the queue."""
    try:
        jobs.check_room()
        job = await run_in_threadpool(make)
        jobs.submit(job)
    except (MoebiusError, QueueFullError) as error:
        raise refuse(error) from error
    return job


@contextmanager
def watching(jobs: Jobs, job: Job) -> Iterator[asyncio.Event]:
    """An event of the running loop that is set on every change of a job, whichever thread makes it."""
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def listener() -> None:
        loop.call_soon_threadsafe(changed.set)

    jobs.watch(job, listener)
    try:
        yield changed
    finally:
        jobs.unwatch(job, listener)


async def finished(jobs: Jobs, job: Job, gone: Callable[[], Awaitable[bool]]) -> Job:
    """Waits for a job to end. A client that goes away cancels it.

    Raises:
        HTTPException: the job failed, with its status and sentence.
    """
    try:
        with watching(jobs, job) as changed:
            while job.state not in FINAL:
                changed.clear()
                if job.state in FINAL:
                    break
                with suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(changed.wait(), _POLL)
                if await gone():
                    jobs.cancel(job)
    except asyncio.CancelledError:
        jobs.cancel(job)
        raise
    if job.state != "done":
        jobs.forget(job)
        raise HTTPException(job.status, job.error or "the job failed")
    return job


async def filled(jobs: Jobs, request: Request, make: Callable[[], Job]) -> Job:
    """Makes, queues and waits for a job, which is forgotten then: what the synchronous calls do."""
    job = await finished(jobs, await submitted(jobs, make), request.is_disconnected)
    jobs.forget(job)
    return job


async def encoded(job: Job, suffix: str) -> bytes:
    """A finished job's picture as a file of that suffix; `InputError` where the format cannot hold it."""
    if suffix == job.suffix:
        return job.file
    assert job.result is not None
    data, _ = await run_in_threadpool(picture_bytes, job.result, f"the result as {suffix}", job.quality)
    return data


def file_answer(job: Job, data: bytes, suffix: str) -> Response:
    """The file as the body, its seed and its name in headers."""
    stem = PurePath(job.name).stem.encode(errors="replace").decode()
    headers: dict[str, Any] = {
        "X-Seed": str(job.options.seed),
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(f'{stem}-filled{suffix}', safe='')}",
    }
    return Response(data, media_type=media_type(suffix), headers=headers)


def media_type(suffix: str) -> str:
    """`image/png` and the like."""
    return f"image/{OUTPUT_FORMATS[suffix].lower()}"
