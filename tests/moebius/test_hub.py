"""Weights from a hub, against a server on this machine that answers as a hub does."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save as to_safetensors

from moebius.checkpoint import CheckpointError, load_checkpoint, load_config
from moebius.stand_in import TensorSpec, stand_in_state_dict

constants = pytest.importorskip("huggingface_hub.constants")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "76543210fedcba9876543210fedcba9876543210"
EXPECTED = {"w": TensorSpec((4, 3), torch.float32), "b": TensorSpec((4,), torch.float32)}


def weights(seed: int) -> dict[str, torch.Tensor]:
    return stand_in_state_dict(EXPECTED, seed)


def pickled(seed: int) -> bytes:
    stream = io.BytesIO()
    torch.save(weights(seed), stream)
    return stream.getvalue()


@dataclass
class Hub:
    """What the server holds, and what it was asked."""

    files: dict[str, bytes]  # of owner/repo at COMMIT, which is `main`
    old_files: dict[str, bytes]  # at OLD_COMMIT
    sent_instead: dict[str, bytes] = field(default_factory=dict)  # what a broken server sends for a path
    gated: bool = False
    status: int | None = None  # answer everything with this status
    requests: list[str] = field(default_factory=list)
    address: str = ""

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        return {
            "main": (COMMIT, self.files),
            COMMIT: (COMMIT, self.files),
            "v0": (OLD_COMMIT, self.old_files),
            OLD_COMMIT: (OLD_COMMIT, self.old_files),
        }.get(revision)


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status:
            return self.answer(self.hub.status, b"broken")
        if self.hub.gated:
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/"):
            owner, repo, _, revision = path.removeprefix("/api/models/").split("/", 3)
        else:
            owner, repo, _, revision, *rest = path.strip("/").split("/")
        if f"{owner}/{repo}" != "owner/repo":
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        if not (found := self.hub.at(unquote(revision))):
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if path.startswith("/api/"):
            siblings = [self.sibling(name, content) for name, content in files.items()]
            info = {"id": "owner/repo", "sha": commit, "siblings": siblings}
            return self.answer(200, json.dumps(info).encode())
        name = "/".join(rest)
        if name not in files:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        tag = self.sibling(name, files[name])["blobId"]
        if "lfs" in (entry := self.sibling(name, files[name])):
            tag = entry["lfs"]["sha256"]
        body = files[name] if self.command == "HEAD" else self.hub.sent_instead.get(name, files[name])
        return self.answer(200, body, {"ETag": f'"{tag}"', "X-Repo-Commit": commit})

    @staticmethod
    def sibling(name: str, content: bytes) -> dict:
        entry = {"rfilename": name, "size": len(content), "blobId": sha1(content).hexdigest()}
        if not name.endswith(".json"):
            entry["lfs"] = {"size": len(content), "sha256": sha256(content).hexdigest(), "pointerSize": 134}
        return entry

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    handler = type("OneHub", (Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = Hub(
        files={
            "pretrained/diffusion_pytorch_model.bin": pickled(0),
            "ft_places2/diffusion_pytorch_model.bin": pickled(1),
            "ft_places2/notes.json": b"{}",
            "vae/config.json": b'{"scaling_factor": 0.13025}',
            "vae/diffusion_pytorch_model.bin": pickled(2),
            "vae/diffusion_pytorch_model.safetensors": to_safetensors(weights(3)),
            "two/a.bin": pickled(4),
            "two/b.bin": pickled(5),
            "broken/config.json": b"{",
        },
        old_files={"ft_places2/diffusion_pytorch_model.bin": pickled(9)},
        address=f"http://127.0.0.1:{server.server_port}",
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def hub(server: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A hub on this machine, empty caches, and no way to another hub."""
    made: Hub = server.RequestHandlerClass.hub  # type: ignore[attr-defined]
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
    return made


