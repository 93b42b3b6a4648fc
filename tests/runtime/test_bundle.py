"""Bundles on disk: damaged and hostile ones are refused before anything of them is used."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime.backends import create_backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.errors import BundleError
from moebius_runtime.files import hashes
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline

LATENT = np.zeros((1, 4, 16, 16), np.float32)
DECODER = "vae_decoder/model.onnx"


@pytest.fixture
def no_session(monkeypatch):
    """From here on, ONNX Runtime must not be given anything."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def refuse(*_args, **_more):
        pytest.fail("a file was given to ONNX Runtime")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)


def decode(folder: Path) -> np.ndarray:
    return create_backend(Bundle.open(folder), "ort-cpu", threads=1).run("vae_decoder", {"latent": LATENT})


def refusal(folder: Path, *words: str) -> str:
    with pytest.raises(BundleError) as caught:
        decode(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_first(path: Path) -> None:
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def flip_last(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 128]))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def put_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("damage", [remove, truncate, extend, flip_first, flip_last, empty, put_a_folder])
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_damaged_file_is_never_used(toy_copy, damage, name):
    path = toy_copy.path / "vae_decoder" / name
    damage(path)
    refusal(toy_copy.path, str(path))


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("name", ["unet/model.onnx", "unet/model.onnx.data", "vae_encoder/model.onnx", DECODER])
def test_check_finds_damage_before_any_picture_is_opened(toy_copy, name):
    flip_last(toy_copy.path / name)
    pipeline = InpaintPipeline.from_bundle(toy_copy.path, threads=1)
    with pytest.raises(BundleError, match=re.escape(name)):
        pipeline.check(InpaintOptions())


def test_check_asks_only_for_the_graphs_that_will_run(toy_copy):
    flip_last(toy_copy.path / "unet/model.onnx")
    InpaintPipeline.from_bundle(toy_copy.path, threads=1).check(InpaintOptions(guidance_scale=1))


def test_a_file_is_hashed_once_until_it_changes(toy_copy, monkeypatch):
    hashed = []
    real = hashes.sha256_file
    monkeypatch.setattr(hashes, "sha256_file", lambda path: hashed.append(path.name) or real(path))
    bundle = Bundle.open(toy_copy.path)
    for _ in range(3):
        bundle.model_file("unet")
        bundle.model_file("unet_conditional")
    assert sorted(hashed) == ["model.onnx", "model.onnx.data", "model_conditional.onnx"]
    flip_last(toy_copy.path / "unet/model.onnx.data")
    with pytest.raises(BundleError, match="SHA-256"):
        bundle.model_file("unet")
    (toy_copy.path / "unet/model.onnx.data").unlink()
    with pytest.raises(BundleError, match="No such file"):
        bundle.model_file("unet")


def test_what_the_bundle_does_not_hold(toy_bundle, make_toy, tmp_path):
    bundle = Bundle.open(toy_bundle.path)
    with pytest.raises(BundleError, match=r"has no fp16 file, only fp32.*--precision fp16"):
        bundle.model_file("unet", "fp16")
    graphs = {name: info for name, info in bundle.manifest.graphs.items() if name != "unet_conditional"}
    toy = make_toy(tmp_path / "less", graphs=graphs)
    with pytest.raises(BundleError, match="no graph 'unet_conditional'"):
        Bundle.open(toy.path).graph("unet_conditional")


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(BundleError, match="moebius-export onnx"):
        Bundle.open(tmp_path)


# --- bundles made to deceive: their hashes are right --------------------------------------------------------


