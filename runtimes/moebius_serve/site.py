"""`moebius-serve --site`: a static site of `moebius-export web`, with the headers that threads and WebAssembly need."""

from __future__ import annotations

import json
import os
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from moebius_runtime.errors import InputError
from moebius_runtime.files import read_plain
from moebius_serve.guard import Access, App, Guard
from moebius_serve.limits import Limits

_TYPES = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}
_MOST_BYTES = 16 << 20  # of site.json
_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self' blob:; worker-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class _Files(StaticFiles):
    """The site's files with their types, whatever the system's own table says. Shards never change: their name is
    their hash."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        """As Starlette's; answers ranges."""
        answer = super().file_response(full_path, stat_result, scope, status_code)
        path = Path(full_path)
        if path.suffix in _TYPES:
            answer.headers["content-type"] = _TYPES[path.suffix]
        fixed = path.parent.name == "shards"
        answer.headers["cache-control"] = "public, max-age=31536000, immutable" if fixed else "no-cache"
        answer.headers["content-security-policy"] = _POLICY
        return answer


def create_site(folder: Path, access: Access, limits: Limits) -> App:
    """The server of a site's folder, as an ASGI application. It needs no pipeline.

    Raises:
        InputError: the folder is not a site.
    """
    try:
        content = json.loads(read_plain(folder / "site.json", _MOST_BYTES))
        known = isinstance(content, dict) and content.get("schema_version") == 1 and (folder / "index.html").is_file()
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is not JSON"
        raise InputError(
            f"{folder / 'site.json'}: {reason}; expected the folder that `moebius-export web BUNDLE --out SITE` wrote"
        ) from error
    if not known:
        raise InputError(f"{folder} is no site of this version; export it again: moebius-export web BUNDLE --out SITE")
    files = Mount("/", _Files(directory=folder, html=True))
    return Guard(Starlette(routes=[files]), access, limits)
