"""`moebius-export onnx` onto an existing bundle: what still holds by its hashes stays, what goes is named."""

import json
import shutil

import pytest

from moebius import preset
from moebius.weights.load import load_student
from moebius_export.onnx_export import export as exporting
from moebius_export.onnx_export.export import ExportOptions, export_onnx
from moebius_export.onnx_export.record import Written
from moebius_runtime import Bundle
from moebius_runtime.bundle.manifest import FileInfo, GraphFile, read_manifest, write_manifest
from moebius_runtime.bundle.passport import EngineInfo, Passport, check_bundle, read_passport, write_passport
from moebius_runtime.files import sha256_file

TINY = ExportOptions(weights="stand-in", vae="stand-in", preset="tiny")


def info(path):
    return FileInfo(size=path.stat().st_size, sha256=sha256_file(path))


@pytest.fixture
def export(tiny_bundle, monkeypatch):
    """export(out, changed=()): an export whose graphs are the tiny bundle's, but for the changed ones; the notes."""
    loaded, made = load_student("stand-in", preset("tiny").student), read_manifest(tiny_bundle)
    monkeypatch.setattr(exporting, "load_student", lambda *_: loaded)
    monkeypatch.setattr(exporting, "check_prediction_type", lambda *_: None)

    def call(out, changed=()):
        def written(folder, group, *_):
            shutil.copytree(tiny_bundle / group, folder / group)
            if group in changed:
                with open(folder / group / "model.onnx", "ab") as stream:
                    stream.write(b"\x52\x00")  # an empty field that ONNX does not know
            names = [name for name in made.graphs if name.startswith(group)]
            return {name: Written(made.graphs[name], made.parity[name], [], made.checks[name]) for name in names}

        monkeypatch.setattr(exporting, "_write_graphs", written)
        notes = []
        export_onnx(out, TINY, note=notes.append)
        return notes

    return call


@pytest.fixture
def used(tiny_copy):
    """A bundle with fp16 files of three graphs, fp32 and fp16 engines, and a file of the user's."""
    manifest = read_manifest(tiny_copy)
    graphs, files = dict(manifest.graphs), dict(manifest.files)
    for graph in ("unet", "vae_encoder", "vae_decoder"):
        fp32 = graphs[graph].files["fp32"]
        names = {"model": f"{graph}/model_fp16.onnx", "weights": f"{graph}/model_fp16.onnx.data"}
        for name, source in zip(names.values(), (fp32.model, fp32.weights), strict=True):
            content = (tiny_copy / source).read_bytes().replace(b"model.onnx.data", b"model_fp16.onnx.data")
            (tiny_copy / name).write_bytes(content if name.endswith(".data") else fp16_model(tiny_copy / source))
            files[name] = info(tiny_copy / name)
        (tiny_copy / graph / "precision_fp16.json").write_text(json.dumps({"graph": graph}))
        files[f"{graph}/precision_fp16.json"] = info(tiny_copy / graph / "precision_fp16.json")
        fp16 = GraphFile(**names, plan=f"{graph}/precision_fp16.json")
        graphs[graph] = graphs[graph].model_copy(update={"files": {"fp32": fp32, "fp16": fp16}})
    manifest = manifest.model_copy(update={"graphs": graphs, "files": files})
    write_manifest(manifest, tiny_copy)
    for precision in ("fp32", "fp16"):
        write_engines(tiny_copy, manifest, precision)
    (tiny_copy / "notes.txt").write_text("mine")
    return tiny_copy


