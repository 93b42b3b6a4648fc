"""Fixtures that tests of weights share."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
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
def hub(server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A hub on this machine, empty caches, and no way to another hub."""
    constants = pytest.importorskip("huggingface_hub.constants")
    made = server.RequestHandlerClass.hub
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "HF_ENDPOINT": made.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MOEBIUS_CACHE": str(tmp_path / "moebius"),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    # huggingface_hub has read its environment when it was imported.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    slept: list[float] = []  # the library waits between its tries
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=slept.append, time=time.time))
    made.slept = slept
    return made
