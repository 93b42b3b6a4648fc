"""Links in the cache of huggingface_hub: those that it makes are followed, hostile ones are not."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.errors import BundleError, MoebiusError
from moebius_runtime.pipeline import InpaintPipeline

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links need a right that users there lack")

NAME = "hub:owner/bundle"


def refusal(name: str, **options) -> str:
    with pytest.raises(MoebiusError) as caught:
        InpaintPipeline.from_bundle(name, threads=1, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def snapshot(hub) -> Path:
    """The snapshot folder of a fetched bundle; its own folder is removed."""
    bundle = InpaintPipeline.from_bundle(NAME, threads=1).backend.bundle
    shutil.rmtree(os.environ["MOEBIUS_CACHE"])
    return bundle.remote.snapshot


def test_a_snapshot_named_by_its_path_runs(snapshot, hub):
    asked = len(hub.requests)
    assert (snapshot / "manifest.json").is_symlink()
    pipeline = InpaintPipeline.from_bundle(snapshot, threads=1)
    pipeline.backend.load("unet")
    assert pipeline.backend.bundle.name == str(snapshot)
    assert not any(path.is_symlink() for path in pipeline.backend.bundle.path.rglob("*"))
    assert len(hub.requests) == asked
    assert "unet/model_int8_cpu.onnx" in refusal(str(snapshot), precision="int8_cpu")  # it is not there, nor fetched


def test_blobs_in_the_cache_s_shared_store(snapshot):
    """As huggingface_hub 2 keeps what comes from Xet storage: the blob links on."""
    cache = snapshot.parents[2]
    for blob in (snapshot.parents[1] / "blobs").iterdir():
        store = cache / "blobs" / blob.name[:2] / blob.name
        store.parent.mkdir(parents=True, exist_ok=True)
        blob.rename(store)
        blob.symlink_to(os.path.relpath(store, blob.parent))
    for graph in ("unet", "vae_encoder", "vae_decoder"):
        InpaintPipeline.from_bundle(snapshot, threads=1).backend.load(graph)


def _outside(snapshot: Path, link: Path, secret: Path) -> None:
    link.unlink()
    link.symlink_to(secret)


def _through_a_blob(snapshot: Path, link: Path, secret: Path) -> None:
    blob = link.parent / os.readlink(link)
    blob.unlink()
    blob.symlink_to(secret)


def _through_a_folder(snapshot: Path, link: Path, secret: Path) -> None:
    shutil.rmtree(link.parent)
    link.parent.symlink_to(secret.parent)
    (secret.parent / link.name).write_bytes(secret.read_bytes())


def _blobs_elsewhere(snapshot: Path, link: Path, secret: Path) -> None:
    blobs = snapshot.parents[1] / "blobs"
    blobs.rename(secret.parent / "moved")
    blobs.symlink_to(secret.parent / "moved")


def _no_hash(snapshot: Path, link: Path, secret: Path) -> None:
    shutil.copy(secret, snapshot.parents[1] / "blobs" / "id_rsa")
    _outside(snapshot, link, snapshot.parents[1] / "blobs" / "id_rsa")


def _other_repository(snapshot: Path, link: Path, secret: Path) -> None:
    other = snapshot.parents[2] / "models--owner--private" / "blobs" / ("a" * 64)
    other.parent.mkdir(parents=True)
    shutil.copy(secret, other)
    _outside(snapshot, link, other)


def _wrong_prefix(snapshot: Path, link: Path, secret: Path) -> None:
    store = snapshot.parents[2] / "blobs" / "bb" / ("a" * 64)
    store.parent.mkdir(parents=True)
    shutil.copy(secret, store)
    _outside(snapshot, link, store)


def _loop(snapshot: Path, link: Path, secret: Path) -> None:
    link.unlink()
    link.symlink_to(link.name)


def _pipe(snapshot: Path, link: Path, secret: Path) -> None:
    link.unlink()
    os.mkfifo(snapshot.parents[1] / "blobs" / ("c" * 64))  # noqa: TID251
    link.symlink_to(snapshot.parents[1] / "blobs" / ("c" * 64))


@pytest.mark.parametrize(
    "attack",
    [
        *(_outside, _through_a_blob, _through_a_folder, _blobs_elsewhere, _no_hash, _other_repository),
        *(_wrong_prefix, _loop, _pipe),
    ],
)
@pytest.mark.parametrize("by", ["path", "name"])
def test_hostile_links_are_not_followed(snapshot, tmp_path, attack, by, monkeypatch):
    """Even if what they lead to has the size and hash of the manifest, which only the author of a bundle can know."""
    file = "vae_encoder/model.onnx.data"
    secret = tmp_path / "home" / "secret"
    secret.parent.mkdir()
    shutil.copy(snapshot / file, secret)
    attack(snapshot, snapshot / file, secret)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = refusal(str(snapshot) if by == "path" else NAME)
    assert any(
        part in words
        for part in ("outside of the cache's blobs; nothing was read", "expected a file of the hub's cache", "not hold")
    ), words
    assert not list(Path(os.environ["MOEBIUS_CACHE"]).rglob("vae_encoder/model.onnx.data"))


def test_a_folder_that_only_looks_like_a_snapshot_keeps_the_strict_rule(toy_bundle, tmp_path):
    fake = tmp_path / "snapshots" / ("a" * 40)
    shutil.copytree(toy_bundle.path, fake, copy_function=lambda source, target: os.symlink(source, target))
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        Bundle.open(fake).model_file("unet")


def test_a_hostile_snapshot_cannot_replace_another_cache_s_bundle(snapshot, tmp_path):
    """Its owner, name and commit may be those of a bundle that the user trusts."""
    real = Bundle.open(snapshot)
    forged = tmp_path / "archive" / snapshot.relative_to(snapshot.parents[2])
    shutil.copytree(snapshot.parents[1], forged.parents[1], symlinks=True)
    assert Bundle.open(forged).path != real.path
