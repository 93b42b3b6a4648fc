"""Bytes of INT8 and FP8: what as_bytes makes, against the definition of E4M3 and against ONNX Runtime."""

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from moebius_calibration.ranges.formats import FP8, INT8, activation_scale, as_bytes, weight_scales


def e4m3_numbers():
    """All finite numbers of E4M3 from its definition: bias 7, 3 bits of mantissa, no infinity, one NaN a sign."""
    found = []
    for exponent in range(16):
        for mantissa in range(8):
            if (exponent, mantissa) != (15, 7):
                found.append(2.0**-6 * mantissa / 8 if exponent == 0 else 2.0 ** (exponent - 7) * (1 + mantissa / 8))
    return np.array(found)


def nearest(value):
    """The slow way: the nearest of all numbers, of two the one whose last bit is 0; beyond the largest, that."""
    numbers = e4m3_numbers()
    distances = np.abs(numbers - abs(value))
    best = np.flatnonzero(distances == distances.min())
    index = best[0] if len(best) == 1 or best[0] % 2 == 0 else best[1]
    return float(np.copysign(numbers[index], value))


def values():
    numbers = e4m3_numbers()
    middles = (numbers[1:] + numbers[:-1]) / 2
    some = np.random.RandomState(0).standard_normal(300) * 100
    both = np.concatenate([numbers, middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9), some, [460, 1e9]])
    return np.concatenate([both, -both]).astype(np.float32)


def test_e4m3_is_rounded_as_defined():
    found = as_bytes(values(), np.float32(1), None, FP8)
    assert found.dtype == ml_dtypes.float8_e4m3fn
    assert e4m3_numbers()[-1] == FP8.largest == 448
    np.testing.assert_array_equal(found.astype(np.float64), [nearest(float(value)) for value in values()])


def test_onnx_runtime_rounds_e4m3_alike():
    """The search simulates with it."""
    import onnxruntime as ort

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    scale, zero = numpy_helper.from_array(np.array(0.5, np.float32), "s"), numpy_helper.from_array(FP8.zero, "z")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n"]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [scale, zero])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = ort.InferenceSession(model.SerializeToString()).run(None, {"x": values()})[0]
    expected = as_bytes(values(), np.float32(0.5), None, FP8).astype(np.float32) * 0.5
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("number_format", "largest"), [(INT8, 127), (FP8, 448)])
def test_the_largest_value_becomes_the_largest_number(number_format, largest):
    weight = np.array([[0.5, -2.0], [0.0, 0.0], [3.0, 0.1]], np.float32)
    scales = weight_scales(weight, 0, number_format)
    np.testing.assert_allclose(scales, [2 / largest, 1e-12, 3 / largest], rtol=1e-6)
    numbers = as_bytes(weight, scales, 0, number_format).astype(np.float32)
    assert (numbers[0, 1], numbers[2, 0], numbers[1, 0]) == (-largest, largest, 0)
    assert activation_scale(-1.0, 4.0, number_format) == pytest.approx(4 / largest)
