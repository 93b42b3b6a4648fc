"""The LocalLambda plugin: real PTX from Triton's compiler, and its functions under a stand-in for `tensorrt.plugin`."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

from moebius_export.errors import ExportError
from moebius_export.graph.functions import function_protos
from moebius_export.plugins import ptx as ptx_module
from moebius_export.plugins.local_lambda import PLUGIN_ID, enabled, name_plugins, register
from moebius_export.plugins.ptx import (
    PTX_VERSIONS,
    SHARED_LIMIT,
    compile_local_lambda,
    usable_tactics,
    without_hidden_parameters,
)

triton = pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux on x86-64 only)")

_spec = importlib.util.spec_from_file_location("fake_trt_plugin", Path(__file__).with_name("fake_trt_plugin.py"))
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)

SIZES = [((64, 64), 40), ((32, 32), 80), ((16, 16), 160)]  # of the released network, 8 heads, window 15


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory):
    """Triton keeps what it compiled; here in a folder of this run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize("sm", PTX_VERSIONS)
def test_ptx_of_every_architecture(sm):
    kernel = compile_local_lambda((16, 16), 8, 40, 15, "fp16", sm)
    assert re.search(rf"\.target sm_{sm}a?\b", kernel.ptx)
    assert f".version {PTX_VERSIONS[sm] // 10}.{PTX_VERSIONS[sm] % 10}\n" in kernel.ptx
    entry = re.search(rf"\.visible \.entry {kernel.name}\(([^)]*)\)", kernel.ptx)
    assert entry[1].count(".param") == 5  # query, values, summary, window, output
    assert "mma" in kernel.ptx  # the tensor cores
    assert kernel.threads in (128, 256)
    assert 0 < kernel.shared <= SHARED_LIMIT