def stop(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


def refusal(source: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source, EXPECTED)
    assert str(caught.value).isprintable()
    return str(caught.value)


def holds(source: str, seed: int) -> str:
    """Check that a source gives the weights of a seed; its origin."""
    loaded = load_checkpoint(source, EXPECTED)
    assert all(torch.equal(loaded.state_dict[name], value) for name, value in weights(seed).items())
    assert not loaded.stand_in
    return loaded.origin


def test_a_folder_is_downloaded_once(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    first = load_checkpoint("hub:owner/repo/ft_places2", EXPECTED, progress=said.append)
    assert torch.equal(first.state_dict["w"], weights(1)["w"])
    assert first.origin == f"hub:owner/repo/ft_places2/diffusion_pytorch_model.bin@{COMMIT}"
    assert any("fetching diffusion_pytorch_model.bin of owner/repo" in line for line in said)
    got = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert got == ["GET /owner/repo/resolve/main/ft_places2/diffusion_pytorch_model.bin"]  # and nothing else
    monkeypatch.setattr(torch, "load", None)  # the pickle is not opened again
    again = load_checkpoint("hub:owner/repo/ft_places2", EXPECTED)
    assert (again.origin, again.sha256) == (first.origin, first.sha256)
    assert [r for r in hub.requests if r.startswith("GET") and "/resolve/" in r] == got


def test_safetensors_are_preferred_and_a_file_can_be_named(hub: Hub) -> None:
    assert holds("hub:owner/repo/vae", 3).endswith(f"vae/diffusion_pytorch_model.safetensors@{COMMIT}")
    assert not any(request.endswith(".bin") for request in hub.requests)
    assert holds("hub:owner/repo/vae/diffusion_pytorch_model.bin", 2)
    assert holds("hub:owner/repo/two/b.bin", 5)
    hub.files["model.bin"] = pickled(6)
    assert holds("hub:owner/repo", 6) == f"hub:owner/repo/model.bin@{COMMIT}"


def test_a_revision_is_pinned(hub: Hub) -> None:
    assert holds(f"hub:owner/repo/ft_places2@{OLD_COMMIT}", 9).endswith(f"@{OLD_COMMIT}")
    assert holds("hub:owner/repo/ft_places2@v0", 9).endswith(f"@{OLD_COMMIT}")
    assert holds("hub:owner/repo/ft_places2", 1).endswith(f"@{COMMIT}")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("hub:owner/other/x", "has no repository owner/other"),
        ("hub:owner/repo/ft_places2@nowhere", "no revision nowhere there"),
        ("hub:owner/repo/missing", "has no folder 'missing'"),
        ("hub:owner/repo/ft_places2/other.bin", "has no such file"),
        ("hub:owner/repo/two", "several checkpoints (a.bin, b.bin)"),
        ("hub:owner/repo/broken", "holds no weights"),
        ("hub:owner/repo", "has no folder '/'"),
    ],
)
def test_what_is_not_there_is_refused(hub: Hub, source: str, words: str) -> None:
    assert words in refusal(source)
    assert not any("/resolve/" in request for request in hub.requests)


def test_a_gated_repository_is_refused(hub: Hub) -> None:
    hub.gated = True
    assert "hf auth login" in refusal("hub:owner/repo/ft_places2")


def blobs(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "hf").rglob("blobs/*"))


def test_a_download_cut_short_is_refused(hub: Hub, tmp_path: Path) -> None:
    name = "ft_places2/diffusion_pytorch_model.bin"
    hub.sent_instead[name] = hub.files[name][:-100]
    assert "download failed" in refusal("hub:owner/repo/ft_places2")
    assert blobs(tmp_path) == []
    hub.sent_instead.clear()
    assert holds("hub:owner/repo/ft_places2", 1)


