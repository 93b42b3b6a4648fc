"""Bundles of a hub: what is fetched, resumed, checked and kept, against a server on this machine; hostile caches."""

from __future__ import annotations

import errno
import os
import pickle  # noqa: TID251 - what worker processes do with a pipeline
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.bundle import hub as hub_module
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.copies import fetched_folder, writable_folder
from moebius_runtime.bundle.hub import blob_of, hub_name
from moebius_runtime.bundle.manifest import read_manifest, write_manifest
from moebius_runtime.errors import InputError, MoebiusError, OutputError
from moebius_runtime.pipeline import InpaintPipeline

pytest.importorskip("huggingface_hub")

NAME = "hub:owner/bundle"
WEIGHTS = "unet/model_int8_cpu.onnx.data"
FP32 = {f"{graph}/model.onnx{end}" for graph in ("unet", "vae_encoder", "vae_decoder") for end in ("", ".data")}


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def picture(pipeline: InpaintPipeline) -> np.ndarray:
    image = Image.linear_gradient("L").resize((128, 128)).convert("RGB")
    mask = Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 80, 80))
    return np.asarray(pipeline(image, mask, steps=2, seed=3))


def refusal(name: str = NAME, **options) -> str:
    with pytest.raises(MoebiusError) as caught:
        InpaintPipeline.from_bundle(name, threads=1, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what is fetched ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "wanted"),
    [
        ("fp32", FP32 | {"unet/model_conditional.onnx"}),
        (
            "int8_cpu",
            {WEIGHTS, "unet/model_int8_cpu.onnx", "unet/model_conditional_int8_cpu.onnx"}
            | {file for file in FP32 if file.startswith("vae")},
        ),
    ],
)
def test_only_the_files_of_the_runtime_and_precision_are_fetched(hub, two_precisions, precision, wanted):
    pipeline = InpaintPipeline.from_bundle(NAME, threads=1, precision=precision)
    assert set(hub.sent) == wanted | {"manifest.json"}
    assert all(hub.sent[file] == (two_precisions / file).stat().st_size for file in wanted)
    fetched = hub.sent.total()
    local = InpaintPipeline.from_bundle(two_precisions, threads=1, precision=precision)
    assert (picture(pipeline) == picture(local)).all()
    assert hub.sent.total() == fetched  # nothing more for a picture
    pickle.loads(pickle.dumps(pipeline))
    assert pipeline.backend.take_notes() == []


def test_the_second_run_is_offline(hub, monkeypatch):
    first = picture(InpaintPipeline.from_bundle(NAME, threads=1))
    asked = len(hub.requests)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipeline = InpaintPipeline.from_bundle(NAME, threads=1)
    assert (picture(pipeline) == first).all()
    assert len(hub.requests) == asked
    assert pipeline.backend.take_notes() == []  # the user asked for it
    assert "does not hold unet/model_int8_cpu.onnx" in refusal(precision="int8_cpu")


def test_a_pinned_commit_is_not_asked_for_again(hub):
    commit = hub.repos["owner/bundle"].refs["main"]
    hub.repos["owner/bundle"].commit({"README.md": b"the bundle is gone from main"})
    InpaintPipeline.from_bundle(f"{NAME}@{commit}", threads=1)
    asked = len(hub.requests)
    InpaintPipeline.from_bundle(f"{NAME}@{commit}", threads=1)
    assert len(hub.requests) == asked


def test_a_branch_that_moved_fetches_what_changed(hub, two_precisions, reseal):
    repo = hub.repos["owner/bundle"]
    repo.refs["v1"] = repo.refs["main"]
    InpaintPipeline.from_bundle(NAME, threads=1)
    hub.sent.clear()
    manifest = read_manifest(two_precisions)
    newer = manifest.model_copy(update={"created": "tomorrow"})
    write_manifest(newer, folder := Path(os.environ["MOEBIUS_CACHE"]))
    repo.commit(repo.commits[repo.refs["main"]] | {"manifest.json": (folder / "manifest.json").read_bytes()})
    assert InpaintPipeline.from_bundle(NAME, threads=1).manifest.created == "tomorrow"
    assert set(hub.sent) == {"manifest.json"}  # the blobs of the rest are there
    assert InpaintPipeline.from_bundle(f"{NAME}@v1", threads=1).manifest == manifest


def test_a_hub_that_fails_is_replaced_by_the_cache_with_a_note(hub):
    InpaintPipeline.from_bundle(NAME, threads=1)
    hub.status = {"/": 503}
    (note,) = [n for n in InpaintPipeline.from_bundle(NAME, threads=1).backend.take_notes() if "cached commit" in n]
    assert "HTTP status 503" in note


# --- cut and damaged downloads ------------------------------------------------------------------------------


