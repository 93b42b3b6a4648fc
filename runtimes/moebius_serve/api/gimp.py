"""moebius-gimp's calls: the GIMP plugin's client works with this server unchanged."""

from __future__ import annotations

import base64
from typing import Any

from fastapi import APIRouter, Request

from moebius_serve.answers import filled
from moebius_serve.jobs import Jobs
from moebius_serve.uploads import Intake, from_base64


def router(jobs: Jobs, intake: Intake, model: str, device: str) -> APIRouter:
    """The routes `/inpaint`, `/health` and `/models`."""
    api = APIRouter(tags=["moebius-gimp"])

    @api.get("/health")
    def health() -> dict[str, Any]:
        """Whether the server is up, and what waits."""
        return {"status": "ok", "device": device, "model": model, **jobs.facts()}

    @api.get("/models")
    def models() -> dict[str, Any]:
        """The one model."""
        return {"models": [model], "current": model}

    @api.post("/inpaint")
    async def inpaint(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Fills the white of the mask."""
        options = {
            "guidance_scale": body.get("cfg"),
            "steps": body.get("num_steps"),
            "seed": body.get("seed"),
            "compensate_colour": body.get("compensate"),
        }

        def make() -> Any:
            image = from_base64(body.get("image_png_b64"), "image_png_b64")
            mask = from_base64(body.get("mask_png_b64"), "mask_png_b64")
            return intake.make_job(image, mask, intake.of_other_programs(options), name="image.png", suffix=".png")

        job = await filled(jobs, request, make)
        return {
            "image_png_b64": base64.b64encode(job.file).decode(),
            "device": device,
            "seed": job.options.seed,
            "notes": list(job.notes),
        }

    return api
