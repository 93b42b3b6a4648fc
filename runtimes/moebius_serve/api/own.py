"""The page's own API: jobs with progress and cancellation."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, HTTPException, Request, Response, UploadFile
from fastapi.responses import StreamingResponse
from PIL import Image

from moebius_runtime.errors import MoebiusError
from moebius_runtime.images.saving import OUTPUT_FORMATS
from moebius_serve.answers import encoded, file_answer, refuse, submitted, watching
from moebius_serve.api.iopaint import answered, png_bytes, segment
from moebius_serve.jobs import FINAL, Job, Jobs
from moebius_serve.segmenter import Segmenter
from moebius_serve.uploads import Intake, short

_GRACE = 10.0  # seconds after the last listener has gone until its job is cancelled: a page may be reloading
_BEAT = 15.0  # seconds between comments that keep a quiet stream open
_MAX_OPTIONS = 10_000  # characters


def router(jobs: Jobs, intake: Intake, defaults: dict[str, Any], segmenter: Segmenter | None) -> APIRouter:
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
        job = await submitted(jobs, lambda: intake.make_job(picture, drawn, given, name=name))
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
    async def result(job_id: str, format: str | None = None) -> Response:
        """The filled picture, in the source's format or as `format` (jpg, png, webp, tif)."""
        job = found(job_id)
        if job.state != "done":
            status = job.status if job.state == "failed" else 409
            raise HTTPException(status, job.error or f"the job is {job.state}; its result can be read once it is done")
        suffix = job.suffix if format is None else f".{format.lower().lstrip('.')}"
        if suffix not in OUTPUT_FORMATS:
            known = ", ".join(one[1:] for one in OUTPUT_FORMATS)
            raise HTTPException(400, f"format is {short(format)}; expected one of {known}")
        try:
            return file_answer(job, await encoded(job, suffix), suffix)
        except MoebiusError as error:
            raise refuse(error) from error

    @api.delete("/jobs/{job_id}", status_code=204)
    def delete(job_id: str) -> Response:
        """Cancels a job, within a step where it runs, and drops its result."""
        jobs.forget(found(job_id))
        return Response(status_code=204)

    @api.post("/preview")
    async def preview(
        image: Annotated[UploadFile, File(description="a picture that a browser cannot show")],
    ) -> Response:
        """The picture as the browser can show it: upright, sRGB numbers of 8 bits, PNG."""
        data = await image.read()

        def shown() -> bytes:
            picture = intake.read_picture(data, "the picture")
            return png_bytes(Image.fromarray(picture.to_rgb()), compress_level=1)

        return await answered(shown)

    @api.post("/select")
    async def select(
        image: Annotated[UploadFile, File(description="the picture")],
        clicks: Annotated[str, Form(description="JSON: [[x, y, 1 for the object or 0 for what is not of it], ...]")],
    ) -> Response:
        """The mask of the object at clicked points, white on black, as PNG; needs `--segmenter`."""
        if segmenter is None:
            raise HTTPException(404, "this server has no segmentation model; start it with --segmenter FOLDER")
        points, data = parse_json(clicks, "clicks", "[[120, 80, 1]]"), await image.read()
        return await answered(lambda: segment(segmenter, intake.read_picture(data, "the picture"), points))

    return api


def parse_json(text: str, what: str, example: str) -> Any:
    """A field of a form; `HTTPException` 400 where it is not JSON."""
    try:
        if len(text) > _MAX_OPTIONS:
            raise ValueError("too long")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"{what} is not JSON, or too long; expected the like of {example}") from error


def parse_options(text: str) -> dict[str, Any]:
    """The `options` field of a form; `HTTPException` 400 where it is not a JSON object."""
    given = parse_json(text, "options", '{"steps": 20}')
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
    try:
        with watching(jobs, job) as changed:
            while True:
                changed.clear()
                content = status(jobs, job)
                yield f"event: {content['state']}\ndata: {json.dumps(content)}\n\n"
                if content["state"] in FINAL:  # and not the job's, which may have ended since
                    return
                try:
                    await asyncio.wait_for(changed.wait(), _BEAT)
                except (asyncio.TimeoutError, TimeoutError):
                    yield ": still here\n\n"
    finally:
        if job.state not in FINAL:
            asyncio.get_running_loop().call_later(_GRACE, _cancel_unwatched, jobs, job)


def _cancel_unwatched(jobs: Jobs, job: Job) -> None:
    if not job.listeners:
        jobs.cancel(job)