@pytest.mark.parametrize(("cuts", "lost"), [([2500], 500), ([5000, 4999, 0], 999)], ids=["once", "three times"])
def test_a_cut_download_is_resumed(hub, two_precisions, monkeypatch, cuts, lost):
    """The library writes whole chunks, of 10 MB; what it had of the last one is fetched twice."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    file = "unet/model.onnx.data"
    hub.cut = {file: list(cuts)}
    pipeline = InpaintPipeline.from_bundle(NAME, threads=1)
    assert hub.sent[file] == (two_precisions / file).stat().st_size + lost
    assert (
        sum(request == f"GET /owner/bundle/resolve/{commit(hub)}/{file}" for request in hub.requests) == len(cuts) + 1
    )
    pipeline.backend.load("unet")


def commit(hub) -> str:
    return hub.repos["owner/bundle"].refs["main"]


def test_a_second_run_after_a_failure_fetches_the_rest(hub):
    hub.status = {"GET /owner/bundle/resolve/" + commit(hub) + "/vae_decoder": 500}
    assert "vae_decoder/model.onnx: " in refusal()
    first = Counter(hub.sent)
    hub.status = {}
    InpaintPipeline.from_bundle(NAME, threads=1)
    assert set(hub.sent - first) == {"vae_decoder/model.onnx", "vae_decoder/model.onnx.data"}


@pytest.mark.parametrize("file", ["vae_encoder/model.onnx", "unet/model.onnx.data"])
@pytest.mark.parametrize("change", ["one byte", "another size"])
def test_a_tampered_file_is_refused(hub, two_precisions, file, change):
    real = (two_precisions / file).read_bytes()
    wrong = real[:-1] + bytes([real[-1] ^ 1]) if change == "one byte" else real + b"more"
    repo = hub.repos["owner/bundle"]
    repo.commit(repo.commits[commit(hub)] | {file: wrong})  # the manifest still names the real one
    assert f"{file} at {commit(hub)[:12]} is not the file that the manifest names" in refusal()
    assert hub.sent[file] == len(wrong)  # fetched once: another try would bring the same
    own = [path.as_posix() for path in Path(os.environ["MOEBIUS_CACHE"]).rglob("*.*")]
    assert not [path for path in own if path.endswith(file)]
    assert "was not used" in refusal()


def test_a_mirror_that_changes_a_file_and_then_does_not(hub, two_precisions):
    file = "unet/model.onnx.data"
    real = (two_precisions / file).read_bytes()
    hub.instead = {file: bytes(len(real))}
    assert "tampered" in refusal()
    hub.instead = {}
    InpaintPipeline.from_bundle(NAME, threads=1).backend.load("unet")  # the wrong one is in the cache: fetched again


def test_a_damaged_blob_is_fetched_again(hub, monkeypatch):
    file = "unet/model.onnx.data"
    bundle = InpaintPipeline.from_bundle(NAME, threads=1).backend.bundle
    blob = blob_of(bundle.remote.snapshot, file)
    content = blob.read_bytes()
    with open(blob, "r+b") as stream:  # in place: the bundle's own file is the same one
        stream.write(b"damage")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert f"{file} is damaged in the cache" in refusal()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    pipeline = InpaintPipeline.from_bundle(NAME, threads=1)
    assert pipeline.backend.bundle.model_file("unet").with_name("model.onnx.data").read_bytes() == content
    assert blob_of(bundle.remote.snapshot, file).read_bytes() == content


def test_a_damaged_copy_is_made_again_from_the_cache(hub, monkeypatch):
    """Where the file system has no hard links, the bundle's own file can be damaged and the cache's not."""
    monkeypatch.setattr("moebius_runtime.files.folders.os.link", _no_links)
    folder = InpaintPipeline.from_bundle(NAME, threads=1).backend.bundle.path
    (folder / "unet/model.onnx.data").write_bytes(b"damage")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    InpaintPipeline.from_bundle(NAME, threads=1).backend.load("unet")


def test_a_manifest_that_is_too_large_is_not_downloaded(hub):
    repo = hub.repos["owner/bundle"]
    repo.commit(repo.commits[commit(hub)] | {"manifest.json": b" " * ((4 << 20) + 1)})
    assert "its manifest.json has 4194305 bytes, expected at most 4194304; nothing was downloaded" in refusal()
    assert not hub.sent


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hub:owner/missing", "has no repository owner/missing, or it is private; check its name"),
        (f"{NAME}@nowhere", "has no revision nowhere there"),
        (f"{NAME}@{'a' * 40}", f"has no revision {'a' * 40}"),
        ("hub:owner/other", "holds no bundle (no manifest.json; it holds README.md)"),
        ("hub:owner", "expected hub:OWNER/REPO or hub:OWNER/REPO@REVISION"),
        ("hub:owner/bundle/folder", "expected hub:OWNER/REPO"),
        ("hub:../bundle", "expected hub:OWNER/REPO"),
        ("hub:owner/bundle@", "expected hub:OWNER/REPO"),
        ("hub:owner/bundle@a/../b", "expected hub:OWNER/REPO"),
        ("hub:", "expected hub:OWNER/REPO"),
    ],
)
def test_the_command_names_what_is_wrong(hub, refused, name, words):
    refused(["a.png", "--mask", "m.png", "--out", "o.png", "--bundle", name], words)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "HTTP status 401: it does not accept the access token; run `hf auth login` again"),
        (403, "HTTP status 403: access to owner/bundle is refused; use a token that may read it"),
        (503, "HTTP status 503 (a fault of the hub, not of this machine), and the cache"),
    ],
)
def test_refused_access(hub, status, words):
    hub.status = {"/": status}
    assert words in refusal()


def test_without_the_extra(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    words = "bundles of a hub need the package huggingface_hub; install moebius-edge[hub], or name a local folder"
    assert refusal() == words


def test_offline_without_a_cache(hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline mode (HF_HUB_OFFLINE) is on, and the cache" in refusal()
    assert hub.requests == []


def test_a_wrong_address(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    assert "HF_ENDPOINT is 'hf-mirror.com'; expected an address with https://" in refusal()


def test_a_file_that_the_repository_lacks(hub):
    repo = hub.repos["owner/bundle"]
    files = repo.commits[commit(hub)]
    repo.commit({name: content for name, content in files.items() if name != "vae_decoder/model.onnx"})
    assert "the repository has no vae_decoder/model.onnx at" in refusal()


@pytest.mark.parametrize("where", ["cache of the hub", "own folder"])
def test_a_full_disk(hub, monkeypatch, where):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "own folder":  # another file system: a copy takes room
        monkeypatch.setattr("moebius_runtime.files.folders.os.link", full)
        monkeypatch.setattr("moebius_runtime.files.folders.shutil.copy2", full)
        assert "set MOEBIUS_CACHE to a writable folder with room" in refusal()
    else:
        monkeypatch.setattr("huggingface_hub.file_download._download_to_tmp_and_move", full)
        assert "No space left on device" in refusal()
        assert "HF_HOME" in refusal()
    assert not list(Path(os.environ["MOEBIUS_CACHE"]).rglob("*.part"))


def test_a_name_is_parsed_whole():
    assert hub_name("hub:me/it@refs/pr/3").revision == "refs/pr/3"
    assert str(hub_name(Path("hub:me/it.v2@v1"))) == "hub:me/it.v2@v1"
    assert hub_name("folder") is None
    assert hub_name("./x/hub:me/it") is None


# --- folders for other processes and for changes --------------------------------------------------------------


def test_the_folder_for_other_processes(hub, two_precisions):
    assert fetched_folder(two_precisions, ["fp32"]) == two_precisions
    assert fetched_folder("no/such/folder", ["fp32"]) == Path("no/such/folder")  # its own error comes later
    folder = fetched_folder(NAME, ["int8_cpu"])
    assert WEIGHTS in hub.sent
    assert "unet/model.onnx.data" not in hub.sent
    hub.status = {"/": 500}
    assert Bundle.open(folder).model_file("unet", "int8_cpu").is_file()


def test_a_copy_to_change(hub, two_precisions, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert writable_folder(two_precisions) == (two_precisions, False)
    folder, copied = writable_folder(NAME)
    assert (folder, copied) == (Path("bundle"), True)
    assert content_of(folder) == content_of(two_precisions)
    (folder / "unet/model.onnx").write_bytes(b"changed")
    InpaintPipeline.from_bundle(NAME, threads=1).backend.load("unet")  # the cache holds what it held
    with pytest.raises(InputError, match=r"hub:owner/bundle is copied to the folder bundle .* name that folder"):
        writable_folder(NAME)


def test_a_cache_that_cannot_be_written(hub, monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "file" / "x"))
    with pytest.raises(OutputError, match="set MOEBIUS_CACHE"):
        Bundle.open(NAME)


def _no_links(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "no hard links here")


def test_a_file_system_without_hard_links(hub, monkeypatch):
    monkeypatch.setattr("moebius_runtime.files.folders.os.link", _no_links)
    pipeline = InpaintPipeline.from_bundle(NAME, threads=1)
    pipeline.backend.load("unet")
    assert hub_module.blob_of(pipeline.backend.bundle.remote.snapshot, "unet/model.onnx").stat().st_nlink == 1


def test_a_cache_without_links(hub, two_precisions, monkeypatch):
    """As on Windows without the right to make them: the snapshot holds the files themselves."""
    monkeypatch.setattr("huggingface_hub.file_download.are_symlinks_supported", lambda *_: False)
    bundle = InpaintPipeline.from_bundle(NAME, threads=1).backend.bundle
    assert not any(path.is_symlink() for path in bundle.remote.snapshot.rglob("*"))
    assert InpaintPipeline.from_bundle(bundle.remote.snapshot, threads=1).backend.bundle.remote is None
    file = "unet/model.onnx.data"
    (bundle.remote.snapshot / file).write_bytes(b"damage")
    (bundle.path / file).unlink(missing_ok=True)
    InpaintPipeline.from_bundle(NAME, threads=1).backend.load("unet")
    assert (bundle.remote.snapshot / file).read_bytes() == (two_precisions / file).read_bytes()
