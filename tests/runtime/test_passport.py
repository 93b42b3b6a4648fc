"""Passports: written and read, and the refusals with their text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moebius_runtime import passport as passports
from moebius_runtime.errors import EngineError
from moebius_runtime.manifest import FileInfo, GraphFile, read_manifest, sha256_file, write_manifest
from moebius_runtime.passport import Device, EngineInfo, Passport, Range

VERSION = "10.3.0"
ORIN = Device("Orin", 87, "540.4.0", "12.6", 8 << 30, 5 << 30)
REBUILD = "moebius-export trt BUNDLE --fp32 --backend tensorrt"


@pytest.fixture
def engines(toy_copy) -> Path:
    """A folder with one engine of the toy bundle's decoder, and a precision plan in the bundle."""
    bundle = toy_copy.path
    (bundle / "vae_decoder" / "plan.json").write_text("{}")
    seal(bundle, plan="vae_decoder/plan.json")
    return stamped(bundle)


def seal(bundle, plan):
    manifest = read_manifest(bundle)
    paths = [*manifest.files] + [name for name in [plan] if name not in manifest.files]
    files = {name: FileInfo(size=(bundle / name).stat().st_size, sha256=sha256_file(bundle / name)) for name in paths}
    decoder = manifest.graphs["vae_decoder"]
    file = decoder.files["fp32"]
    graph = decoder.model_copy(update={"files": {"fp32": GraphFile(model=file.model, weights=file.weights, plan=plan)}})
    graphs = {**manifest.graphs, "vae_decoder": graph}
    write_manifest(manifest.model_copy(update={"files": files, "graphs": graphs}), bundle)


def stamped(bundle, **changes) -> Path:
    manifest = read_manifest(bundle)
    file = manifest.graphs["vae_decoder"].files["fp32"]
    folder = bundle / "engines" / passports.folder_name("Orin", "tensorrt", VERSION, "fp32")
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / passports.engine_file("vae_decoder")
    plan.write_bytes(b"an engine")
    engine = EngineInfo(
        size=9,
        sha256=sha256_file(plan),
        onnx_sha256=manifest.files[file.model].sha256,
        weights_sha256=manifest.files[file.weights].sha256,
        plan_sha256=manifest.files[file.plan].sha256,
        shapes={"latent": Range(min=[1, 4], opt=[1, 4], max=[1, 4])},
        device_memory=None,
        build_seconds=1.5,
    )
    fields = {
        "schema_version": 1,
        "created": "today",
        "backend": "tensorrt",
        "backend_version": VERSION,
        "precision": "fp32",
        "gpu": "Orin",
        "sm": [87],
        "driver": "540.4.0",
        "cuda": "12.6",
        "flags": {},
        "engines": {"vae_decoder": engine},
    }
    passports.write_passport(Passport(**(fields | changes)), folder)
    return folder


def load(folder, version=VERSION, device=ORIN) -> bytes:
    """What a runtime does before it deserialises an engine."""
    passport = passports.read_passport(folder)
    passports.check_bundle(folder, passport, read_manifest(folder.parent.parent))
    passports.check_device(folder, passport, version, device)
    return bytes(passports.checked_engine(folder, passport, "vae_decoder").view)


def notes(folder, version=VERSION, device=ORIN) -> list[str]:
    return passports.check_device(folder, passports.read_passport(folder), version, device)


def refusal(folder, **more) -> str:
    with pytest.raises(EngineError) as raised:
        load(folder, **more)
    return str(raised.value)


def test_the_right_engine_loads(engines):
    assert load(engines) == b"an engine"
    assert notes(engines) == []
    assert engines.name == "orin-tensorrt10.3.0-fp32"
    assert passports.engine_folders(engines.parent.parent, "tensorrt") == [engines]
    assert passports.engine_folders(engines.parent.parent, "tensorrt-rtx") == []


# The refusals, and what is a note


def test_another_onnx_file(engines):
    bundle = engines.parent.parent
    before = read_manifest(bundle).files["vae_decoder/model.onnx"].sha256
    with open(bundle / "vae_decoder" / "model.onnx", "ab") as stream:
        stream.write(b"\x52\x00")  # an empty field that ONNX does not know
    seal(bundle, plan="vae_decoder/plan.json")
    now = read_manifest(bundle).files["vae_decoder/model.onnx"].sha256
    assert refusal(engines) == (
        f"{engines}: vae_decoder was built from another ONNX file (SHA-256 {before[:12]}...) than this bundle's "
        f"(SHA-256 {now[:12]}...). Build it again: {REBUILD}"
    )


def test_another_precision_plan(engines):
    bundle = engines.parent.parent
    before = read_manifest(bundle).files["vae_decoder/plan.json"].sha256
    (bundle / "vae_decoder" / "plan.json").write_text('{"edited": true}')
    seal(bundle, plan="vae_decoder/plan.json")
    now = read_manifest(bundle).files["vae_decoder/plan.json"].sha256
    assert refusal(engines) == (
        f"{engines}: vae_decoder was built from another precision plan (SHA-256 {before[:12]}...) than this bundle's "
        f"(SHA-256 {now[:12]}...). Build it again: {REBUILD}"
    )


