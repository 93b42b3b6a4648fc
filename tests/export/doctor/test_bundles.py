"""Rows of a bundle and its engines."""

import hashlib

import pytest

from moebius_export.doctor.bundles import check_whole_bundle
from moebius_export.doctor.gpu import Gpu, find_gpu
from moebius_export.doctor.libraries import check_libraries
from moebius_export.doctor.rows import Verdict
from moebius_runtime.bundle.manifest import read_manifest, write_manifest
from moebius_runtime.bundle.passport import EngineInfo, Passport, write_passport


@pytest.fixture
def check(machines, tmp_path):
    """check(bundle, **answers): the bundle's rows by name, on a machine where the answers are given."""

    def run(bundle, **values):
        sources = machines.machine(tmp_path / "root", ask=machines.answers(**values))
        gpu = find_gpu(sources) if "device" in values else Gpu(None, None, None, None, "none")
        checked = check_whole_bundle(bundle, check_libraries(sources, gpu), gpu, lambda what: None)
        return {row.name: row for row in checked.rows}, checked.sound

    return run


def add_engines(bundle, folder="sm89-tensorrt-rtx1.7.1-fp32", onnx_sha256=None, **changes):
    """A folder of engines with a passport of this bundle, as `moebius-export trt` writes them."""
    manifest = read_manifest(bundle)
    path = bundle / "engines" / folder
    path.mkdir(parents=True)
    engine = b"an engine"
    (path / "unet.plan").write_bytes(engine)
    file = manifest.graphs["unet"].files["fp32"]
    info = EngineInfo(
        size=len(engine),
        sha256=hashlib.sha256(engine).hexdigest(),
        onnx_sha256=onnx_sha256 or manifest.files[file.model].sha256,
        weights_sha256=manifest.files[file.weights].sha256,
        plan_sha256=None,
        shapes={},
        device_memory=None,
        build_seconds=1.0,
    )
    fields = {
        "schema_version": 1,
        "created": "2026-11-24T00:00:00+00:00",
        "backend": "tensorrt-rtx",
        "backend_version": "1.7.1",
        "precision": "fp32",
        "gpu": None,
        "sm": [89],
        "driver": None,
        "cuda": None,
        "flags": {},
        "engines": {"unet": info},
    }
    write_passport(Passport(**fields | changes), path)
    return path


RTX = {"version": "1.7.1", "file": "x", "cuda": 13}


def test_a_sound_bundle_without_engines(check, tiny_bundle):
    rows, sound = check(tiny_bundle)
    assert sound
    assert "preset tiny, random test weights" in rows["manifest"].found
    assert rows["files"].found.endswith("undamaged")
    assert rows["engines"].fix == f"moebius-export trt {tiny_bundle} --fp16"


def test_no_bundle(check, tmp_path):
    rows, sound = check(tmp_path / "nothing")
    assert not sound
    assert "moebius-export onnx --out BUNDLE" in rows["manifest"].found


def test_a_damaged_and_a_missing_file(check, tiny_copy):
    with (tiny_copy / "vae_encoder/model.onnx.data").open("r+b") as stream:
        stream.write(b"x")
    (tiny_copy / "unet/model.onnx").unlink()
    manifest = read_manifest(tiny_copy)
    assert {"vae_encoder/model.onnx.data", "unet/model.onnx"} <= manifest.files.keys()
    rows, sound = check(tiny_copy)
    assert not sound
    assert rows["file"].verdict is Verdict.wrong
    assert "files" not in rows


def test_the_optional_decoders_are_listed_and_their_files_checked(check, tiny_copy):
    """A file that names weights which the manifest does not give it: only looking into it finds that."""
    manifest = read_manifest(tiny_copy)
    info = manifest.graphs["vae_decoder"]

    def with_decoder(**file):
        files = {"fp32": info.files["fp32"].model_copy(update=file)}
        decoder = info.model_copy(update={"files": files})
        write_manifest(manifest.model_copy(update={"decoders": {"vae_decoder_tiny": decoder}}), tiny_copy)
        return check(tiny_copy)

    rows, sound = with_decoder()
    assert sound
    assert "vae_decoder_tiny fp32" in rows["manifest"].found
    rows, sound = with_decoder(weights=None)
    assert not sound
    assert "vae_decoder/model.onnx" in rows["file"].found


