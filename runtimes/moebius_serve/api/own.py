"""The page's own API: jobs with progress and cancellation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import StreamingResponse

from moebius_runtime.errors import InputError
from moebius_serve.answers import MEDIA, encoded, file_answer, refuse, submitted
from moebius_serve.jobs import FINAL, Job, Jobs
from moebius_serve.limits import Limits
from moebius_serve.uploads import make_job

_GRACE = 10.0  # seconds after the last listener has gone until its job is cancelled: a page may be reloading
_BEAT = 15.0  # seconds between comments that keep a quiet stream open
_MAX_OPTIONS = 10_000  # characters


def router(jobs: Jobs, limits: Limits, defaults: dict[str, Any]) -> APIRouter:
    """Routes below `/api/v1/jobs`, and `/api/v1/defaults`."""
    api = APIRouter(prefix="/api/v1", tags=["jobs"])

    def found(job_id: str) -> Job:
        job = jobs.get(job_id)
        if job is None:
            raise HTTPException(404, "there is no such job here, or its result was dropped after a while")
        return job

    @api.get("/defaults")
    def read_defaults() -> dict[str, Any]:
        """What the bundle is, its default options, and the limits of this server."""
        return defaults

    @api.post("/jobs", status_code=202)
    async def create(
        image: Annotated[UploadFile, File(description="the picture, in any format that can be read")],
        mask: Annotated[UploadFile, File(description="its mask: white is filled")],
        options: Annotated[str, Form(description="JSON: fields of `InpaintOptions`, and of the mask")] = "{}",
    ) -> dict[str, Any]:
        """Puts a picture into the queue."""
        given = parse_options(options)
        picture, drawn, name = await image.read(), await mask.read(), image.filename or "image.png"
        job = await submitted(jobs, lambda: make_job(picture, drawn, given, limits, name=name))
        return status(jobs, job)

    @api.get("/jobs/{job_id}")
    def read(job_id: str) -> dict[str, Any]:
        """How far a job is."""
        return status(jobs, found(job_id))

    @api.get("/jobs/{job_id}/events")
    async def events(job_id: str, request: Request) -> StreamingResponse:
        """Server-sent events: the job's status at once and after every change. The stream ends with the job."""
        return StreamingResponse(_events(jobs, found(job_id), request), media_type="text/event-stream")

    @api.get("/jobs/{job_id}/result")
    async def result(job_id: str, format: str | None = None) -> Response:  # noqa: A002 - the query's name
        """The filled picture, in the source's format or as `format` (jpg, png, webp, tif)."""
        job = found(job_id)
        if job.state != "done":
            raise HTTPException(409 if job.state not in FINAL else job.status, job.error or f"the job is {job.state}")
        suffix = None if format is None else f".{format.lower().lstrip('.')}"
        if suffix is not None and suffix not in MEDIA:
            raise HTTPException(400, f"format is {format!r:.40}; expected one of {', '.join(s[1:] for s in MEDIA)}")
        try:
            return file_answer(job, *await encoded(job, suffix))
        except InputError as error:
            raise refuse(error) from error

    @api.delete("/jobs/{job_id}", status_code=204)
    def delete(job_id: str) -> Response:
        """Cancels a job, within a step where it runs, and drops its result."""
        jobs.forget(found(job_id))
        return Response(status_code=204)

    return api


def parse_options(text: str) -> dict[str, Any]:
    """The `options` field of a form; `HTTPException` 400 where it is not a JSON object."""
    try:
        if len(text) > _MAX_OPTIONS:
            raise ValueError("too long")
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "options is not JSON; expected an object such as {\"steps\": 20}") from error
    if not isinstance(given, dict):
        raise HTTPException(400, f"options is a JSON {type(given).__name__}; expected an object")
    return given


def status(jobs: Jobs, job: Job) -> dict[str, Any]:
    """A job as JSON."""
    left = job.seconds_left()
    return {
        "id": job.id,
        "state": job.state,
        "position": jobs.position(job),
        "step": job.done_steps,
        "steps": job.all_steps,
        "seconds_left": None if left is None else round(left, 1),
        "seed": job.options.seed,
        "notes": list(job.notes),
        "error": job.error,
    }


async def _events(jobs: Jobs, job: Job, request: Request) -> AsyncIterator[str]:
    loop, changed = asyncio.get_running_loop(), asyncio.Event()

    def listener() -> None:
        loop.call_soon_threadsafe(changed.set)

    jobs.watch(job, listener)
    try:
        while True:
            changed.clear()
            content = status(jobs, job)
            yield f"event: {content['state']}\ndata: {json.dumps(content)}\n\n"
            if job.state in FINAL:
                return
            try:
                await asyncio.wait_for(changed.wait(), _BEAT)
            except (asyncio.TimeoutError, TimeoutError):
                yield ": still here\n\n"
    finally:
        jobs.unwatch(job, listener)
        if job.state not in FINAL:
            loop.call_later(_GRACE, _cancel_unwatched, jobs, job)


def _cancel_unwatched(jobs: Jobs, job: Job) -> None:
    if not job.listeners:
        jobs.cancel(job)