def test_an_edited_passport(engines):
    path = engines / "passport.json"
    content = json.loads(path.read_text())
    content["driver"] = "550.0"
    path.write_text(json.dumps(content))
    assert refusal(engines) == (
        f"{path}: its content does not match its own hash, so it was changed or damaged. Build the engines again: "
        "moebius-export trt BUNDLE --fp16"
    )


def test_another_gpu(engines):
    other = Device("RTX 4090", 89, "540.4.0", "12.6", 24 << 30, 20 << 30)
    assert refusal(engines, device=other) == (
        f"{engines}: built for SM 87, RTX 4090 is SM 89. Build it for this device: "
        "moebius-export trt BUNDLE --fp32 --backend tensorrt"
    )


def test_another_version(engines):
    assert refusal(engines, version="10.4.0") == (
        f"{engines}: built by tensorrt 10.3.0, here is 10.4.0. Build it again: {REBUILD}"
    )


def test_another_driver(engines):
    other = Device("Orin", 87, "550.1", "12.6", 8 << 30, 5 << 30)
    assert notes(engines, device=other) == [
        f"{engines}: built with driver 540.4.0, here is 550.1. tensorrt decides whether it loads; it may run slower "
        f"than one that is built here: {REBUILD}"
    ]


def test_another_gpu_of_the_same_compute_capability(engines):
    other = Device("Orin NX", 87, "550.1", "12.6", 8 << 30, 5 << 30)
    (note,) = notes(engines, device=other)
    assert "built with driver 540.4.0, here is 550.1 and with Orin, here is Orin NX of the same SM 87. tensorrt" in note
    folder = stamped(engines.parent.parent, backend="tensorrt-rtx")  # compiles its kernels for the GPU at hand
    (note,) = notes(folder, device=other)
    assert "Orin NX" not in note


# What else is refused


def test_another_engine_under_the_same_name(engines):
    (engines / "vae_decoder.plan").write_bytes(b"an Engine")
    assert "so it was exchanged or damaged; it was not loaded" in refusal(engines)


def test_a_link_out_of_the_folder(engines, tmp_path):
    (tmp_path / "elsewhere").write_bytes(b"an engine")
    (engines / "vae_decoder.plan").unlink()
    (engines / "vae_decoder.plan").symlink_to(tmp_path / "elsewhere")
    assert "is a link that leaves its folder" in refusal(engines)


def test_no_engine_file_and_no_such_graph(engines):
    (engines / "vae_decoder.plan").unlink()
    assert "No such file" in refusal(engines)
    with pytest.raises(EngineError, match="holds no engine of unet, only vae_decoder"):
        passports.checked_engine(engines, passports.read_passport(engines), "unet")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "expected a JSON object, found list"),
        ('{"schema_version": 2}', "schema_version"),
        ("[" * 100_000, "passport.json"),
        ("{" + " " * (1 << 20) + "}", "over 1 MiB"),
    ],
)
def test_a_passport_that_is_none(engines, text, words):
    (engines / "passport.json").write_text(text)
    assert words in refusal(engines)


def test_an_empty_engine(engines):
    (engines / "vae_decoder.plan").write_bytes(b"")
    assert "so it was exchanged or damaged" in refusal(engines)
    with pytest.raises(EngineError, match=r"vae_decoder.plan: it is empty"):
        passports.trusted_engine(engines, "vae_decoder")


def test_no_passport(engines):
    (engines / "passport.json").unlink()
    assert "engines are code and are loaded only with their passport" in refusal(engines)


def test_unknown_fields_are_refused(engines):
    path = engines / "passport.json"
    content = json.loads(path.read_text()) | {"extra": 1}
    path.write_text(json.dumps(content))
    assert "extra" in refusal(engines)


def test_a_precision_that_the_bundle_does_not_have(engines):
    stamped(engines.parent.parent, precision="fp16")
    assert "built from a fp16 file of vae_decoder, which this bundle does not have" in refusal(engines)


# What the flags of a build allow


def test_ampere_and_up_runs_on_newer_gpus_under_any_driver(engines):
    folder = stamped(engines.parent.parent, flags={"hardware_compatibility": "ampere+"})
    newer = Device("RTX 5090", 120, "580.1", "13.0", 1, 1)
    assert load(folder, device=newer) == b"an engine"
    assert notes(folder, device=newer) == []
    assert "is SM 75" in refusal(folder, device=Device("RTX 2080", 75, "580.1", "13.0", 1, 1))


def test_the_same_compute_capability_is_no_newer_one(engines):
    folder = stamped(engines.parent.parent, flags={"hardware_compatibility": "same-cc"})
    assert load(folder, device=Device("Orin NX", 87, "550.1", "12.6", 1, 1)) == b"an engine"
    assert "is SM 89" in refusal(folder, device=Device("RTX 4090", 89, "540.4.0", "12.6", 1, 1))


def test_version_compatible_engines_load_in_later_versions_of_the_major(engines):
    folder = stamped(engines.parent.parent, flags={"version_compatible": "on"})
    assert load(folder, version="10.9.0") == b"an engine"
    for version in ("10.2.0", "11.0.0"):
        assert "built by tensorrt 10.3.0" in refusal(folder, version=version)


def test_engines_without_a_gpu_have_no_driver_to_differ_from(engines):
    folder = stamped(engines.parent.parent, gpu=None, driver=None, cuda=None, sm=[86, 87])
    assert load(folder, device=Device("Orin", 87, "999", "13.0", 1, 1)) == b"an engine"
