"""What every call of the API shares: errors in one sentence, a job waited for, pictures as answers."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

from fastapi import HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool

from moebius_runtime.errors import InputError, MoebiusError
from moebius_runtime.pictures import encode_picture
from moebius_serve.jobs import FINAL, Job, Jobs, QueueFullError
from moebius_serve.uploads import TooLargeError

MEDIA = {".jpg": "image/jpeg", ".png": "image/png", ".webp": "image/webp", ".tif": "image/tiff", ".avif": "image/avif"}
_POLL = 0.5  # seconds between two looks at whether the client is still there


def refuse(error: Exception) -> HTTPException:
    """The HTTP answer to an error that a client can fix."""
    if isinstance(error, QueueFullError):
        return HTTPException(429, str(error), headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, TooLargeError):
        return HTTPException(413, str(error))
    return HTTPException(400 if isinstance(error, InputError) else 500, str(error))


async def submitted(jobs: Jobs, make: Callable[[], Job]) -> Job:
    """Makes a job in a thread, as decoding takes time, and puts it into the queue."""
    try:
        job = await run_in_threadpool(make)
        jobs.submit(job)
    except (MoebiusError, QueueFullError) as error:
        raise refuse(error) from error
    return job


async def finished(jobs: Jobs, job: Job, gone: Callable[[], Awaitable[bool]]) -> Job:
    """Waits for a job to end. A client that goes away cancels it.

    Raises:
        HTTPException: the job failed, with its status and sentence.
    """
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def listener() -> None:
        loop.call_soon_threadsafe(changed.set)

    jobs.watch(job, listener)
    try:
        while job.state not in FINAL:
            changed.clear()
            if job.state in FINAL:
                break
            try:
                await asyncio.wait_for(changed.wait(), _POLL)
            except (asyncio.TimeoutError, TimeoutError):
                if await gone():
                    jobs.cancel(job)
    except asyncio.CancelledError:
        jobs.cancel(job)
        raise
    finally:
        jobs.unwatch(job, listener)
    if job.state != "done":
        raise HTTPException(job.status, job.error or "the job failed")
    return job


async def filled(jobs: Jobs, request: Request, make: Callable[[], Job]) -> Job:
    """Makes, queues and waits for a job: what the synchronous calls do."""
    return await finished(jobs, await submitted(jobs, make), request.is_disconnected)


async def encoded(job: Job, suffix: str | None = None) -> tuple[bytes, str]:
    """A finished job's picture as a file, in its own format or that of `suffix`, and the file's suffix."""
    assert job.result is not None
    suffix = suffix or own_suffix(job)
    data, _ = await run_in_threadpool(encode_picture, job.result, suffix, job.quality)
    return data, suffix


def own_suffix(job: Job) -> str:
    """The suffix of the source, or `.png` where its format is read but not written."""
    suffix = re.sub(r"\.(jpe?g|jfif|jpe)$", ".jpg", "." + job.name.rpartition(".")[2].lower())
    suffix = ".tif" if suffix == ".tiff" else suffix
    return suffix if suffix in MEDIA else ".png"


def file_answer(job: Job, data: bytes, suffix: str) -> Response:
    """The file as the body, its seed and its name in headers."""
    stem = job.name.rpartition(".")[0] or job.name
    name = quote(f"{stem}-filled{suffix}")
    headers: dict[str, Any] = {
        "X-Seed": str(job.options.seed),
        "Content-Disposition": f"inline; filename*=UTF-8''{name}",
    }
    return Response(data, media_type=MEDIA[suffix], headers=headers)
