"""`moebius-export trt` over the fake library: flags of each version, engines and passports, failures and interrupts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import onnx
import pytest

from moebius_runtime.bundle.graph_files import tensor_bytes
from moebius_runtime.bundle.manifest import FileInfo, read_manifest, sha256_file, write_manifest
from moebius_runtime.bundle.passport import ENGINES, Device, check_bundle, check_device, checked_engine, read_passport

ROOT = Path(__file__).parents[3]
VERSIONS = ("10.3.0", "10.9.0", "11.4.1")


def called(module, name):
    return [arguments for what, arguments in module.calls if what == name]


def engine_folder(bundle):
    [folder] = (bundle / ENGINES).iterdir()
    return folder


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.mark.parametrize("version", VERSIONS)
def test_engines_and_their_passport(version, install, bundle, trt, device):
    module = install(version)
    code, out, _ = trt(bundle, "--fp32", device=device)
    assert code == 0, out
    folder = engine_folder(bundle)
    assert folder.name == f"orin-tensorrt{version}-fp32"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("passport.json", "unet.plan", "vae_decoder.plan", "vae_encoder.plan")
    ]
    passport, manifest = read_passport(folder), read_manifest(bundle)
    check_bundle(folder, passport, manifest)
    check_device(folder, passport, version, device)
    assert (passport.gpu, passport.sm, passport.driver, passport.cuda) == ("Orin", [87], "540.4.0", "12.6")
    for graph, engine in passport.engines.items():
        content = bytes(checked_engine(folder, passport, graph).view)
        assert json.loads(content[4:])["onnx"] == str(bundle / manifest.graphs[graph].files["fp32"].model)
        assert engine.device_memory == 4096
        assert engine.shapes["sample" if graph == "unet" else "image" if graph == "vae_encoder" else "latent"].max
    # strongly typed where there is weak typing to be turned off, and never a precision flag
    typed = 1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert called(module, "create_network") == [(typed,)] * 3
    # each graph is parsed once, before any is built, and the largest is built last
    files = {graph: str(bundle / manifest.graphs[graph].files["fp32"].model) for graph in passport.engines}
    assert called(module, "parse_from_file") == [(file,) for file in files.values()]
    built = [path for (path,) in called(module, "build_serialized_network")]
    assert sorted(built) == sorted(files.values())
    assert built == sorted(built, key=lambda path: tensor_bytes(Path(path)))
    assert called(module, "set_flag") == []
    assert called(module, "clear_flag") == [("TF32",)] * 3
    assert called(module, "num_compute_capabilities") == []
    assert "memory forecast" in out


def test_the_flags_reach_the_builder(install, bundle, trt, device):
    module = install("10.9.0")
    flags = ["--workspace", "512MiB", "--opt-level", "5", "--hardware-compatibility", "ampere+", "--version-compatible"]
    code, _, err = trt(bundle, "--fp32", *flags, "--strip-weights", "--tf32", "--graphs", "unet", device=device)
    assert code == 0, err
    assert called(module, "set_memory_pool_limit") == [("WORKSPACE", 512 << 20)]
    assert called(module, "builder_optimization_level")[-1] == (5,)
    assert called(module, "hardware_compatibility_level")[-1] == (module.HardwareCompatibilityLevel.AMPERE_PLUS,)
    assert called(module, "set_flag") == [("VERSION_COMPATIBLE",), ("STRIP_PLAN",)]
    assert called(module, "clear_flag") == []
    assert "must first refit them" in err
    passport = read_passport(engine_folder(bundle))
    assert list(passport.engines) == ["unet"]
    assert passport.flags == {
        "opt_level": "5",
        "workspace": str(512 << 20),
        "hardware_compatibility": "ampere+",
        "version_compatible": "on",
        "strip_weights": "on",
        "tf32": "on",
        "plugins": "off",
    }


def test_rtx_names_its_targets_without_a_gpu(install, bundle, trt):
    module = install("1.7.1", rtx=True)
    code, _, err = trt(bundle, "--fp32", "--sm", "12.0,86,89", "--timing-cache", bundle / "t")
    assert code == 0, err
    assert "neither read nor written" in err
    assert not (bundle / "t").exists()
    assert called(module, "set_compute_capability")[:3] == [("SM86", 0), ("SM89", 1), ("SM120", 2)]
    folder = engine_folder(bundle)
    assert folder.name == "sm86+89+120-tensorrt-rtx1.7.1-fp32"
    passport = read_passport(folder)
    assert (passport.gpu, passport.sm, passport.driver) == (None, [86, 89, 120], None)
    assert passport.rebuild == "moebius-export trt BUNDLE --fp32 --backend tensorrt-rtx --sm 86,89,120"


def test_rtx_builds_for_the_gpu_that_is_here(install, bundle, trt):
    module = install("1.7.1", rtx=True)
    assert trt(bundle, "--fp32", device=Device("RTX 4070", 89, "580.1", "13.0", 12 << 30, 11 << 30))[0] == 0
    assert called(module, "set_compute_capability")[0] == ("SM89", 0)
    assert engine_folder(bundle).name == "rtx_4070-tensorrt-rtx1.7.1-fp32"


def test_several_engines_stay_side_by_side(install, bundle, trt, device):
    install("10.3.0")
    assert trt(bundle, "--fp32", device=device)[0] == 0
    first = everything(bundle / ENGINES)
    install("1.7.1", rtx=True)
    assert trt(bundle, "--fp32", "--sm", "86", "--backend", "tensorrt-rtx")[0] == 0
    now = everything(bundle / ENGINES)
    assert len(list((bundle / ENGINES).iterdir())) == 2
    assert {name: now[name] for name in first} == first


def sizes(bundle):
    return {name: engine.sha256 for name, engine in read_passport(engine_folder(bundle)).engines.items()}


def test_building_one_graph_keeps_the_other_engines(install, bundle, trt, device):
    module = install("10.3.0")
    assert trt(bundle, "--fp32", device=device)[0] == 0
    first, before = sizes(bundle), everything(engine_folder(bundle))
    (engine_folder(bundle) / "notes").mkdir()
    (engine_folder(bundle) / "notes" / "mine.txt").write_text("kept")
    module.calls.clear()
    code, _, err = trt(bundle, "--fp32", "--graphs", "unet_conditional", device=device)
    assert code == 0, err
    assert "removed" not in err
    assert len(called(module, "build_serialized_network")) == 1
    folder, now = engine_folder(bundle), sizes(bundle)
    assert set(now) == {"unet", "vae_encoder", "vae_decoder", "unet_conditional"}
    assert {name: now[name] for name in first} == first
    assert {name: content for name, content in everything(folder).items() if name in before and ".plan" in name} == {
        name: content for name, content in before.items() if ".plan" in name
    }
    assert (folder / "notes" / "mine.txt").read_text() == "kept"
    passport = read_passport(folder)
    check_bundle(folder, passport, read_manifest(bundle))
    for graph in passport.engines:
        checked_engine(folder, passport, graph).close()


def test_engines_whose_hashes_do_not_hold_are_not_kept_and_named(install, bundle, trt, device):
    install("10.3.0")
    assert trt(bundle, "--fp32", device=device)[0] == 0
    folder = engine_folder(bundle)
    (folder / "vae_encoder.plan").write_bytes(b"damaged")
    (folder / "stray.plan").write_bytes(b"engine")
    with open(bundle / "vae_decoder" / "model.onnx", "ab") as stream:
        stream.write(b"\x52\x00")  # an empty field that ONNX does not know
    reseal(bundle, "vae_decoder/model.onnx")
    code, _, err = trt(bundle, "--fp32", "--graphs", "unet_conditional", device=device)
    assert code == 0, err
    assert set(sizes(bundle)) == {"unet", "unet_conditional"}
    assert sorted(path.name for path in folder.glob("*.plan")) == ["unet.plan", "unet_conditional.plan"]
    lines = [line for line in err.splitlines() if "removed" in line]
    assert len(lines) == 3
    for words in (
        "engine of vae_encoder is removed: ",
        "engine of vae_decoder is removed: ",
        "stray.plan is removed: its passport does not name it",
    ):
        assert [line for line in lines if words in line], words
    (folder / "passport.json").write_text("{}")
    code, _, err = trt(bundle, "--fp32", "--graphs", "vae_encoder", device=device)
    assert code == 0
    assert set(sizes(bundle)) == {"vae_encoder"}
    assert len([line for line in err.splitlines() if "removed" in line and "passport.json" in line]) == 2


@pytest.mark.parametrize(
    ("arguments", "update", "words"),
    [
        (["--opt-level", "5"], {}, "opt_level default (now 5)"),
        (["--tf32"], {}, "tf32 off (now on)"),
        ([], {"driver": "550.1"}, "driver 540.4.0 (now 550.1)"),
        ([], {"cuda": "12.8"}, "cuda 12.6 (now 12.8)"),
    ],
)
def test_other_options_do_not_remove_what_was_built(arguments, update, words, built, trt, device):
    """One passport describes all engines of a folder, so those of other options would have to go: refused instead."""
    bundle, module, before = built
    now = replace(device, **update)
    module.calls.clear()
    code, _, err = trt(bundle, "--fp32", "--graphs", "unet_conditional,unet", *arguments, device=now)
    assert code == 2
    assert f"holds engines of vae_encoder, vae_decoder that were built with {words}" in " ".join(err.split())
    assert called(module, "build_serialized_network") == []
    assert everything(bundle / ENGINES) == before
    every = "unet,unet_conditional,vae_encoder,vae_decoder"
    assert f"--graphs {every}" in err  # and that works
    assert trt(bundle, "--fp32", "--graphs", every, *arguments, device=now)[0] == 0
    assert set(sizes(bundle)) == set(every.split(","))


def test_a_failed_build_of_one_graph_keeps_every_engine(built, trt, device):
    bundle, module, before = built
    module.build_error = "Error Code 10"
    assert trt(bundle, "--fp32", "--graphs", "unet_conditional", device=device)[0] == 2
    assert everything(bundle / ENGINES) == before


REFUSED = [
    # version, rtx, device, arguments, the message
    ("10.3.0", False, True, ["--fp32", "--sm", "86"], "builds for the GPU of this machine only (SM 87, Orin)"),
    ("10.3.0", False, False, ["--fp32"], "no GPU was found here, and tensorrt 10.3.0 needs to know the target"),
    ("1.7.1", True, False, ["--fp32"], "name the GPUs to build for, such as --sm 86,89,120"),
    ("1.7.1", True, False, ["--fp32", "--sm", "86,90"], "does not build for it (Hopper"),
    ("1.7.1", True, False, ["--fp32", "--sm", "87"], "--sm 87: tensorrt-rtx 1.7.1 does not build for it (Jetson Orin"),
    ("1.7.1", True, True, ["--fp32"], "this machine's Orin, SM 87: tensorrt-rtx 1.7.1 does not build for it"),
    ("1.7.1", True, False, ["--fp32", "--sm", "ada"], "--sm ada: expected compute capabilities such as 86,89,120"),
    (
        "1.7.1",
        True,
        False,
        ["--fp32", "--sm", "86", "--version-compatible"],
        "cannot build such engines, they load only",
    ),
    ("1.7.1", True, False, ["--fp32", "--sm", "86", "--strip-weights"], "strips weights only on a machine with a GPU"),
    ("1.7.1", True, False, ["--fp32", "--sm", "86", "--hardware-compatibility", "ampere+"], "name every GPU with --sm"),
    ("10.3.0", False, True, ["--fp32", "--hardware-compatibility", "same-cc"], "it came with TensorRT 10.9"),
    ("10.3.0", False, True, ["--fp32", "--hardware-compatibility", "all"], "expected one of none, ampere+, same-cc"),
    ("10.3.0", False, True, ["--fp32", "--opt-level", "6"], "--opt-level 6: expected 0"),
    ("10.3.0", False, True, ["--fp32", "--workspace", "much"], "--workspace much: expected a size such as"),
    ("10.3.0", False, True, ["--fp32", "--workspace", "0"], "expected 1 MiB to 1 TiB"),
    ("10.3.0", False, True, ["--fp32", "--graphs", "unet,vae"], "--graphs vae: expected some of unet"),
    ("10.3.0", False, True, ["--fp32", "--max-batch", "4"], "fixed when it was exported; export with --dynamic-batch"),
    ("10.3.0", False, True, ["--fp32", "--backend", "onnx"], "--backend onnx: expected one of tensorrt, tensorrt-rtx"),
    ("10.3.0", False, True, ["--fp32", "--backend", "tensorrt-rtx"], 'pip install "moebius-edge[trt-rtx]"'),
    ("10.3.0", False, True, ["--int8"], "no int8 file of unet, vae_encoder, vae_decoder"),
    ("10.3.0", False, True, ["--fp16", "--fp32"], "--fp16 --fp32: expected one of"),
    ("10.3.0", False, True, [], "no precision: expected one of --fp16, --bf16, --fp32, --int8 or --fp8"),
    ("10.3.0", False, True, ["--fp8"], "SM 87 has no FP8, which begins with Ada"),
    ("8.6.1", False, True, ["--fp32"], "has no strongly typed networks; 10.0 or later is needed"),
    (None, False, True, ["--fp32"], "no TensorRT is installed: neither `tensorrt` nor `tensorrt_rtx`"),
]


@pytest.mark.parametrize(("version", "rtx", "here", "arguments", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_is_refused(version, rtx, here, arguments, message, install, bundle, trt, device):
    module = install(version, rtx)
    before = everything(bundle)
    code, out, err = trt(bundle, *arguments, device=device if here else None)
    assert code == 2
    assert out == ""
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert everything(bundle) == before
    assert module is None or called(module, "build_serialized_network") == []


def test_bf16_needs_ampere(install, bundle, trt, device):
    install("1.7.1", rtx=True)
    link = read_manifest(bundle)
    graphs = {
        name: graph.model_copy(update={"files": {**graph.files, "bf16": graph.files["fp32"]}})
        for name, graph in link.graphs.items()
    }
    write_manifest(link.model_copy(update={"graphs": graphs}), bundle)
    assert "SM 75 has no bfloat16" in trt(bundle, "--bf16", "--sm", "75,86")[2]
    assert trt(bundle, "--bf16", "--sm", "86")[0] == 0
    assert read_passport(engine_folder(bundle)).precision == "bf16"


def test_of_two_installed_one_is_taken_and_said(install, bundle, trt, device):
    install("11.4.1")
    install("1.7.1", rtx=True)
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 0
    assert "using tensorrt, it builds for this machine's GPU; --backend tensorrt-rtx uses the other" in err
    err = trt(bundle, "--fp32", "--sm", "86", device=device)[2]
    assert "using tensorrt-rtx, only it builds for GPUs of other machines" in err


def test_an_open_batch_gets_its_profile(install, bundle, trt, device):
    open_batch(bundle)
    module = install("11.4.1")
    code, _, err = trt(bundle, "--fp32", "--min-batch", 1, "--opt-batch", 2, "--max-batch", 4, device=device)
    assert code == 0, err
    shapes = {name: (low, best, high) for name, low, best, high in called(module, "set_shape")}
    assert shapes["sample"] == ((1, 9, 16, 16), (2, 9, 16, 16), (4, 9, 16, 16))
    assert shapes["timestep"] == ((1,), (1,), (1,))
    assert read_passport(engine_folder(bundle)).engines["vae_encoder"].shapes["image"].max[0] == 4
    code, _, err = trt(bundle, "--fp32", "--min-batch", 3, "--max-batch", 2, device=device)
    assert code == 2
    assert "expected them in that order" in err


def open_batch(bundle):
    """The bundle with the number of pictures left open, as --dynamic-batch would."""
    manifest = read_manifest(bundle)
    graphs, files = {}, dict(manifest.files)
    for name, graph in manifest.graphs.items():
        file = graph.files["fp32"].model
        model = onnx.load(bundle / file, load_external_data=False)
        for value in (*model.graph.input, *model.graph.output):
            if len(value.type.tensor_type.shape.dim) == 4:
                value.type.tensor_type.shape.dim[0].dim_param = "batch"
        (bundle / file).write_bytes(model.SerializeToString())
        files[file] = FileInfo(size=(bundle / file).stat().st_size, sha256=sha256_file(bundle / file))

        def opened(tensors):
            return [
                t.model_copy(update={"shape": ["batch", *t.shape[1:]]}) if len(t.shape) == 4 else t for t in tensors
            ]

        graphs[name] = graph.model_copy(update={"inputs": opened(graph.inputs), "outputs": opened(graph.outputs)})
    write_manifest(manifest.model_copy(update={"graphs": graphs, "files": files}), bundle)


def test_the_timing_cache_is_carried_from_build_to_build(install, bundle, trt, device, tmp_path):
    module = install("10.3.0")
    cache = tmp_path / "timings"
    err = trt(bundle, "--fp32", "--timing-cache", cache, device=device)[2]
    assert "does not exist yet" in err
    assert cache.read_bytes() == b"timed " * 3
    assert trt(bundle, "--fp32", "--timing-cache", cache, device=device)[0] == 0
    assert called(module, "set_timing_cache")[3] == (b"timed " * 3, False)
    cache.write_bytes(b"OTHER gpu")
    assert (
        "of another GPU or version, so it was started anew"
        in trt(bundle, "--fp32", "--timing-cache", cache, device=device)[2]
    )
    assert cache.read_bytes() == b"timed " * 3
    assert "it is a folder" in trt(bundle, "--fp32", "--timing-cache", tmp_path, device=device)[2]


def test_a_damaged_file_is_not_built_from(install, bundle, trt, device):
    module = install("10.3.0")
    file = bundle / "unet" / "model.onnx.data"
    file.write_bytes(b"x" + file.read_bytes()[1:])
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 2
    assert "it is damaged or was exchanged" in err
    assert module.calls == []


def test_every_problem_of_the_parser_is_printed(install, bundle, trt, device):
    install("10.3.0")
    file = bundle / "vae_encoder" / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    for node in model.graph.node[:2]:
        node.domain = "elsewhere"
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    names = [node.name for node in model.graph.node[:2]]
    file.write_bytes(model.SerializeToString())
    reseal(bundle, "vae_encoder/model.onnx")
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 2
    lines = [line for line in err.splitlines() if "Plugin not found" in line and not line.startswith("error")]
    assert len(lines) == 2
    for name, line in zip(names, lines, strict=True):
        assert str(file) in line
        assert f"node {name} (" in line
    assert "tensorrt 10.3.0 cannot parse it (2 problems; the first" in err
    assert not (bundle / ENGINES).exists()


def reseal(bundle, file):
    manifest = read_manifest(bundle)
    path = bundle / file
    info = FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
    write_manifest(manifest.model_copy(update={"files": {**manifest.files, file: info}}), bundle)


@pytest.fixture
def built(install, bundle, trt, device):
    """A bundle with engines; the module; what is in engines/."""
    module = install("10.3.0")
    assert trt(bundle, "--fp32", device=device)[0] == 0
    return bundle, module, everything(bundle / ENGINES)


def test_a_failed_build_leaves_the_old_engines_and_says_why(built, trt, device):
    bundle, module, before = built
    module.build_error = "Error Code 10: Could not find any implementation for node conv_in"
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 2
    [*_, (first,)] = called(module, "build_serialized_network")
    graph = Path(first).parent.name
    assert f"{graph}: the builder failed: Error Code 10: Could not find any implementation for node conv_in" in err
    assert everything(bundle / ENGINES) == before


def test_a_full_disk_leaves_the_old_engines(built, trt, device, monkeypatch):
    bundle, _, before = built

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 2
    assert "No space left on device" in err
    assert everything(bundle / ENGINES) == before


def test_no_room_is_known_before_the_build(built, trt, device, monkeypatch):
    import shutil

    bundle, module, before = built
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    module.calls.clear()
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 2
    assert "Free some space" in err
    assert called(module, "build_serialized_network") == []
    assert everything(bundle / ENGINES) == before


def test_without_a_gpu_tensorrt_makes_no_builder(install, bundle, trt, device):
    install("10.3.0").no_gpu = True
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 2
    assert "tensorrt 10.3.0 cannot create a builder here" in err


def test_an_interrupt_ends_the_build_through_the_monitor(built, trt, device):
    bundle, module, before = built
    module.build_steps, module.step_seconds = 2000, 0.01
    steps = []

    def on_step(phase, step):
        steps.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    module.on_step = on_step
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 130
    assert "interrupted" in err
    assert len(steps) < 1000
    assert everything(bundle / ENGINES) == before
    for thread in threading.enumerate():
        if thread.name == "build":  # it has given its result, and has nothing left to do but to end
            thread.join(10)
            assert not thread.is_alive()


KILLED = """
import sys
sys.path.insert(0, {fakes!r})
from fake_tensorrt import make_module
from moebius_runtime.hardware import devices
from moebius_runtime.bundle.passport import Device
module = make_module("10.3.0")
module.build_steps, module.step_seconds = 2000, 0.05
module.on_step = lambda phase, step: print("step", flush=True)
sys.modules["tensorrt"] = module
devices.current_device = lambda: Device("Orin", 87, "540.4.0", "12.6", 8 << 30, 5 << 30)
from moebius_export import cli
sys.argv = ["moebius-export", "trt", {bundle!r}, "--fp32"]
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])  # noqa: TID251
def test_a_killed_build_leaves_the_old_engines(number, built, trt, device):
    bundle, _, before = built
    paths = [str(ROOT), *(str(ROOT / name) for name in ("export", "runtimes"))]
    code = KILLED.format(fakes=str(ROOT / "tests" / "fakes"), bundle=str(bundle))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "step" not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    parts = [path.name for path in (bundle / ENGINES).iterdir() if path.name.endswith(".part")]
    assert len(parts) == 1
    # another build of the same engines, meanwhile, leaves the first one's folder alone
    assert trt(bundle, "--fp32", device=device)[0] == 0
    assert (bundle / ENGINES / parts[0]).is_dir()
    before = everything(engine_folder_of(bundle))
    process.send_signal(number)
    process.communicate(timeout=60)
    assert everything(engine_folder_of(bundle)) == before
    if number == signal.SIGTERM:
        assert process.returncode == 130
    left = [path.name for path in (bundle / ENGINES).iterdir() if path.name.startswith(".")]
    assert left == ([] if number == signal.SIGTERM else parts)
    assert trt(bundle, "--fp32", device=device)[0] == 0
    assert [path.name for path in (bundle / ENGINES).iterdir()] == ["orin-tensorrt10.3.0-fp32"]


