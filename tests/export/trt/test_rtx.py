"""Real builds with TensorRT-RTX, which needs no GPU for them."""

from __future__ import annotations

import os
import signal
import sys

import numpy as np
import onnx
import pytest

from moebius_export.errors import ExportError
from moebius_export.precision import choose
from moebius_export.trt.builder import BuildError, Cancelled, EngineBuilder, ParseError
from moebius_export.trt.library import Library
from moebius_export.trt.monitor import Phases
from moebius_export.trt.options import BuildOptions, Tuning
from moebius_export.trt.prepare import ensure_precision
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.bundle.passport import ENGINES, Range, check_bundle, checked_engine, read_passport

module = pytest.importorskip("tensorrt_rtx", reason="the wheel tensorrt-rtx is not installed (extra trt-rtx)")


@pytest.fixture
def builder():
    return EngineBuilder(Library("tensorrt-rtx", module))


def test_the_bundle_builds_for_three_generations(bundle, trt):
    code, out, err = trt(bundle, "--fp32", "--backend", "tensorrt-rtx", "--sm", "86,89,120")
    assert code == 0, err
    [folder] = (bundle / ENGINES).iterdir()
    assert folder.name == f"sm86+89+120-tensorrt-rtx{module.__version__}-fp32"
    passport = read_passport(folder)
    check_bundle(folder, passport, read_manifest(bundle))
    assert list(passport.engines) == ["unet", "vae_encoder", "vae_decoder"]
    for graph, engine in passport.engines.items():
        assert len(checked_engine(folder, passport, graph)) > 100_000
        assert engine.device_memory  # the builder states it, see Messages
    assert "running, all loaded" in out
    assert "unknown: no GPU here" in out


@pytest.mark.slow
def test_a_bundle_without_fp16_files_is_typed_first(bundle, trt, monkeypatch):
    """`--fp16` is all that it takes, and nothing is searched; the passport names the FP16 files and their plans."""

    def refuse(*args, **keywords):
        raise AssertionError("a search was begun")

    monkeypatch.setattr(choose.Chooser, "__init__", refuse)
    code, _, err = trt(bundle, "--fp16", "--backend", "tensorrt-rtx", "--sm", "89")
    assert code == 0, err
    assert "trt: precision plan, weights of unet (" in err  # lines, as there is no terminal
    assert "trt: vae_decoder: " in err
    assert "no shipped precision plan for this network" in err
    [folder] = (bundle / ENGINES).iterdir()
    passport, manifest = read_passport(folder), read_manifest(bundle)
    check_bundle(folder, passport, manifest)
    for graph, engine in passport.engines.items():
        file = manifest.graphs[graph].files["fp16"]
        assert engine.plan_sha256 == manifest.files[file.plan].sha256
        assert "fp32" in manifest.graphs[graph].files


def test_other_precisions_are_not_made_up(bundle):
    with pytest.raises(ExportError, match=r"no int8 file of unet, vae_encoder, vae_decoder\. They are calibrated"):
        ensure_precision(Bundle.open(bundle), BuildOptions("int8"), lambda graph, stage: None)


def test_where_nothing_can_be_typed_the_command_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "moebius_export.precision.quick", None)
    with pytest.raises(ExportError, match=r"moebius-export precision .* --to fp16"):
        ensure_precision(Bundle.open(bundle), BuildOptions("fp16"), lambda graph, stage: None)


def convolution(tmp_path, batch="batch"):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [batch, 4, 8, 8])],
        [value("y", onnx.TensorProto.FLOAT, [batch, 4, 6, 6])],
        [onnx.numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w")],
    )
    path = tmp_path / "m.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def test_an_open_batch_builds_with_a_profile_and_not_without(tmp_path, builder):
    path = convolution(tmp_path)
    shapes = {"x": Range(min=[1, 4, 8, 8], opt=[2, 4, 8, 8], max=[4, 4, 8, 8])}
    seen = []
    phases = Phases(lambda phase, share: seen.append((phase, share)))
    engine = builder.build(builder.parse(path), Tuning(), [86, 120], shapes, phases, None)
    assert memoryview(engine).nbytes > 1000
    assert seen
    with pytest.raises(BuildError, match="optimization profile"):
        builder.build(builder.parse(path), Tuning(), [86], {}, Phases(lambda phase, share: None), None)


def test_a_build_is_ended_by_its_monitor(tmp_path, builder):
    phases = Phases(lambda phase, share: phases.stop())
    with pytest.raises(Cancelled):
        builder.build(builder.parse(convolution(tmp_path, 1)), Tuning(), [86], {}, phases, None)


def test_what_the_parser_does_not_know_is_named(tmp_path, builder):
    path = convolution(tmp_path, 1)
    model = onnx.load(path)
    model.graph.node[0].op_type, model.graph.node[0].domain, model.graph.node[0].name = "LocalLambda", "moebius", "here"
    model.opset_import.append(onnx.helper.make_opsetid("moebius", 1))
    onnx.save(model, path)
    with pytest.raises(ParseError) as raised:
        builder.parse(path)
    assert raised.value.problems
    assert all(str(path) in problem for problem in raised.value.problems)
    assert any("node here (LocalLambda)" in problem for problem in raised.value.problems)


def test_a_version_compatible_engine_fails_as_the_refusal_says(tmp_path, builder):
    """Why the command refuses it for RTX."""
    with pytest.raises(BuildError, match="libnvinfer_lean"):
        builder.build(
            builder.parse(convolution(tmp_path, 1)),
            Tuning(version_compatible=True),
            [86],
            {},
            Phases(lambda phase, share: None),
            None,
        )


def test_ctrl_c_in_a_real_build_leaves_nothing(bundle, trt, monkeypatch):
    from moebius_export.trt import monitor

    step = monitor.Phases.step
    killed = []

    def interrupting(self, phase, number):
        if not killed and phase != "Building engine":
            killed.append(phase)
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, phase, number)

    monkeypatch.setattr(monitor.Phases, "step", interrupting)
    code, _, err = trt(bundle, "--fp32", "--backend", "tensorrt-rtx", "--sm", "86")
    assert code == 130
    assert killed
    assert "interrupted" in err
    assert list((bundle / ENGINES).iterdir()) == []
