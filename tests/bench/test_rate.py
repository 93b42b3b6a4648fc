import pytest

from moebius_bench import rate
from moebius_bench.jobs import Job
from moebius_bench.wording import rate_line
from moebius_runtime.backends import ort_integer
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
    assert found.saturates == ort_integer.saturates()


def test_the_weights_of_the_rate_cannot_saturate():
    """Two products of bytes are added in 16 bits with sign where there is no VNNI."""
    assert 2 * 255 * ort_integer.EXACT_WEIGHT <= (1 << 15) - 1 < 2 * 255 * (ort_integer.EXACT_WEIGHT + 1)


@pytest.mark.parametrize("wrong", [False, True])
def test_a_library_that_saturates_is_found_and_reported(wrong, monkeypatch):
    """`wrong`: with the sums of `vpmaddubsw` in place of ONNX Runtime's."""
    np = pytest.importorskip("numpy")
    onnx = pytest.importorskip("onnx")
    onnx.checker.check_model(onnx.load_from_string(ort_integer.MODEL), full_check=True)

    class Session:
        def __init__(self, *_, **__):
            pass

        def run(self, _, inputs):
            pairs = inputs["a"].astype(np.int64)[:, :, None] * inputs["b"].astype(np.int64)  # [rows, depth, columns]
            pairs = pairs.reshape(len(pairs), -1, 2, pairs.shape[2]).sum(axis=2)  # [rows, depth / 2, columns]
            return [(np.clip(pairs, -(1 << 15), (1 << 15) - 1) if wrong else pairs).sum(axis=1)]

    monkeypatch.setattr(ort_integer.import_onnxruntime(), "InferenceSession", Session)
    assert ort_integer.saturates() is wrong
    monkeypatch.setattr(rate, "_ort_product", lambda runtime, threads, kind: ("library", lambda: None))
    found = rate.measure_rate(Job(kind="rate", runtime="ort-cpu", threads=1, precision="int8_cpu"))
    assert ("saturate at 16 bits on this CPU" in rate_line(found)) is wrong


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
    assert (a.max(), b.min(), b.max()) == (255, -64, 64)  # the full range of weights saturates without VNNI
    np.testing.assert_array_equal(multiply()[0][:4], a[:4].astype(np.int64) @ b.astype(np.int64))


def test_an_unknown_runtime_has_no_rate():
    with pytest.raises(InputError, match="not measured in this version"):
        rate.measure_rate(Job(kind="rate", runtime="tensorrt"))
