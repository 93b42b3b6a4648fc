import pytest

from moebius_bench import rate
from moebius_bench.jobs import Job
from moebius_runtime.errors import InputError


@pytest.mark.parametrize(
    ("content", "operator", "types"),
    [
        (rate.MATMUL, "MatMul", ("FLOAT", "FLOAT", "FLOAT")),
        (rate.MATMUL_OF_BYTES, "MatMulInteger", ("UINT8", "INT8", "INT32")),
    ],
)
def test_the_content_is_the_product_that_it_claims(content, operator, types):
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(content)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == (operator, ["a", "b"], ["c"])
    for value, kind in zip((*model.graph.input, *model.graph.output), types, strict=True):
        assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [rate.SIZE] * 2
        assert onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) == kind


def test_the_rate_is_size_cubed_over_time(monkeypatch):
    """With a product that takes 2 ms by a clock of our own."""
    clock = iter(range(1000))
    monkeypatch.setattr(rate.time, "perf_counter", lambda: next(clock) * 0.002)
    monkeypatch.setattr(rate, "_ort_product", lambda runtime, threads, kind: ("library", lambda: None))
    found = rate.measure_rate(Job(kind="rate", runtime="ort-cpu", threads=3))
    assert found.macs_per_second.median == pytest.approx(2048**3 / 0.002)
    assert (found.threads, found.size, found.library, found.kind) == (3, 2048, "library", "fp32")
    found = rate.measure_rate(Job(kind="rate", runtime="ort-cpu", threads=3, precision="int8_cpu"))
    assert found.kind == "bytes"


def test_onnx_runtime_really_multiplies():
    np = pytest.importorskip("numpy")
    library, multiply = rate._ort_product("ort-cpu", 1)
    a, b = rate._matrices()
    assert library.startswith("onnxruntime ")
    np.testing.assert_allclose(multiply()[0][:4], a[:4] @ b, rtol=1e-3, atol=1e-3)


def test_onnx_runtime_really_multiplies_bytes():
    np = pytest.importorskip("numpy")
    library, multiply = rate._ort_product("ort-cpu", 1, "bytes")
    a, b = rate._matrices("bytes")
    assert library.endswith(" MatMulInteger")
    assert (a.max(), b.min()) == (255, -127)
    np.testing.assert_array_equal(multiply()[0][:4], a[:4].astype(np.int64) @ b.astype(np.int64))


def test_an_unknown_runtime_has_no_rate():
    with pytest.raises(InputError, match="not measured in this version"):
        rate.measure_rate(Job(kind="rate", runtime="tensorrt"))
