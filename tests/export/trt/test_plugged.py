"""Engines with plugins, over the fake library: only when asked, registered first, refused with the reason."""

import json
import shutil

import onnx
import pytest

from moebius_export.precision.planning import PlanOptions
from moebius_export.trt import plugged
from moebius_runtime.errors import BundleError
from moebius_runtime.passport import ENGINES, check_device, checked_engine, read_passport

QUICK = PlanOptions(pictures=1, steps=2, evaluations=1, samples=1, keep=("LocalLambda",))
NEEDS_TRITON = "Triton is not installed (it has wheels for Linux on x86-64 only)"


@pytest.fixture
def kept(kept_bundle, tmp_path):
    return shutil.copytree(kept_bundle, tmp_path / "kept")


@pytest.fixture
def switched(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MOEBIUS_TRT_PLUGIN", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))


def order(module):
    return [name for name, _ in module.calls]


def engines(bundle):
    [folder] = (bundle / ENGINES).iterdir()
    return folder


@pytest.mark.parametrize(("version", "precision"), [("10.9.0", "fp16"), ("11.4.1", "fp32")])
def test_plugins_are_registered_before_the_graph_is_read(version, precision, install, kept, trt, device, switched):
    pytest.importorskip("triton", reason=NEEDS_TRITON)
    module = install(version)
    code, _, err = trt(kept, f"--{precision}", "--graphs", "unet,vae_decoder", device=device)
    assert code == 0, err
    assert "LocalLambda nodes (6 of unet) become plugins. These have not run on a GPU yet" in err
    calls = order(module)
    assert calls.index("plugin.register") < min(calls.index("parse"), calls.index("parse_from_file"))
    file = kept / "unet" / ("model.onnx" if precision == "fp32" else "model_fp16.onnx")
    assert [given for name, given in module.calls if name == "parse"] == [(str(file),)] * 2  # forecast and build
    passport = read_passport(engines(kept))
    assert passport.flags["plugins"] == "on"
    assert passport.rebuild.startswith("MOEBIUS_TRT_PLUGIN=1 moebius-export trt BUNDLE")
    check_device(engines(kept), passport, version, device)
    content = json.loads(bytes(checked_engine(engines(kept), passport, "unet").view)[4:])
    assert len(content["plugins"]) == 6
    assert all(names and set(names) == {"local_lambda_kernel"} for names in content["plugins"].values())
    assert "plugins" not in json.loads(bytes(checked_engine(engines(kept), passport, "vae_decoder").view)[4:])


@pytest.mark.parametrize("value", [None, "0"])
def test_nothing_is_registered_unless_asked(value, install, kept, trt, device, monkeypatch):
    monkeypatch.delenv("MOEBIUS_TRT_PLUGIN", raising=False)
    if value is not None:
        monkeypatch.setenv("MOEBIUS_TRT_PLUGIN", value)
    module = install("11.4.1")
    assert trt(kept, "--fp16", "--graphs", "unet", device=device)[0] == 0  # by the functions' bodies
    assert {"plugin.register", "parse"}.isdisjoint(order(module))
    assert read_passport(engines(kept)).flags["plugins"] == "off"


REFUSED = [
    # version, rtx, arguments, the message
    (
        "10.3.0",
        False,
        ["--fp16"],
        "TensorRT 10.3.0 has no ahead-of-time plugins; expected 10.9 or newer. Unset MOEBIUS",
    ),
    ("10.8.0", False, ["--fp16"], "TensorRT 10.8.0 has no ahead-of-time plugins; expected 10.9 or newer"),
    ("1.7.1", True, ["--fp16", "--sm", "86"], "tensorrt-rtx has no plugins that are compiled ahead of time"),
    (
        "10.9.0",
        False,
        ["--fp16", "--strip-weights"],
        "an engine is refitted from the ONNX file, which names no plugins",
    ),
    ("10.9.0", False, ["--fp16", "--hardware-compatibility", "ampere+"], "the plugin is compiled for SM 87 alone"),
    (
        "10.9.0",
        False,
        ["--fp16", "--graphs", "vae_decoder"],
        "no node of vae_decoder can take the plugin: there is no",
    ),
]


@pytest.mark.parametrize(("version", "rtx", "arguments", "message"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_is_refused(version, rtx, arguments, message, install, kept, trt, device, switched, monkeypatch):
    monkeypatch.setattr("moebius_export.plugins.local_lambda.check_compiler", lambda sm: None)
    module = install(version, rtx)
    code, _, err = trt(kept, *arguments, device=device)
    assert code == 2
    [line] = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "build_serialized_network" not in order(module)
    assert not (kept / ENGINES).exists()


def test_bf16_is_refused(install, kept, trt, device, switched):
    from moebius_runtime.manifest import read_manifest, write_manifest

    manifest = read_manifest(kept)
    graphs = {
        name: graph.model_copy(update={"files": {**graph.files, "bf16": graph.files["fp32"]}})
        for name, graph in manifest.graphs.items()
    }
    write_manifest(manifest.model_copy(update={"graphs": graphs}), kept)
    install("10.9.0")
    assert "with --bf16: the plugin takes float32 and float16" in trt(kept, "--bf16", device=device)[2]


def test_an_unknown_gpu_is_refused_before_anything_is_read(install, kept, trt, switched):
    from moebius_runtime.passport import Device

    module = install("10.9.0")
    turing = Device("T4", 75, "580.1", "13.0", 16 << 30, 15 << 30)
    assert "SM 75: LocalLambda as a plugin is compiled for 80, 86" in trt(kept, "--fp16", device=turing)[2]
    assert module.calls == []


def test_the_form_for_cpus_is_refused(install, fused_bundle_copy, trt, device, switched, monkeypatch):
    monkeypatch.setattr("moebius_export.plugins.local_lambda.check_compiler", lambda sm: None)
    install("10.9.0")
    code, _, err = trt(fused_bundle_copy, "--fp32", "--graphs", "unet", device=device)
    assert code == 2
    assert "LocalLambda with 6 inputs; the plugin takes the 4 of the form 'convolution'" in err
    assert str(fused_bundle_copy / "unet/model.onnx") in err


def test_files_without_such_nodes_are_refused(install, bundle, trt, device, switched, monkeypatch):
    monkeypatch.setattr("moebius_export.plugins.local_lambda.check_compiler", lambda sm: None)
    install("10.9.0")
    code, _, err = trt(bundle, "--fp32", device=device)
    assert code == 2
    assert (
        "no node of unet, vae_encoder, vae_decoder can take the plugin: there is no LocalLambda in the fp32 files"
        in err
    )


def test_the_switch_is_checked(install, bundle, trt, device, monkeypatch):
    monkeypatch.setenv("MOEBIUS_TRT_PLUGIN", "yes")
    install("10.9.0")
    assert "MOEBIUS_TRT_PLUGIN is 'yes'; expected 1" in trt(bundle, "--fp32", device=device)[2]


def test_missing_files_are_typed_so_that_plugins_can_take_them(
    install, tensorrt_bundle, trt, device, switched, tmp_path, monkeypatch
):
    pytest.importorskip("triton", reason=NEEDS_TRITON)
    from moebius_export.precision import planning

    asked = []

    def quick(**options):
        asked.append(options)
        return QUICK

    monkeypatch.setattr(planning, "PlanOptions", quick)
    folder = shutil.copytree(tensorrt_bundle, tmp_path / "bundle")
    install("10.9.0")
    code, _, err = trt(folder, "--fp16", "--graphs", "unet", device=device)
    assert code == 0, err
    assert asked == [{"to": "fp16", "keep": ("LocalLambda",)}]
    assert read_passport(engines(folder)).flags["plugins"] == "on"


def test_the_file_itself_is_left_alone(kept):
    path = kept / "unet/model_fp16.onnx"
    before = path.read_bytes()
    count, content = plugged.named(path)
    assert path.read_bytes() == before
    model = onnx.load_model_from_string(content)
    assert count == sum(node.op_type == "LocalLambda" for node in model.graph.node) == 6
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(BundleError, match="not an ONNX file"):
        plugged.named(path)
