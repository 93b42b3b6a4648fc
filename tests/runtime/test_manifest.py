"""The manifest: written, read back, and refused in one line whenever it is not exactly what was written."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from moebius_runtime.bundle.manifest import MAX_MANIFEST_BYTES, check_file, read_manifest, write_manifest
from moebius_runtime.errors import BundleError

NAME = "manifest.json"


def refusal(folder: Path, *words: str) -> str:
    """The message of the refusal, one line that holds the words and names the file."""
    with pytest.raises(BundleError) as caught:
        read_manifest(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    assert str(folder / NAME) in message
    for word in words:
        assert word in message
    return message


@pytest.fixture
def text(toy_copy) -> str:
    return (toy_copy.path / NAME).read_text()


def test_round_trip(toy_bundle, tmp_path):
    manifest = read_manifest(toy_bundle.path)
    assert manifest.geometry.image_size == 128
    assert manifest.schedule.build().num_train_timesteps == 1000
    assert not manifest.stand_in
    write_manifest(manifest, tmp_path)
    assert (tmp_path / NAME).read_bytes() == (toy_bundle.path / NAME).read_bytes()
    assert read_manifest(tmp_path) == manifest


def test_an_edit_signed_as_documented_is_read(toy_copy, edit_manifest):
    edit_manifest(toy_copy.path, lambda content: content["defaults"].update(guidance_scale=2))
    assert read_manifest(toy_copy.path).defaults.guidance_scale == 2


def test_rewrites_state_their_cost_since_this_version(toy_copy, edit_manifest):
    old = {"graph": "unet", "name": "r", "count": 1}
    new = old | {"macs_before": 3 << 40, "macs_after": 1 << 40}
    edit_manifest(toy_copy.path, lambda content: content.update(rewrites=[old, new]))
    first, second = read_manifest(toy_copy.path).rewrites
    assert (first.macs_before, first.macs_after) == (None, None)
    assert (second.macs_before, second.macs_after) == (3 << 40, 1 << 40)


def test_any_edit_breaks_the_hash(toy_copy, edit_manifest):
    edit_manifest(toy_copy.path, lambda content: content["defaults"].update(guidance_scale=2.25), sign=False)
    refusal(toy_copy.path, "does not match its own hash")


@pytest.mark.parametrize("stated", [None, 7, "", "0" * 64, ["x"]])
def test_a_missing_or_wrong_hash(toy_copy, text, stated):
    content = json.loads(text)
    content["manifest_sha256"] = stated
    (toy_copy.path / NAME).write_text(json.dumps(content))
    refusal(toy_copy.path, "hash")
    del content["manifest_sha256"]
    (toy_copy.path / NAME).write_text(json.dumps(content))
    refusal(toy_copy.path, "hash")


@pytest.mark.parametrize("version", [0, 2, 1.0, "1", True, None, [1], {"a": 1}, "x" * 999, 10**30])
def test_an_unknown_version_is_named_before_anything_else(toy_copy, version):
    (toy_copy.path / NAME).write_text(json.dumps({"schema_version": version, "new": {}}))
    refusal(toy_copy.path, "schema version", "reads version 1")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../outside",
        "unet/../../outside",
        "unet\\..\\..\\outside",
        "C:/windows",
        "c:model.onnx",
        "./unet/model.onnx",
        "unet//model.onnx",
        "unet/",
        "",
        ".hidden",
        "unet/.hidden",
        "~/model",
        "-rf",
        "unet/model.onnx\n",
        "unet\n/model.onnx",
        "unet/model\x00.onnx",
        "unet/mod\u00e9l.onnx",
        "a/" * 200 + "b",
        "file:///etc/passwd",
    ],
)
def test_paths_that_could_leave_the_bundle(toy_copy, edit_manifest, path):
    def name(content):
        content["files"][path] = next(iter(content["files"].values()))

    edit_manifest(toy_copy.path, name)
    refusal(toy_copy.path, "not a plain relative path inside the bundle")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(extra=1), ["extra"]),
        (lambda c: c["geometry"].update(extra=1), ["geometry.extra"]),
        (lambda c: c.pop("schedule"), ["schedule", "required"]),
        (lambda c: c["geometry"].update(image_size="128"), ["geometry.image_size"]),
        (lambda c: c["geometry"].update(image_size=128.0), ["geometry.image_size"]),
        (lambda c: c["geometry"].update(image_size=True), ["geometry.image_size"]),
        (lambda c: c["geometry"].update(image_size=1 << 40), ["geometry.image_size"]),
        (lambda c: c["geometry"].update(image_size=-128), ["geometry.image_size"]),
        (lambda c: c["geometry"].update(image_size=130), ["no multiple of latent_size"]),
        (lambda c: c["geometry"].update(image_size=256), ["image float32"]),
        (lambda c: c["geometry"].update(latent_channels=5), ["sample float32"]),
        (lambda c: c["geometry"].update(scaling_factor=0), ["scaling_factor"]),
        (lambda c: c["geometry"].update(scaling_factor=10**400), ["scaling_factor"]),
        (lambda c: c["model"].update(parameters=2**70), ["model.parameters"]),
        (lambda c: c["schedule"].update(beta_start=0.5), ["beta_start"]),
        (lambda c: c["schedule"].update(beta_start=0.9, beta_end=0.99), ["usable noise level"]),
        (lambda c: c["schedule"].update(num_train_timesteps=10**9), ["num_train_timesteps"]),
        (lambda c: c["schedule"].update(beta_schedule="linear"), ["beta_schedule"]),
        (lambda c: c["schedule"].update(prediction_type="sample"), ["prediction_type"]),
        (lambda c: c["defaults"].update(strength=0), ["strength"]),
        (lambda c: c["defaults"].update(strength=1.01), ["strength"]),
        (lambda c: c["defaults"].update(num_inference_steps=0), ["num_inference_steps"]),
        (lambda c: c["defaults"].update(guidance_scale=-1), ["guidance_scale"]),
        (lambda c: c["graphs"].pop("vae_decoder"), ["no graph vae_decoder"]),
        (lambda c: c["graphs"].update(other=c["graphs"]["unet"]), ["graphs.other"]),
        (lambda c: c["graphs"]["unet"]["files"].update(fp64=c["graphs"]["unet"]["files"]["fp32"]), ["fp64"]),
        (lambda c: c["graphs"]["unet"].update(files={}), ["graphs.unet.files"]),
        (lambda c: c["graphs"]["unet"]["files"]["fp32"].update(model="unet/model.ort"), ["fp32.model"]),
        (lambda c: c["graphs"]["unet"]["files"]["fp32"].update(model="other.onnx"), ["not in one folder"]),
        (lambda c: c["graphs"]["unet"]["files"]["fp32"].update(weights="unet/w"), ["not among the files"]),
        (lambda c: c["files"].pop("unet/model.onnx"), ["not among the files"]),
        (lambda c: c["files"]["unet/model.onnx"].update(size=-1), ["size"]),
        (lambda c: c["files"]["unet/model.onnx"].update(sha256="F" * 64), ["sha256"]),
        (lambda c: c["files"]["unet/model.onnx"].update(sha256="0" * 63), ["sha256"]),
        (lambda c: c["graphs"]["unet"]["inputs"].reverse(), ["graph unet has guidance_scale"]),
        (lambda c: c["graphs"]["unet"]["inputs"].pop(), ["graph unet has"]),
        (lambda c: c["graphs"]["unet"]["inputs"].clear(), ["graphs.unet.inputs"]),
        (lambda c: c["graphs"]["unet"]["inputs"][1].update(dtype="float32"), ["timestep float32"]),
        (lambda c: c["graphs"]["unet"]["inputs"][1].update(dtype="object"), ["dtype"]),
        (lambda c: c["graphs"]["unet"]["inputs"][0].update(shape=[]), ["graph unet has"]),
        (lambda c: c["graphs"]["unet"]["inputs"][0].update(shape=[1, 9, 16, 0]), ["shape"]),
        (lambda c: c["graphs"]["unet"]["outputs"][0].update(shape=[2, 4, 16, 16]), ["graph unet has"]),
        (lambda c: c["graphs"]["vae_decoder"]["outputs"][0].update(name="latent"), ["graph vae_decoder has"]),
        (lambda c: c.update(created="x" * 1001), ["created"]),
        (lambda c: c.update(created="\ud800"), ["created"]),
        (lambda c: c.update({"a\nb\x1b[31m": 1}), ["a\\nb\\x1b[31m"]),
    ],
)
def test_what_the_schema_refuses_even_with_the_right_hash(toy_copy, edit_manifest, change, words):
    edit_manifest(toy_copy.path, change)
    refusal(toy_copy.path, *words)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 5000])
def test_numbers_that_json_should_not_have(toy_copy, text, number):
    changed, count = re.subn(r'"scaling_factor": [0-9.]+', f'"scaling_factor": {number}', text)
    assert count == 1
    (toy_copy.path / NAME).write_text(changed)
    refusal(toy_copy.path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 100,
        b"[]",
        b"null",
        b'"text"',
        b"{",
        b"{}",
        b'{"schema_version": 1}',
        b"not JSON",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"schema_version": 1, "a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"schema_version": 1, "a": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        b" " * (MAX_MANIFEST_BYTES + 1),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_what_is_no_manifest_at_all(tmp_path, data):
    (tmp_path / NAME).write_bytes(data)
    refusal(tmp_path)


def test_every_truncation_is_refused(toy_copy, text):
    end = len(text.rstrip())  # the last newline may go
    for length in [*range(0, end - 20, 97), *range(end - 20, end)]:
        (toy_copy.path / NAME).write_text(text[:length])
        refusal(toy_copy.path)


def test_every_flipped_bit_is_refused_or_changes_nothing(toy_copy, text):
    original, data = read_manifest(toy_copy.path), text.encode()
    unchanged = 0
    for place in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        (toy_copy.path / NAME).write_bytes(damaged)
        try:
            manifest = read_manifest(toy_copy.path)
        except BundleError:
            continue
        assert manifest == original  # one kind of white space became another
        unchanged += 1
    assert unchanged < 0.01 * len(data) / 7


def test_places_without_a_manifest(tmp_path):
    refusal(tmp_path, "No such file", "moebius-export onnx")
    refusal(tmp_path / "nowhere", "No such file")
    (tmp_path / "file").touch()
    refusal(tmp_path / "file", "Not a directory")
    (tmp_path / NAME).mkdir()
    refusal(tmp_path, "is a folder")


def test_odd_names_of_folders(tmp_path):
    for folder in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        refusal(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / NAME)  # noqa: TID251
    refusal(tmp_path, "not a plain file")


# --- files that the manifest lists --------------------------------------------------------------------------


def test_a_sound_file_passes(toy_bundle):
    manifest = read_manifest(toy_bundle.path)
    for name in manifest.files:
        assert check_file(toy_bundle.path, manifest, name) == toy_bundle.path / name


@pytest.mark.parametrize("target", ["outside", "circle", "nothing"])
def test_links_that_leave_the_bundle_or_lead_nowhere(toy_copy, target):
    manifest, path = read_manifest(toy_copy.path), toy_copy.path / "unet/model.onnx"
    outside = toy_copy.path.parent / "outside.onnx"
    path.rename(outside)  # the very bytes that the manifest expects
    path.symlink_to({"outside": outside, "circle": path, "nothing": "nowhere"}[target])
    with pytest.raises(BundleError) as caught:
        check_file(toy_copy.path, manifest, "unet/model.onnx")
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_linked_folder_that_leaves_the_bundle(toy_copy):
    manifest = read_manifest(toy_copy.path)
    (toy_copy.path / "unet").rename(toy_copy.path.parent / "elsewhere")
    (toy_copy.path / "unet").symlink_to(toy_copy.path.parent / "elsewhere")
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        check_file(toy_copy.path, manifest, "unet/model.onnx")


def test_a_link_to_the_bundle_itself_is_fine(toy_bundle, tmp_path):
    (tmp_path / "link").symlink_to(toy_bundle.path)
    manifest = read_manifest(tmp_path / "link")
    assert check_file(tmp_path / "link", manifest, "unet/model.onnx").is_file()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_listed_pipe_is_not_waited_for(toy_copy, edit_manifest):
    path = toy_copy.path / "unet/model.onnx"
    path.unlink()
    os.mkfifo(path)  # noqa: TID251
    edit_manifest(toy_copy.path, lambda content: content["files"]["unet/model.onnx"].update(size=0))
    with pytest.raises(BundleError, match="not a plain file"):
        check_file(toy_copy.path, read_manifest(toy_copy.path), "unet/model.onnx")