def engine_folder_of(bundle):
    [folder] = [path for path in (bundle / ENGINES).iterdir() if not path.name.startswith(".")]
    return folder


def test_a_version_without_monitor_says_so(install, bundle, trt, device):
    module = install("10.3.0")
    del module.IProgressMonitor
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 0
    assert "does not report the progress of a build" in err


def test_what_surely_does_not_fit_is_refused_unless_forced(install, bundle, trt):
    module = install("10.3.0")
    small = Device("Orin", 87, "540.4.0", "12.6", 1 << 20, 1 << 18)
    code, out, err = trt(bundle, "--fp32", device=small)
    assert code == 2
    assert "memory forecast" in out
    assert "--force builds all the same" in err
    assert called(module, "build_serialized_network") == []
    assert trt(bundle, "--fp32", "--force", device=small)[0] == 0


def test_without_a_bundle_and_without_pytorch(install, trt, tmp_path, monkeypatch, device):
    install("10.3.0")
    for name in [name for name in sys.modules if name == "moebius_export.onnx_export.export"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, _, err = trt(tmp_path / "none", "--fp16", device=device)
    assert code == 2
    assert "there is no bundle, and none can be exported here" in err
    assert not (tmp_path / "none").exists()


def test_without_a_bundle_one_is_exported_for_tensorrt(install, trt, tmp_path, monkeypatch, device, tiny_bundle):
    import shutil

    from moebius_export.onnx_export import export as exporting

    install("10.3.0")
    asked = []

    def export(out, options, progress):
        asked.append(options)
        progress("unet", "trace")
        shutil.copytree(tiny_bundle, out)

    monkeypatch.setattr(exporting, "export_onnx", export)
    monkeypatch.chdir(tmp_path)
    code, _, err = trt("--fp32", device=device)
    assert code == 0
    assert "trt: export: there is no bundle at moebius-bundle" in err
    assert "trt: unet, trace" in err
    assert "trt: parse: fp32 files of unet, vae_encoder, vae_decoder" in err
    assert "precision plan" not in err
    [options] = asked
    assert options.target == "tensorrt"
    assert (tmp_path / "moebius-bundle" / ENGINES / "orin-tensorrt10.3.0-fp32" / "unet.plan").is_file()


@pytest.mark.parametrize("arguments", [["--fp32"], ["--fp16"]], ids=str)
def test_nothing_is_exported_for_a_build_that_is_refused(arguments, install, trt, tmp_path, monkeypatch, device):
    install()
    monkeypatch.chdir(tmp_path)
    code, _, err = trt(*arguments, device=device)
    assert code == 2
    assert "no TensorRT is installed" in err
    assert list(tmp_path.iterdir()) == []


BARE = """
import sys
for name in ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx"):
    sys.modules[name] = None
from moebius_export import cli
sys.argv = ["moebius-export", "trt", *sys.argv[1:]]
cli.main()
"""


def test_the_command_works_where_neither_torch_nor_onnx_is(bundle):
    paths = [str(ROOT), *(str(ROOT / name) for name in ("export", "runtimes"))]
    for arguments, code, words in (
        (["--help"], 0, "Builds TensorRT engines"),
        ([str(bundle), "--fp32", "--sm", "86"], 2, "no TensorRT is installed"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", BARE, *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


def test_progress_is_throttled_and_never_goes_back(monkeypatch):
    from moebius_export.trt import monitor

    now = [100.0]
    monkeypatch.setattr(monitor.time, "monotonic", lambda: now[0])
    seen = []
    phases = monitor.Phases(lambda name, share: seen.append((now[0], share)))
    phases.start("build", None, 2)
    for _ in range(2):
        phases.start("tactics", "build", 100)
        for step in range(100):
            assert phases.step("tactics", step)
            now[0] += 0.0101
        phases.finish("tactics")
        phases.step("build", 0)
    assert len(seen) == 21  # a report each 0.1 s, of 2.02 s in all
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    assert all(0 <= share <= 1 for _, share in seen)
    assert all(later - earlier >= 0.1 for (earlier, _), (later, _) in pairwise(seen))
    phases.stop()
    assert phases.step("build", 1) is False


def test_verify_takes_engines_by_their_passports(built):
    from moebius_export.verify.declared import unlisted_checks
    from moebius_runtime.bundle.bundle import Bundle

    bundle, _, _ = built
    [check] = unlisted_checks(Bundle.open(bundle))
    assert (check.subject, check.status) == ("engines/orin-tensorrt10.3.0-fp32", "pass")
    folder = engine_folder(bundle)
    (folder / "other.plan").write_bytes(b"engine")
    [check] = unlisted_checks(Bundle.open(bundle))
    assert check.status == "fail"
    assert "other.plan" in check.detail
    (folder / "other.plan").unlink()
    (folder / "unet.plan").write_bytes(b"engine")
    [check] = unlisted_checks(Bundle.open(bundle))
    assert check.status == "fail"
    assert "exchanged or damaged" in check.detail


def test_a_monitor_never_raises_and_the_caller_gets_the_error(make_module):
    from moebius_export.trt.monitor import Phases, monitor_for

    def broken(name, share):
        raise RuntimeError("the screen is gone")

    phases = Phases(broken)
    monitor = monitor_for(make_module("10.3.0"), phases)
    monitor.phase_start("build", None, 3)
    assert monitor.step_complete("build", 0) is False
    monitor.phase_finish("build")
    assert str(phases.problem) == "the screen is gone"
