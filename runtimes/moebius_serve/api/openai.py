"""OpenAI's `images.edit`: transparent pixels of the mask mark what to fill."""

from __future__ import annotations

import base64
import time
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, HTTPException, Request, UploadFile

from moebius_serve.answers import filled
from moebius_serve.jobs import Jobs
from moebius_serve.uploads import Intake, short

_MOST = 4


def router(jobs: Jobs, intake: Intake) -> APIRouter:
    """The route `/v1/images/edits`."""
    api = APIRouter(prefix="/v1", tags=["OpenAI"])

    @api.post("/images/edits")
    async def edit(
        request: Request,
        image: Annotated[UploadFile, File(description="the picture")],
        mask: Annotated[UploadFile | None, File(description="its mask: alpha 0 is filled")] = None,
        prompt: Annotated[str, Form(description="accepted and ignored: this network takes no text")] = "",
        n: Annotated[int, Form(description=f"how many pictures, with seeds that follow one another; 1 to {_MOST}")] = 1,
        response_format: Annotated[str, Form(description="b64_json")] = "b64_json",
    ) -> dict[str, Any]:
        """Fills the transparent part of the mask, `n` times."""
        if response_format != "b64_json":
            raise HTTPException(
                400, f"response_format is {short(response_format)}; expected b64_json, as this server keeps no files"
            )
        if not 1 <= n <= _MOST:
            raise HTTPException(400, f"n is {n}; expected 1 to {_MOST}")
        picture, name = await image.read(), image.filename or "image.png"
        drawn = picture if mask is None else await mask.read()  # without a mask the picture's own transparency counts
        data = []
        for seed in range(n):
            make = partial(intake.make_job, picture, drawn, {"seed": seed}, name=name, suffix=".png", alpha=True)
            job = await filled(jobs, request, make)
            data.append({"b64_json": base64.b64encode(job.file).decode()})
        return {"created": int(time.time()), "data": data}

    return api
