import pytest

from moebius_bench import rate
from moebius_bench.jobs import Job
from moebius_runtime.errors import InputError


def test_the_bytes_are_the_product_that_they_claim():
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(rate.MATMUL)
    onnx.checker.check_model(model, full_check=True)
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("MatMul", ["a", "b"], ["c"])
    for value in (*model.graph.input, *model.graph.output):
        assert [d.dim_value for d in value.type.tensor_type.shape.dim] == [rate.SIZE] * 2
        assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_the_rate_is_size_cubed_over_time(monkeypatch):
    """With a product that takes 2 ms by a clock of our own."""
    clock = iter(range(1000))
    monkeypatch.setattr(rate.time, "perf_counter", lambda: next(clock) * 0.002)
    monkeypatch.setattr(rate, "_ort_product", lambda runtime, threads: ("library", lambda: None))
    found = rate.measure_rate(Job(kind="rate", runtime="ort-cpu", threads=3))
    assert found.macs_per_second.median == pytest.approx(2048**3 / 0.002)
    assert (found.threads, found.size, found.library) == (3, 2048, "library")


def test_onnx_runtime_really_multiplies():
    np = pytest.importorskip("numpy")
    library, multiply = rate._ort_product("ort-cpu", 1)
    a, b = rate._matrices()
    assert library.startswith("onnxruntime ")
    np.testing.assert_allclose(multiply()[0][:4], a[:4] @ b, rtol=1e-3, atol=1e-3)


def test_an_unknown_runtime_has_no_rate():
    with pytest.raises(InputError, match="not measured in this version"):
        rate.measure_rate(Job(kind="rate", runtime="tensorrt"))