@pytest.mark.parametrize(
    ("size", "depth"), [SIZES[0], *(pytest.param(*one, marks=pytest.mark.slow) for one in SIZES[1:])]
)
def test_an_assembler_takes_it(size, depth, tmp_path):
    """NVIDIA's ptxas, which comes with Triton: registers are enough, so that nothing is spilled to memory."""
    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    if not assembler.exists():
        pytest.skip("this Triton brings no ptxas")
    usable = usable_tactics(size, 8, depth, 15, "fp16", 86)
    assert len(usable) >= 2
    for tactic in usable:
        kernel = compile_local_lambda(size, 8, depth, 15, "fp16", 86, tactic)
        source = tmp_path / f"{tactic}.ptx"
        source.write_text(kernel.ptx)
        command = [str(assembler), "-v", "-arch=sm_86", str(source), "-o", str(tmp_path / "out.cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "0 bytes spill stores" in done.stderr


def test_float32_and_bfloat16_compile():
    kernels = {kind: compile_local_lambda((8, 8), 8, 16, 15, kind, 86) for kind in ("fp32", "bf16")}
    assert "fma.rn.f32" in kernels["fp32"].ptx  # float32 stays float32: no TF32
    assert ".bf16" in kernels["bf16"].ptx


def test_refusals_of_the_compiler(monkeypatch):
    with pytest.raises(ExportError, match=r"tactic 9 of LocalLambda: expected 1 to \d"):
        compile_local_lambda((8, 8), 8, 16, 15, "fp16", 86, 9)
    with pytest.raises(ExportError, match=r"SM 75: LocalLambda as a plugin is compiled for 80, 86"):
        compile_local_lambda((8, 8), 8, 16, 15, "fp16", 75)
    with pytest.raises(ExportError, match=r"LocalLambda of 'int8': expected one of fp32, fp16, bf16"):
        compile_local_lambda((8, 8), 8, 16, 15, "int8", 86)
    monkeypatch.setattr(ptx_module, "SHARED_LIMIT", 100)
    with pytest.raises(ExportError, match="every tiling takes more than 100 bytes of shared memory"):
        usable_tactics((8, 8), 8, 16, 15, "fp16", 86)


PTX = ".visible .entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1,\n\t.param .u64 k_param_2\n)\n{ body }\n"


def test_hidden_parameters_are_cut():
    assert without_hidden_parameters(PTX, "k", 1) == ".visible .entry k(\n\t.param .u64 k_param_0\n)\n{ body }\n"
    assert without_hidden_parameters(PTX, "k", 3).count(".param") == 3


@pytest.mark.parametrize(
    ("text", "wanted", "words"),
    [
        (PTX.replace("body", "ld.param.u64 %rd1, [k_param_2];"), 1, "reads its hidden parameters k_param_2"),
        (PTX, 0, "has 3 parameters, expected 0 and up to 2"),
        (PTX, 4, "has 3 parameters, expected 4"),
        (PTX.replace("k(", "other("), 1, "has no entry k"),
    ],
)
def test_other_ptx_is_refused(text, wanted, words):
    with pytest.raises(ExportError, match=words):
        without_hidden_parameters(text, "k", wanted)


def node_shapes(positions, heads, depth, window):
    return {
        "query": (-1, positions, heads * depth),
        "values": (-1, positions, depth),
        "summary": (-1, depth, depth),
        "window": (depth, window, window),
    }


@pytest.mark.parametrize("dtype", ["FP32", "FP16"])
def test_an_engine_is_built_with_it(dtype):
    trt, trtp = fake.module("11.4.1")
    register(trt, trtp, 86)
    attributes = {"heads": 4, "size": np.array([6, 20])}
    output, kernels = fake.build(trtp, PLUGIN_ID, node_shapes(120, 4, 8, 15), dtype, attributes)
    assert (output.shape, output.dtype) == ((-1, 120, 32), dtype)
    assert len(kernels) >= 3
    for tactic, (name, code, launch, extra) in kernels.items():
        kernel = compile_local_lambda((6, 20), 4, 8, 15, {"FP32": "fp32", "FP16": "fp16"}[dtype], 86, tactic)
        assert (name, code) == (kernel.name, kernel.ptx)
        assert (launch.grid_x, launch.grid_y) == kernel.grid
        assert launch.grid_z.words == "query[0]"
        assert (launch.block_x, launch.block_y, launch.shared_mem) == (kernel.threads, 1, kernel.shared)
        assert launch.grid_x in (6 * 2, 6 * 10)  # rows times tiles of 16 or 2
        assert extra.exprs == []


def test_registration_is_once_per_process():
    trt, trtp = fake.module()
    register(trt, trtp, 86)
    register(trt, trtp, 86)
    with pytest.raises(ExportError, match=r"registered for SM 86 in this process; build for SM 89 in a new one"):
        register(trt, trtp, 89)


@pytest.mark.parametrize("version", ["10.3.0", "10.8.0"])
def test_older_tensorrt_is_refused(version):
    with pytest.raises(ExportError, match=rf"TensorRT {version} has no ahead-of-time plugins; expected 10.9 or newer"):
        register(*fake.module(version), 87)


def test_other_types_are_refused():
    trt, trtp = fake.module()
    register(trt, trtp, 86)
    with pytest.raises(ExportError, match="LocalLambda of BF16: the plugin takes float32 and float16"):
        fake.build(trtp, PLUGIN_ID, node_shapes(16, 4, 8, 3), "BF16", {"heads": 4, "size": np.array([4, 4])})


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("1", True)])
def test_the_switch(monkeypatch, value, expected):
    monkeypatch.delenv("MOEBIUS_TRT_PLUGIN", raising=False)
    if value is not None:
        monkeypatch.setenv("MOEBIUS_TRT_PLUGIN", value)
    assert enabled() is expected


def test_the_switch_takes_no_other_words(monkeypatch):
    monkeypatch.setenv("MOEBIUS_TRT_PLUGIN", "yes")
    with pytest.raises(ExportError, match="MOEBIUS_TRT_PLUGIN is 'yes'; expected 1"):
        enabled()


def model_of(form):
    proto = function_protos(form)["LocalLambda"]
    node = onnx.helper.make_node("LocalLambda", list(proto.input), ["y"], name="n", domain="moebius", heads=4)
    graph = onnx.helper.make_graph([node], "g", [], [])
    return onnx.helper.make_model(graph, functions=[proto])


def test_nodes_name_their_plugin():
    model = model_of("convolution")
    assert [name_plugins(model), name_plugins(model)] == [1, 1]  # twice is once
    [node] = model.graph.node
    values = [onnx.helper.get_attribute_value(a) for a in node.attribute if a.name == "plugin_namespace"]
    assert values == [node.domain.encode()] == [PLUGIN_ID.partition("::")[0].encode()]
    assert not model.functions  # a parser that does not find the plugin has nothing else to run


def test_the_layout_with_tables_is_refused():
    with pytest.raises(ExportError, match=r"node 'n': LocalLambda with 6 inputs; the plugin takes the 4 of the layout"):
        name_plugins(model_of("tiles"))


def test_the_plugin_needs_no_torch():
    """`moebius-export trt` runs on a device, where TensorRT and perhaps Triton are, and PyTorch is not."""
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import moebius_export.plugins.local_lambda\n"
        "from moebius_export.plugins.ptx import compile_local_lambda\n"
        "print(compile_local_lambda((4, 4), 4, 8, 3, 'fp16', 89).name)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "local_lambda_kernel", done.stderr