@pytest.mark.parametrize("links", [True, False])
def test_a_download_with_a_flipped_bit_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", not links, raising=False)
    name = "vae/diffusion_pytorch_model.safetensors"
    whole = hub.files[name]
    hub.sent_instead[name] = whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:]
    assert "damaged: its SHA-256" in refusal("hub:owner/repo/vae")
    if links:  # without the hub, the cache tells what the file should hash to
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert "damaged: its SHA-256" in refusal("hub:owner/repo/vae")


def test_offline_works_from_the_cache(hub: Hub, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = holds("hub:owner/repo/ft_places2", 1)
    assert load_config("hub:owner/repo/vae") == {"scaling_factor": 0.13025}
    assert load_config("hub:owner/repo/ft_places2") is None
    stop(server)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert holds("hub:owner/repo/ft_places2", 1) == origin
    assert holds("hub:owner/repo/ft_places2/diffusion_pytorch_model.bin", 1) == origin
    assert load_config("hub:owner/repo/vae") == {"scaling_factor": 0.13025}
    assert load_config("hub:owner/repo/ft_places2") is None  # known not to exist
    for source in ("hub:owner/repo/pretrained", "hub:owner/repo/ft_places2@v0", "hub:owner/new"):
        message = refusal(source)
        assert "offline mode (HF_HUB_OFFLINE) is on" in message
        assert "does not hold it" in message
    with pytest.raises(CheckpointError, match="offline mode"):
        load_config("hub:owner/repo/pretrained")


def test_a_user_s_second_run_offline(hub: Hub, server: ThreadingHTTPServer) -> None:
    """In a process of its own, where huggingface_hub reads the environment as it does for users."""
    origin = holds("hub:owner/repo/ft_places2", 1)
    stop(server)
    program = (
        "import torch, moebius.checkpoint as c;"
        "expected = {'w': ((4, 3), torch.float32), 'b': ((4,), torch.float32)};"
        "print(c.load_checkpoint('hub:owner/repo/ft_places2', expected).origin)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, origin), done.stderr


def test_without_a_network_the_cache_serves_and_it_is_said(hub: Hub, server: ThreadingHTTPServer) -> None:
    origin = holds("hub:owner/repo/ft_places2", 1)
    stop(server)
    said: list[str] = []
    loaded = load_checkpoint("hub:owner/repo/ft_places2", EXPECTED, progress=said.append)
    assert loaded.origin == f"{origin}; the hub was not reachable, taken from the cache"
    assert any("cannot be reached" in line and "from the cache" in line for line in said)
    message = refusal("hub:owner/repo/pretrained")
    assert f"{hub.address} cannot be reached" in message
    assert "HF_ENDPOINT" in message


def test_a_broken_hub(hub: Hub) -> None:
    holds("hub:owner/repo/ft_places2", 1)
    hub.status = 503
    assert "taken from the cache" in holds("hub:owner/repo/ft_places2", 1)
    assert "answered with HTTP status 503" in refusal("hub:owner/repo/pretrained")
    hub.status = 418
    assert "answered with HTTP status 418" in refusal("hub:owner/repo/ft_places2")


def test_an_endpoint_that_is_no_address(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "not an address")
    assert "not an address cannot be reached" in refusal("hub:owner/repo/ft_places2")


def test_a_cache_that_cannot_be_written(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "hf").write_text("in the way")
    assert "download failed" in refusal("hub:owner/repo/ft_places2")


def test_without_huggingface_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "install moebius-edge[export]" in refusal("hub:owner/repo/ft_places2")
    with pytest.raises(CheckpointError, match="install moebius-edge"):
        load_config("hub:owner/repo/vae")


def test_config(hub: Hub) -> None:
    assert load_config("hub:owner/repo/vae/diffusion_pytorch_model.bin") == {"scaling_factor": 0.13025}
    assert load_config("hub:owner/repo/vae", "other.json") is None
    with pytest.raises(CheckpointError, match="is not JSON"):
        load_config("hub:owner/repo/broken")
    with pytest.raises(CheckpointError, match="no repository"):
        load_config("hub:owner/other")
