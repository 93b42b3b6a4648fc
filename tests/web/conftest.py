"""A site of the tiny bundle, its server, and its page in Chromium. onnxruntime-web comes from tests/page's packages."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ONNXRUNTIME_WEB = Path(__file__).parents[1] / "page/node_modules/onnxruntime-web"

_SPEC = importlib.util.spec_from_file_location("page_fixtures", Path(__file__).parents[1] / "serve/page/conftest.py")
_PAGE = sys.modules["page_fixtures"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_PAGE)
browser, tools, Page = _PAGE.browser, _PAGE.tools, _PAGE.Page


@pytest.fixture
def fake_runtime(tmp_path, monkeypatch) -> Path:
    """A folder in place of onnxruntime-web, for tests that run no graph."""
    import hashlib

    from moebius_export.web import onnxruntime_web

    folder = tmp_path / "onnxruntime-web"
    folder.mkdir()
    hashes = {}
    for name in onnxruntime_web.FILES:
        (folder / name).write_bytes(name.encode())
        hashes[name] = hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(onnxruntime_web, "FILES", hashes)
    return folder


@pytest.fixture
def put_together(tmp_path) -> Callable[[Path, str], Path]:
    """put_together(site, graph): the path of the graph's ONNX file, with its weights, made of the site's shards."""

    def make(site: Path, graph: str) -> Path:
        described = json.loads((site / "site.json").read_text())["graphs"][graph]
        folder = tmp_path / "back" / graph
        folder.mkdir(parents=True)
        for name, shards in {"model.onnx": described["model"], **described["data"]}.items():
            (folder / name).write_bytes(
                b"".join((site / f"shards/{shard['sha256']}.bin").read_bytes() for shard in shards)
            )
        return folder / "model.onnx"

    return make


@pytest.fixture(scope="session")
def onnxruntime_web() -> Path:
    """The folder of the npm package."""
    if not ONNXRUNTIME_WEB.is_dir():
        pytest.skip("tests of sites need onnxruntime-web: npm install --prefix tests/page")
    return ONNXRUNTIME_WEB


@pytest.fixture(scope="session")
def site(shared_folder, fused_bundle, onnxruntime_web) -> Path:
    """The tiny bundle as a site, with shards of 200 kB. Read only."""
    from moebius_export.web.site import export_site

    out = shared_folder / "site"
    if not out.exists():
        export_site(fused_bundle, out, onnxruntime_web=onnxruntime_web, shard_bytes=200_000)
    return out


@pytest.fixture(scope="session")
def fp16_site(shared_folder, fused_bundle, onnxruntime_web) -> tuple[Path, str]:
    """The tiny bundle as a site of fp16, by the command itself, and what the command reported. Read only."""
    out, log = shared_folder / "fp16-site", shared_folder / "fp16-site.log"
    if not log.exists():
        done = run_command("web", fused_bundle, "--out", out, "--fp16", "--onnxruntime-web", onnxruntime_web)
        assert done.returncode == 0, done.stderr
        log.write_text(done.stderr)
    return out, log.read_text()


def run_command(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`moebius-export` with these arguments, as a process."""
    started = [sys.executable, "-m", "moebius_export.commands.app", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "COLUMNS": "300"}
    return subprocess.run(started, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="session")
def export_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """export_command(*arguments): see `run_command`."""
    return run_command


class Served:
    """A running server of a folder.

    Args:
        folder: the site.
        wrap: puts another ASGI application around the server's.
    """

    def __init__(self, folder: Path, wrap: Callable = lambda app: app) -> None:
        from moebius_serve.guard import Access
        from moebius_serve.limits import Limits
        from moebius_serve.server import Server
        from moebius_serve.site import create_site

        limits, ready = Limits(), threading.Event()
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        self._server = Server(wrap(create_site(folder, Access(), limits)), None, limits, ready.set)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listening]}, daemon=True)
        self._thread.start()
        assert ready.wait(30)

    def stop(self) -> None:
        self._server.handle_exit(15, None)
        self._thread.join(30)
        assert not self._thread.is_alive()


@pytest.fixture
def serve_site():
    """serve_site(folder, wrap=...): a server, which ends with the test."""
    pytest.importorskip("fastapi", reason="pip install 'moebius-edge[serve]'")
    servers = []

    def start(folder: Path, **more) -> Served:
        servers.append(Served(folder, **more))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def visit(browser):
    """visit(url, script="", browser=None, **of the context): the page of a site in a fresh profile.

    `script` runs before the page's own ones. At the end: no request to another host.
    """
    opened = []

    def open_page(url: str, script: str = "", browser=browser, **more) -> Page:
        context = browser.new_context(viewport={"width": 1000, "height": 700}, **more)
        context.set_default_timeout(60_000)
        if script:
            context.add_init_script(script)
        page = Page(context.new_page(), url)
        page.page.wait_for_selector("body[data-offline]")
        opened.append((context, page, url))
        return page

    yield open_page
    for context, page, url in opened:
        foreign = [one for one in page.requests if not one.startswith((url, "blob:", "data:"))]
        context.close()
        assert foreign == []


@pytest.fixture
def on_swiftshader(browser):
    """Chromium with WebGPU on SwiftShader, a Vulkan driver in software."""
    flags = ["--no-sandbox", "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]
    chromium = browser.browser_type.launch(executable_path=_PAGE.CHROMIUM, args=flags)
    yield chromium
    chromium.close()


@pytest.fixture(scope="module")
def picture() -> bytes:
    """PNG, 200 x 150."""
    rng = np.random.RandomState(3)
    small = Image.fromarray(rng.randint(0, 256, (12, 16, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    small.resize((200, 150), Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def paint(picture) -> Callable[[Page], bytes]:
    """paint(page): opens the picture, marks a stroke, and returns the mask that the page saves."""

    def open_and_mark(page: Page) -> bytes:
        page.open("a.png", picture)
        page.drag((60, 60), (90, 80))
        return page.saved("mask-save")

    return open_and_mark
