"""The arithmetic of products in bytes, against the same in float64."""

import numpy as np
import pytest

pytest.importorskip("onnx")
int8_arrays = pytest.importorskip("moebius_calibration.files.int8_arrays")

RNG = np.random.RandomState(0)


def quantized(x, limits, factors):
    """What a kernel makes of x [tokens, channels]."""
    inverse, zero = int8_arrays.quantizer(limits, x.shape[1], factors)
    return np.clip(np.round(x * inverse + zero), 0, 255)


@pytest.mark.parametrize("limits", [(-3.0, 5.0), (0.0, 4.0), (0.5, 4.0), (-4.0, -1.0), (0.0, 0.0)])
def test_zero_is_exact(limits):
    """So that padding is, and a ReLU's zeros are."""
    inverse, zero = int8_arrays.quantizer(limits, 3, None)
    assert np.array_equal(np.round(0 * inverse + zero), zero)
    assert np.all((zero >= 0) & (zero <= 255) & (zero == np.round(zero)))


@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("limits", [(-4.0, 4.0), (-1.0, 4.0)])
def test_a_product_is_the_float_product_of_what_the_numbers_stand_for(limits, smoothed):
    """Exactly: scale and offset hold whatever zero points, bias and factors add."""
    channels, outputs = 12, 5
    matrix, bias = RNG.standard_normal((outputs, channels)), RNG.standard_normal(outputs)
    factors = RNG.uniform(0.5, 2, channels) if smoothed else None
    x = np.clip(RNG.standard_normal((50, channels)), *limits)
    made = int8_arrays.int8_product(matrix.astype(np.float32), bias.astype(np.float32), limits, factors)
    numbers = quantized(x, limits, factors)
    got = numbers @ made.weight.T.astype(np.float64) * made.scale + made.offset
    step, zero = int8_arrays.step_of(limits)
    ones = np.ones(channels) if factors is None else factors
    values = (numbers - zero) * step * ones
    weights = made.weight * (made.scale / step)[:, None] / ones
    expected = values @ weights.T + bias
    assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max()
    # 255 levels of values and 254 of weights: one product in a hundred, and a clipped value is not the reason.
    error = np.linalg.norm(got - (x @ matrix.T + bias)) / np.linalg.norm(x @ matrix.T)
    assert 1e-3 < error < 2e-2


def test_factors_help_where_channels_differ():
    """A channel a hundred times as large leaves the others few levels, unless a factor makes them alike."""
    matrix = RNG.standard_normal((8, 16)).astype(np.float32)
    worth = np.where(np.arange(16) == 3, 100.0, 1.0)
    matrix[:, 3] /= 100
    x = np.clip(RNG.standard_normal((100, 16)), -3, 3) * worth

    def error(limits, factors):
        made = int8_arrays.int8_product(matrix, None, limits, factors)
        got = quantized(x, limits, factors) @ made.weight.T.astype(np.float64) * made.scale + made.offset
        return np.linalg.norm(got - x @ matrix.T) / np.linalg.norm(x @ matrix.T)

    assert error((-3.0, 3.0), worth) < 0.02 < 0.3 < error((-300.0, 300.0), None)


def test_rows_of_zeros_and_columns_that_fill_no_panel():
    matrix = np.zeros((3, 8), np.float32)
    matrix[1] = 2
    made = int8_arrays.int8_product(matrix, None, (-1.0, 1.0), None)
    assert np.array_equal(made.weight, np.array([[0] * 8, [127] * 8, [0] * 8]))
    assert np.isfinite(made.scale).all()
    packed = int8_arrays.packed(made.weight)
    assert packed.shape == (1, 2, 16, 4)
    assert np.array_equal(packed.transpose(0, 2, 1, 3).reshape(16, 8)[:3], made.weight)
    assert not packed.transpose(0, 2, 1, 3).reshape(16, 8)[3:].any()


def test_merged_kernels_are_the_convolution_of_the_enlarged_picture():
    weight, x = RNG.standard_normal((2, 3, 3, 3)), RNG.standard_normal((3, 4, 5))
    large = np.pad(x.repeat(2, 1).repeat(2, 2), ((0, 0), (1, 1), (1, 1)))
    small = np.pad(x, ((0, 0), (1, 1), (1, 1)))
    kernels = int8_arrays.merged_kernels(weight)
    for row in range(8):
        for column in range(10):
            expected = np.einsum("oiyx,iyx->o", weight, large[:, row : row + 3, column : column + 3])
            top, left = row // 2 + row % 2, column // 2 + column % 2
            place = kernels[2 * (row % 2) + column % 2]
            got = np.einsum("oiyx,iyx->o", place, small[:, top : top + 2, left : left + 2])
            assert np.allclose(got, expected)
