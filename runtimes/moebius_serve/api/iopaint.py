"""IOPaint's calls, as its own front end and its plugins send them (field names from its public schema)."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.concurrency import run_in_threadpool
from PIL import Image, ImageChops, ImageFilter

from moebius_runtime.errors import MoebiusError
from moebius_runtime.images.pictures import Picture
from moebius_runtime.sampling.samplers import SAMPLERS
from moebius_serve.answers import file_answer, filled, refuse
from moebius_serve.jobs import Jobs
from moebius_serve.segmenter import Segmenter, checked_clicks
from moebius_serve.uploads import Intake, from_base64, short

_MAX_KERNEL = 512
_PLUGIN = {"name": "InteractiveSeg", "support_gen_image": False, "support_gen_mask": True}


def router(jobs: Jobs, intake: Intake, model: str, segmenter: Segmenter | None) -> APIRouter:
    """Routes below `/api/v1`."""
    api = APIRouter(prefix="/api/v1", tags=["IOPaint"])

    @api.post("/inpaint")
    async def inpaint(request: Request, body: dict[str, Any]) -> Response:
        """Fills the white of the mask. Fields that mean nothing here are accepted and ignored."""
        options = intake.of_other_programs(_options(body))

        def make() -> Any:
            image, mask = from_base64(body.get("image"), "image"), from_base64(body.get("mask"), "mask")
            return intake.make_job(image, mask, options, name="image.png", suffix=".png")

        job = await filled(jobs, request, make)
        return file_answer(job, job.file, job.suffix)

    @api.get("/server-config")
    def server_config() -> dict[str, Any]:
        """What IOPaint's front end asks first: nothing but inpainting is offered."""
        return {
            "plugins": [_PLUGIN] if segmenter else [],
            "modelInfos": [_model(model)],
            "removeBGModel": "",
            "removeBGModels": [],
            "realesrganModel": "",
            "realesrganModels": [],
            "interactiveSegModel": segmenter.name if segmenter else "",
            "interactiveSegModels": [segmenter.name] if segmenter else [],
            "enableFileManager": False,
            "enableAutoSaving": False,
            "enableControlnet": False,
            "controlnetMethod": None,
            "disableModelSwitch": True,
            "isDesktop": False,
            "samplers": intake.samplers,
        }

    @api.get("/model")
    def current_model() -> dict[str, Any]:
        """The one model."""
        return _model(model)

    @api.get("/samplers")
    def samplers() -> list[str]:
        """Names for `sd_sampler`."""
        return intake.samplers

    @api.post("/adjust_mask")
    async def adjust_mask(body: dict[str, Any]) -> Response:
        """A mask grown, shrunk or inverted, as PNG."""
        kernel, operate = body.get("kernel_size", 12), body.get("operate")
        if not isinstance(kernel, int) or isinstance(kernel, bool) or not 0 < kernel <= _MAX_KERNEL:
            raise HTTPException(400, f"kernel_size is {short(kernel)}; expected a whole number from 1 to {_MAX_KERNEL}")
        if operate not in ("expand", "shrink", "reverse"):
            raise HTTPException(400, f"operate is {short(operate)}; expected expand, shrink or reverse")

        def adjusted() -> bytes:
            grey = Image.fromarray(intake.read_picture(from_base64(body.get("mask"), "mask"), "the mask").to_rgb())
            return png_bytes(_adjusted(grey.convert("L"), operate, kernel))

        return await answered(adjusted)

    @api.post("/run_plugin_gen_mask")
    async def run_plugin_gen_mask(body: dict[str, Any]) -> Response:
        """The mask of the object at clicked points, white on black, as PNG."""
        name, clicks = body.get("name"), body.get("clicks")
        if segmenter is None or name != _PLUGIN["name"]:
            raise HTTPException(404, f"there is no plugin {short(name)} here; start the server with --segmenter FOLDER")

        def drawn() -> bytes:
            picture = intake.read_picture(from_base64(body.get("image"), "image"), "the picture")
            return segment(segmenter, picture, clicks)

        return await answered(drawn)

    return api


async def answered(make: Callable[[], bytes]) -> Response:
    """A PNG that is made in a thread, or the answer to the error that making it raised."""
    try:
        return Response(await run_in_threadpool(make), media_type="image/png")
    except MoebiusError as error:
        raise refuse(error) from error


def segment(segmenter: Segmenter, picture: Picture, clicks: Any) -> bytes:
    """The mask of what was clicked, as the bytes of a PNG."""
    area = segmenter.segment(picture.to_rgb(), checked_clicks(clicks, picture.shape))
    return png_bytes(Image.fromarray(area.astype(np.uint8) * np.uint8(255)))


def _options(body: dict[str, Any]) -> dict[str, Any]:
    """IOPaint's fields as `InpaintOptions`; absent ones take the bundle's defaults."""
    steps = body.get("sd_steps") if body.get("sd_steps") is not None else body.get("ldm_steps")
    sampler = body.get("sd_sampler")
    return {
        "steps": steps,
        "guidance_scale": body.get("sd_guidance_scale"),
        "strength": body.get("sd_strength"),
        "seed": body.get("sd_seed"),
        "sampler": sampler if isinstance(sampler, str) and sampler in SAMPLERS else None,
    }


def _model(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "path": name,
        "model_type": "inpaint",
        "is_single_file_diffusers": False,
        "need_prompt": False,
        "controlnets": [],
        "brushnets": [],
        "support_strength": True,
        "support_outpainting": False,
        "support_lcm_lora": False,
        "support_controlnet": False,
        "support_brushnet": False,
        "support_powerpaint_v2": False,
    }


def _adjusted(grey: Image.Image, operate: str, kernel: int) -> Image.Image:
    """The mask after one operation; the kernel is a square of the odd size at or above `kernel`."""
    binary = grey.point(lambda value: 255 if value > 127 else 0)
    if operate == "reverse":
        return ImageChops.invert(binary)
    size = kernel | 1
    # A square's maximum is that of its rows, then of its columns; steps of 9 pixels keep Pillow's filter quick.
    choose = ImageFilter.MaxFilter if operate == "expand" else ImageFilter.MinFilter
    left = size - 1
    while left:
        step = min(left, 8)
        binary = binary.filter(choose(step + 1))
        left -= step
    return binary


def png_bytes(image: Image.Image, compress_level: int = 6) -> bytes:
    """The file of an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=compress_level)
    return buffer.getvalue()
