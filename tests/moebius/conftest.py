"""Fixtures that tests of weights share."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import save as to_safetensors


def _fake_hub() -> ModuleType:
    """tests/fakes/fake_hub.py."""
    if "fake_hub" not in sys.modules:
        path = Path(__file__).parents[1] / "fakes" / "fake_hub.py"
        spec = importlib.util.spec_from_file_location("fake_hub", path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules["fake_hub"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["fake_hub"])
    return sys.modules["fake_hub"]


fake_hub = _fake_hub()


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("OneHub", (fake_hub.Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = fake_hub.Hub(
        files={
            "pretrained/diffusion_pytorch_model.bin": fake_hub.pickled(0),
            "ft_places2/diffusion_pytorch_model.bin": fake_hub.pickled(1),
            "ft_places2/notes.json": b"{}",
            "vae/config.json": b'{"scaling_factor": 0.13025}',
            "vae/diffusion_pytorch_model.bin": fake_hub.pickled(2),
            "vae/diffusion_pytorch_model.safetensors": to_safetensors(fake_hub.weights(3)),
            "two/a.bin": fake_hub.pickled(4),
            "two/b.bin": fake_hub.pickled(5),
            "broken/config.json": b"{",
        },
        old_files={"ft_places2/diffusion_pytorch_model.bin": fake_hub.pickled(9)},
        address=f"http://127.0.0.1:{server.server_port}",
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    handler.hub.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(server: ThreadingHTTPServer, only_hub: Callable[[str], list[float]]) -> Any:
    """A hub on this machine, empty caches, and no way to another hub."""
    made = server.RequestHandlerClass.hub
    made.slept = only_hub(made.address)
    return made
