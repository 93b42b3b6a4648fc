"""The ASGI application: the page's files and the calls, behind the guard."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser

from moebius_runtime.pipeline import InpaintPipeline
from moebius_runtime.settings.modes import DEFAULT_MODE, MODES, ModeName
from moebius_runtime.settings.options import InpaintOptions, settings_of
from moebius_serve.api import gimp, iopaint, openai, own
from moebius_serve.guard import Access, App, Guard, error_body
from moebius_serve.jobs import Jobs
from moebius_serve.limits import Limits
from moebius_serve.segmenter import Segmenter
from moebius_serve.uploads import Intake

PAGE = Path(__file__).with_name("page")


def create_app(
    pipeline: InpaintPipeline,
    jobs: Jobs,
    access: Access,
    limits: Limits,
    *,
    mode: ModeName = DEFAULT_MODE,
    segmenter: Segmenter | None = None,
) -> App:
    """The whole server over one pipeline and its queue, as an ASGI application.

    Uploads stay in memory: the multipart parser of this process no longer writes large ones to temporary files.
    """
    MultiPartParser.spool_max_size = sys.maxsize
    intake = Intake(pipeline, limits, mode)
    model = pipeline.backend.bundle.path.resolve().name
    facts = pipeline.backend.describe()
    api = FastAPI(title="moebius-serve", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    api.include_router(own.router(jobs, intake, describe(pipeline, limits, mode, segmenter), segmenter))
    api.include_router(iopaint.router(jobs, intake, model, segmenter))
    api.include_router(openai.router(jobs, intake))
    api.include_router(gimp.router(jobs, intake, model, facts.get("runtime", pipeline.backend.name)))
    api.add_exception_handler(RequestValidationError, _invalid)
    api.add_exception_handler(HTTPException, _refused)
    api.add_exception_handler(Exception, _bug)

    @api.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    @api.get("/docs", include_in_schema=False)
    def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html", headers={"cache-control": "no-cache"})

    api.mount("/page", StaticFiles(directory=PAGE), name="page")
    return Guard(api, access, limits)


def describe(pipeline: InpaintPipeline, limits: Limits, mode: ModeName, segmenter: Segmenter | None) -> dict[str, Any]:
    """What the page needs to know of the bundle and of the server."""
    manifest = pipeline.manifest
    return {
        "model": pipeline.backend.bundle.path.resolve().name,
        "test_weights": manifest.stand_in,
        "runtime": pipeline.backend.describe(),
        "image_size": manifest.geometry.image_size,
        "modes": list(MODES),
        "mode": mode,
        "mode_steps": {
            name: settings_of(InpaintOptions(mode=name), manifest.defaults, manifest.modes).steps for name in MODES
        },
        "segmenter": segmenter.name if segmenter else None,
        "defaults": manifest.defaults.model_dump(mode="json"),
        "limits": {"pixels": limits.pixels, "body_bytes": limits.body_bytes, "queue": limits.queue},
    }


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's own checks in one sentence."""
    assert isinstance(error, RequestValidationError)
    problems = [f"{'.'.join(map(str, one['loc'][1:])) or 'the request'}: {one['msg']}" for one in error.errors()[:5]]
    return JSONResponse(error_body(_plain("; ".join(problems)[:500])), 400)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(_plain(error.detail)), error.status_code, headers=error.headers)


async def _bug(request: Request, error: Exception) -> JSONResponse:
    """A bug: the answer names no more than its kind; the log has the rest."""
    logging.getLogger("moebius_serve").error("a request failed", exc_info=error)
    return JSONResponse(error_body(f"the server failed ({type(error).__name__}); its log says more"), 500)


def _plain(text: str) -> str:
    """The text without lone surrogates, which JSON can bring in and UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()