def refer(model: Path, location: str) -> None:
    """Points the decoder's weights at `location`; with the same offsets."""
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(str(model), load_external_data=False)
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.external_data]
    (entry,) = [entry for entry in tensor.external_data if entry.key == "location"]
    entry.value = location
    model.write_bytes(proto.SerializeToString())


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize(
    "location",
    [
        "../../secret",
        "../unet/model.onnx.data",
        "ABSOLUTE",
        "/proc/self/environ",
        "other.data",
        "link.data",
        "folder/secret",
        "./model.onnx.data",
        "model.onnx",
        "",
        "*/_ORT_MEM_ADDR_/*",  # how ONNX Runtime marks an address of its own memory
        "model.onnx.data\0",
    ],
)
def test_external_data_anywhere_but_in_the_weights_file(toy_copy, reseal, location):
    root = toy_copy.path
    data = root / "vae_decoder/model.onnx.data"
    secret = root.parent / "secret"
    shutil.copy(data, secret)  # it would be read without complaint
    shutil.copy(data, data.with_name("other.data"))
    data.with_name("link.data").symlink_to(secret)
    data.with_name("folder").symlink_to(root.parent)
    refer(root / DECODER, str(secret) if location == "ABSOLUTE" else location)
    data.with_name("link.data").rename(root.parent / "later")
    data.with_name("folder").rename(root.parent / "later folder")
    reseal(root)
    (root.parent / "later").rename(data.with_name("link.data"))
    (root.parent / "later folder").rename(data.with_name("folder"))
    refusal(root, DECODER, "a graph may only read its own weights file")


@pytest.mark.usefixtures("no_session")
@pytest.mark.parametrize("data", [b"", b"\x08", b"hello, this is text", b"\x3a\xff\xff\xff\x7f"])
def test_a_file_that_is_not_onnx(toy_copy, reseal, data):
    (toy_copy.path / DECODER).write_bytes(data)
    reseal(toy_copy.path)
    refusal(toy_copy.path, DECODER, "not an ONNX file")


def test_a_graph_that_onnx_runtime_cannot_load(toy_copy, reseal):
    onnx = pytest.importorskip("onnx")
    proto = onnx.load(str(toy_copy.path / DECODER), load_external_data=False)
    proto.graph.node[0].op_type = "NoSuchOperator"
    (toy_copy.path / DECODER).write_bytes(proto.SerializeToString())
    reseal(toy_copy.path)
    refusal(toy_copy.path, DECODER, "NoSuchOperator", "cannot load")


def test_weights_beyond_the_end_of_their_file(toy_copy, reseal):
    truncate(toy_copy.path / "vae_decoder/model.onnx.data")
    reseal(toy_copy.path)
    refusal(toy_copy.path, DECODER, "cannot load")


def test_another_graph_under_the_name(toy_copy, reseal):
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copy(toy_copy.path / "vae_encoder" / name, toy_copy.path / "vae_decoder" / name)
    reseal(toy_copy.path)
    refusal(toy_copy.path, DECODER, "the file has image tensor(float)", "the manifest has latent tensor(float)")


def test_a_graph_that_fails_as_it_runs(make_toy, tmp_path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node
    shape = onnx.helper.make_tensor("s", onnx.TensorProto.INT64, [2], [7, 7])
    bad = [
        node("Constant", [], ["shape"], value=shape),
        node("Identity", ["shape"], ["hidden"]),
        node("Reshape", ["latent", "hidden"], ["x"]),
        node("ConvTranspose", ["latent", "decoder", "decoder_bias"], ["y"], strides=[8, 8]),
        node("ReduceSum", ["x"], ["z"], keepdims=0),
        node("Add", ["y", "z"], ["image"]),
    ]
    toy = make_toy(tmp_path / "bundle", nodes={"vae_decoder": bad})
    refusal(toy.path, "cannot run a graph", str(toy.path), "Reshape")


def test_an_output_of_another_size_than_stated(make_toy, tmp_path):
    onnx = pytest.importorskip("onnx")
    node = onnx.helper.make_node
    bad = [
        node("ConvTranspose", ["latent", "decoder", "decoder_bias"], ["y"], strides=[8, 8]),
        node("Concat", ["y", "y"], ["image"], axis=2),
    ]
    toy = make_toy(tmp_path / "bundle", nodes={"vae_decoder": bad}, batch="b")
    refusal(toy.path, "expected float32 ['b', 3, 128, 128], got float32 [1, 3, 256, 128]")
