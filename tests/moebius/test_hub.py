"""Weights from a hub, against a server on this machine that answers as a hub does."""

from __future__ import annotations

import os
import subprocess
import sys
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, EXPECTED, OLD_COMMIT, Hub, pickled, weights  # loaded by conftest.py

from moebius.weights.checkpoint import CheckpointError, load_checkpoint, load_config

constants = pytest.importorskip("huggingface_hub.constants")


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
        assert "is not what the hub published" in refusal("hub:owner/repo/vae")


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


@pytest.mark.slow
def test_a_user_s_second_run_offline(hub: Hub, server: ThreadingHTTPServer) -> None:
    """In a process of its own, where huggingface_hub reads the environment as it does for users."""
    origin = holds("hub:owner/repo/ft_places2", 1)
    stop(server)
    program = (
        "import torch, moebius.weights.checkpoint as c;"
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