def fp16_model(source):
    import onnx

    model = onnx.load(source, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "model_fp16.onnx.data"
    return model.SerializeToString()


def write_engines(bundle, manifest, precision, graphs=("unet", "vae_decoder")):
    folder = bundle / "engines" / f"orin-tensorrt10.3.0-{precision}"
    folder.mkdir(parents=True)
    engines = {}
    for graph in graphs:
        (folder / f"{graph}.plan").write_bytes(b"engine of " + graph.encode())
        file, built = manifest.graphs[graph].files[precision], info(folder / f"{graph}.plan")
        hashes = [manifest.files[path].sha256 if path else None for path in (file.model, file.weights, file.plan)]
        engines[graph] = EngineInfo(
            size=built.size,
            sha256=built.sha256,
            onnx_sha256=hashes[0],
            weights_sha256=hashes[1],
            plan_sha256=hashes[2],
            shapes={},
            device_memory=None,
            build_seconds=1.0,
        )
    passport = Passport(
        schema_version=1,
        created="now",
        backend="tensorrt",
        backend_version="10.3.0",
        precision=precision,
        gpu="Orin",
        sm=[87],
        driver="540.4.0",
        cuda="12.6",
        flags={},
        engines=engines,
    )
    write_passport(passport, folder)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_network_keeps_everything(used, export):
    before = contents(used)
    assert export(used) == []
    now = contents(used)
    assert {name: now[name] for name in now if name != "manifest.json"} == {
        name: before[name] for name in before if name != "manifest.json"
    }
    bundle = Bundle.open(used)
    for graph in ("unet", "vae_encoder", "vae_decoder"):
        bundle.model_file(graph, "fp16")
    for precision in ("fp32", "fp16"):
        folder = used / "engines" / f"orin-tensorrt10.3.0-{precision}"
        check_bundle(folder, read_passport(folder), bundle.manifest)


def test_what_was_made_from_a_changed_graph_goes_and_is_named(used, export):
    notes = export(used, changed=["vae_encoder"])
    [note] = notes  # no engine was built from that graph
    assert "the earlier fp16 file of vae_encoder is removed: it was made from another fp32 file" in note
    assert f"moebius-export precision {used} --to fp16" in note
    manifest = read_manifest(used)
    assert [list(manifest.graphs[name].files) for name in ("unet", "vae_encoder")] == [["fp32", "fp16"], ["fp32"]]
    assert not (used / "vae_encoder" / "model_fp16.onnx").exists()
    assert (used / "notes.txt").read_text() == "mine"
    notes = export(used, changed=["vae_decoder"])
    assert len(notes) == 3
    assert [name for name in ("fp16", "fp32") if any(f"engines/orin-tensorrt10.3.0-{name} is" in n for n in notes)]
    assert not list((used / "engines").glob("*")) if (used / "engines").exists() else True
    Bundle.open(used).model_file("unet", "fp16")


def test_damaged_files_and_engines_are_not_kept(used, export, tmp_path):
    (used / "unet" / "model_fp16.onnx.data").write_bytes(b"damaged")
    (used / "engines" / "orin-tensorrt10.3.0-fp32" / "unet.plan").write_bytes(b"damaged")
    outside = shutil.copytree(used / "engines" / "orin-tensorrt10.3.0-fp16", tmp_path / "outside")
    (used / "engines" / "link-tensorrt10.3.0-fp16").symlink_to(outside, target_is_directory=True)
    notes = export(used)
    words = [
        "fp16 file of unet is removed",
        "10.3.0-fp32 is removed",
        "link-tensorrt10.3.0-fp16 is removed: it is a link",
    ]
    for word in words:
        assert [note for note in notes if word in note], word
    assert "fp16" not in read_manifest(used).graphs["unet"].files
    assert not (used / "engines" / "link-tensorrt10.3.0-fp16").exists()


def test_a_damaged_manifest_keeps_engines_that_name_the_new_files(used, export):
    (used / "manifest.json").write_text("{}")
    notes = export(used)
    assert "the files of the earlier bundle are removed: " in notes[0]
    assert (used / "engines" / "orin-tensorrt10.3.0-fp32" / "unet.plan").is_file()
    assert [note for note in notes if "orin-tensorrt10.3.0-fp16 is removed" in note]


def test_a_file_of_the_new_bundle_is_never_overwritten(used, export):
    """A manifest may come from anywhere: here its fp16 file has the name of the new bundle's fp32 file."""
    manifest = read_manifest(used)
    unet = manifest.graphs["unet"]
    wrong = unet.model_copy(update={"files": {"fp32": unet.files["fp32"], "fp16": unet.files["fp32"]}})
    write_manifest(manifest.model_copy(update={"graphs": {**manifest.graphs, "unet": wrong}}), used)
    before = (used / "unet" / "model.onnx").read_bytes()
    notes = export(used)
    assert [note for note in notes if "a file of the new bundle has its name" in note]
    assert (used / "unet" / "model.onnx").read_bytes() == before