def test_engines_that_fit(check, machines, tiny_copy):
    folder = add_engines(tiny_copy)
    rows, sound = check(tiny_copy, tensorrt_rtx=RTX, device=machines.device())
    assert sound
    row = rows[f"engines {folder.name}"]
    assert row.found == "tensorrt-rtx 1.7.1, fp32, unet: fits this device"
    assert row.verdict is Verdict.ok


@pytest.mark.parametrize(
    ("changes", "device", "words"),
    [
        ({}, {"sm": 86}, "built for SM 89"),
        ({"backend_version": "1.6.0"}, {}, "built by tensorrt-rtx 1.6.0, here is 1.7.1"),
    ],
)
def test_engines_of_another_device_are_no_damage(check, machines, tiny_copy, changes, device, words):
    folder = add_engines(tiny_copy, **changes)
    rows, sound = check(tiny_copy, tensorrt_rtx=RTX, device=machines.device(**device))
    row = rows[f"engines {folder.name}"]
    assert sound
    assert row.verdict is Verdict.wrong
    assert words in row.found
    assert row.fix == f"moebius-export trt {tiny_copy} --fp32 --backend tensorrt-rtx"


def test_engines_built_under_another_driver_are_a_note(check, machines, tiny_copy):
    folder = add_engines(tiny_copy, gpu="NVIDIA GeForce RTX 4070", driver="570.1")
    rows, sound = check(tiny_copy, tensorrt_rtx=RTX, device=machines.device())
    row = rows[f"engines {folder.name}"]
    assert sound
    assert row.verdict is Verdict.ok
    assert "fits this device; " in row.found
    assert "built with driver 570.1, here is " in row.found


def test_engines_where_nothing_can_run_them(check, machines, tiny_copy):
    folder = add_engines(tiny_copy)
    rows, sound = check(tiny_copy)
    assert sound
    assert (
        "for SM 89: undamaged, but this machine cannot run them (no tensorrt-rtx)"
        in rows[f"engines {folder.name}"].found
    )
    rows, _ = check(tiny_copy, tensorrt_rtx=RTX)
    assert "no GPU that CUDA reaches" in rows[f"engines {folder.name}"].found


def test_an_exchanged_engine(check, machines, tiny_copy):
    folder = add_engines(tiny_copy)
    (folder / "unet.plan").write_bytes(b"AN ENGINE")
    rows, sound = check(tiny_copy, tensorrt_rtx=RTX, device=machines.device())
    row = rows[f"engines {folder.name}"]
    assert not sound
    assert row.verdict is Verdict.wrong
    assert row.fix == f"moebius-export trt {tiny_copy} --fp32 --backend tensorrt-rtx --sm 89"


def test_engines_without_a_passport_or_with_another_s(check, machines, tiny_copy, tmp_path):
    folder = add_engines(tiny_copy)
    other = add_engines(tiny_copy, "sm89-tensorrt10.3.0-fp32")  # its passport says tensorrt-rtx
    (folder / "passport.json").unlink()
    rows, sound = check(tiny_copy, tensorrt_rtx=RTX, device=machines.device())
    assert not sound
    assert "loaded only with their passport" in rows[f"engines {folder.name}"].found
    assert "its name says tensorrt, its passport tensorrt-rtx" in rows[f"engines {other.name}"].found


def test_engines_of_another_bundle(check, machines, tiny_copy):
    folder = add_engines(tiny_copy, onnx_sha256="0" * 64)
    rows, sound = check(tiny_copy, tensorrt_rtx=RTX, device=machines.device())
    assert not sound
    assert "was built from another ONNX file" in rows[f"engines {folder.name}"].found


def test_what_is_not_named_as_engines_are(check, tiny_copy):
    (tiny_copy / "engines").mkdir()
    (tiny_copy / "engines" / "notes.txt").write_text("mine")
    rows, sound = check(tiny_copy)
    assert sound
    assert "notes.txt: no name of a folder of engines" in rows["engines"].found
