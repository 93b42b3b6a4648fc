"""A live server over the toy bundle of the runtime's tests, in a thread, and what clients send to it."""

from __future__ import annotations

import importlib.util
import io
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="pip install 'moebius-edge[serve,dev]'")
pytest.importorskip("fastapi", reason="pip install 'moebius-edge[serve]'")
pytest.importorskip("uvicorn", reason="pip install 'moebius-edge[serve]'")

from moebius_runtime import InpaintPipeline  # noqa: E402
from moebius_serve.app import create_app  # noqa: E402
from moebius_serve.guard import Access  # noqa: E402
from moebius_serve.jobs import Jobs  # noqa: E402
from moebius_serve.limits import Limits  # noqa: E402
from moebius_serve.server import Server  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("toy_fixtures", Path(__file__).parents[1] / "runtime/conftest.py")
_TOYS = sys.modules["toy_fixtures"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_TOYS)
make_toy, toy_bundle, toy_copy = _TOYS.make_toy, _TOYS.toy_bundle, _TOYS.toy_copy


class Held:
    """A pipeline whose steps wait until they are let go, so that a test decides how far a job is."""

    def __init__(self, pipeline: InpaintPipeline) -> None:
        self._pipeline, self.free, self.steps, self.inside = pipeline, threading.Event(), 0, threading.Event()
        self.free.set()
        real = pipeline.backend.run

        def run(graph, inputs):
            self.inside.set()
            assert self.free.wait(30)
            self.steps += graph == "unet"
            return real(graph, inputs)

        pipeline.backend.run = run

    def hold(self) -> None:
        self.free.clear()
        self.inside.clear()


@dataclass
class Live:
    """A server that runs."""

    url: str
    jobs: Jobs
    pipeline: InpaintPipeline
    held: Held
    client: Any

    def post(self, path: str, **given: Any) -> Any:
        return self.client.post(path, **given)


@pytest.fixture(scope="session")
def serve(toy_bundle) -> Iterator[Callable[..., Live]]:
    """serve(limits={...}, access=Access(), bundle=PATH, segmenter=None, save_dir=None): ends with the session."""
    ended: list[Callable[[], None]] = []

    def start(bundle=None, *, limits=None, access=None, save_dir=None, **more) -> Live:
        pipeline = InpaintPipeline.from_bundle(bundle or toy_bundle.path, threads=1, memory="fast")
        held, bounds = Held(pipeline), replace(Limits(), **(limits or {}))
        jobs = Jobs(pipeline, bounds, save_dir)
        ready, listening = threading.Event(), socket.create_server(("127.0.0.1", 0))
        application = create_app(pipeline, jobs, access or Access(), bounds, **more)
        server = Server(application, jobs, bounds, ready.set)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        assert ready.wait(30)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        client = httpx.Client(base_url=url, timeout=60)

        def end() -> None:
            held.free.set()
            client.close()
            server.handle_exit(15, None)
            thread.join(30)
            assert jobs.join(30)
            assert not thread.is_alive()

        ended.append(end)
        return Live(url, jobs, pipeline, held, client)

    yield start
    for end in ended:
        end()


@pytest.fixture(scope="session")
def live(serve) -> Live:
    """One server that most tests share."""
    return serve()


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def read(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def colours(seed: int = 0, height: int = 128, width: int = 128) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def drawn(height: int = 128, width: int = 128) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[40:80, 48:80] = 255
    return mask


@pytest.fixture(scope="session")
def picture() -> bytes:
    return png(colours())


@pytest.fixture(scope="session")
def mask() -> bytes:
    return png(drawn())


@pytest.fixture(scope="session")
def draw() -> Any:
    """draw.png(array), draw.colours(seed, height, width), draw.mask(height, width), draw.read(bytes)."""
    return SimpleNamespace(png=png, colours=colours, mask=drawn, read=read)


@pytest.fixture
def filled_by_command(toy_bundle, tmp_path, monkeypatch, capsys) -> Callable[..., bytes]:
    """filled_by_command(picture, mask, suffix, *options): the file that `moebius-inpaint` writes of the same bytes."""
    from moebius_runtime import cli

    def fill(image: bytes, mask: bytes, suffix: str, *options: object) -> bytes:
        for name, data in (("a", image), ("m", mask)):
            (tmp_path / name).write_bytes(data)
        out = tmp_path / f"out{suffix}"
        places = ["--mask", tmp_path / "m", "--out", out, "--bundle", toy_bundle.path, "--overwrite"]
        monkeypatch.setattr(sys, "argv", [str(one) for one in ("moebius-inpaint", tmp_path / "a", *places, *options)])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert not leaving.value.code, capsys.readouterr().err
        return out.read_bytes()

    return fill
