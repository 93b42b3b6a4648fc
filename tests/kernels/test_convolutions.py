"""Winograd kernels of `Conv3x3`, `UpsampleConv3x3` against float64, at odd sizes, in every variant that this CPU runs.

The model's functions are the definitions: the same files run with and without the library.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="the models are built with onnx")
ort = pytest.importorskip("onnxruntime", reason="the kernels are ONNX Runtime's")
parser = pytest.importorskip("onnx.parser")

# Summing c channels in float32 and the transforms' own rounding: measured 2e-7 to 1.5e-6, most behind an enlargement.
TOLERANCE = 3e-6

CONV = """<opset_import: ["" : 20], domain: "moebius">
Conv3x3 (x, weight, bias) => (y) { y = Conv <pads = [1, 1, 1, 1]> (x, weight, bias) }"""

UPSAMPLE = """<opset_import: ["" : 20], domain: "moebius">
UpsampleConv3x3 (x, weight, bias) => (y) {
  scales = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()
  large = Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x, , scales)
  y = Conv <pads = [1, 1, 1, 1]> (large, weight, bias)
}"""

BODIES = {"Conv3x3": CONV, "UpsampleConv3x3": UPSAMPLE}

# batch, inputs, outputs, height, width
SIZES = [
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 9),  # neither side a multiple of a tile; a batch in one panel
    (1, 20, 17, 16, 16),
    (2, 33, 30, 13, 37),  # tiles of several rows in one register
    (1, 4, 64, 5, 130),  # a row of tiles wider than a panel
    (3, 8, 3, 2, 3),
    (1, 70, 29, 33, 66),
    (1, 512, 14, 6, 5),  # sums of several parts
    (2, 24, 100, 21, 75),
    (1, 700, 33, 61, 66),  # several strips, which end within a row of tiles
]


def _library() -> Path:
    """The built library, or a skip: kernels are optional."""
    if named := os.environ.get("MOEBIUS_TEST_KERNELS_LIBRARY"):
        return Path(named)
    try:
        found = importlib.import_module("moebius_runtime.kernels").library_path()
    except (ImportError, AttributeError):
        found = None
    if found is None:
        pytest.skip("this installation has no kernel library (it is built where there is a C++ compiler)")
    return Path(found)


def _model(name: str, shapes: list[list[object]]) -> bytes:
    """A model of one node whose inputs have these shapes (names are free sizes)."""
    values = [
        onnx.helper.make_tensor_value_info(value, onnx.TensorProto.FLOAT, shape)
        for value, shape in zip(["x", "weight", "bias", "y"], [*shapes, [None] * 4], strict=True)
    ]
    node = onnx.helper.make_node(name, ["x", "weight", "bias"], ["y"], domain="moebius")
    graph = onnx.helper.make_graph([node], "convolution", values[:3], values[3:])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("moebius", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    model.functions.append(parser.parse_function(BODIES[name]))
    return model.SerializeToString()


def _session(model: bytes, library: Path | None):
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _inputs(size: tuple[int, ...]) -> dict[str, np.ndarray]:
    batch, inputs, outputs, height, width = size
    rng = np.random.RandomState(sum(size))
    return {
        "x": rng.standard_normal((batch, inputs, height, width)).astype(np.float32),
        "weight": (rng.standard_normal((outputs, inputs, 3, 3)) / np.sqrt(9 * inputs)).astype(np.float32),
        "bias": rng.standard_normal(outputs).astype(np.float32),
    }


def _expected(name: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """In float64, tap by tap."""
    large = x.astype(np.float64)
    if name == "UpsampleConv3x3":
        large = large.repeat(2, axis=2).repeat(2, axis=3)
    height, width = large.shape[2:]
    padded = np.pad(large, ((0, 0), (0, 0), (1, 1), (1, 1)))
    y = np.zeros((len(x), len(weight), height, width)) + bias[:, None, None]
    for dy in range(3):
        for dx in range(3):
            window = padded[:, :, dy : dy + height, dx : dx + width]
            y += np.tensordot(weight[:, :, dy, dx].astype(np.float64), window, (1, 1)).transpose(1, 0, 2, 3)
    return y


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


FREE = [["b", "c", "h", "w"], ["o", "i", "kh", "kw"], ["n"]]


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_agrees_with_float64(name, size):
    inputs = _inputs(size)
    got = _session(_model(name, FREE), _library()).run(None, inputs)[0]
    assert got.dtype == np.float32
    assert _error(got, _expected(name, **inputs)) < TOLERANCE


@pytest.mark.parametrize("name", BODIES)
def test_the_body_is_the_same_without_the_library(name):
    inputs = _inputs((2, 3, 5, 7, 9))
    got = _session(_model(name, FREE), None).run(None, inputs)[0]
    assert _error(got, _expected(name, **inputs)) < 1e-6


@pytest.mark.parametrize("name", BODIES)
def test_a_border_is_zero_padding(name):
    """Of a picture of ones under a kernel of ones, each result is the number of pixels that it sees."""
    inputs = {
        "x": np.ones((1, 1, 5, 6), np.float32),
        "weight": np.ones((1, 1, 3, 3), np.float32),
        "bias": np.zeros(1, np.float32),
    }
    got = _session(_model(name, FREE), _library()).run(None, inputs)[0][0, 0]
    rows, columns = (np.array([2, *[3] * (count - 2), 2]) for count in got.shape)
    assert np.abs(got - np.outer(rows, columns)).max() < 1e-5  # sums of at most 9 ones through the transforms


@pytest.mark.parametrize("name", BODIES)
def test_pictures_of_a_batch_do_not_touch(name):
    """A picture gives the same numbers alone and beside one of NaN."""
    inputs = _inputs((2, 5, 6, 6, 7))
    session = _session(_model(name, FREE), _library())
    alone = session.run(None, inputs | {"x": inputs["x"][:1]})[0]
    inputs["x"][1] = np.nan
    both = session.run(None, inputs)[0]
    assert _error(both[:1], alone) < 1e-6
    assert np.isnan(both[1]).all()


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"weight": (4, 2, 3, 3)}, r"weight is \[4, 2, 3, 3\]; expected \[4, 3, 3, 3\]"),
        ({"weight": (4, 3, 3, 1)}, r"weight is \[4, 3, 3, 1\]; expected \[4, 3, 3, 3\]"),
        ({"weight": (0, 3, 3, 3)}, r"weight is \[0, 3, 3, 3\]; expected \[outputs, inputs, 3, 3\]"),
        ({"bias": (3,)}, r"bias is \[3\]; expected \[4\]"),
        ({"x": (1, 0, 5, 5)}, r"x is \[1, 0, 5, 5\]; expected \[batch, inputs, height, width\]"),
        ({"x": (0, 3, 5, 5)}, r"x is \[0, 3, 5, 5\]"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(name, changed, said):
    """By the kernel itself: the file's shapes are free, so nothing else has looked."""
    shapes = {"x": (1, 3, 5, 5), "weight": (4, 3, 3, 3), "bias": (4,)} | changed
    session = _session(_model(name, FREE), _library())
    with pytest.raises(Exception, match=f"moebius::{name}: {said}"):
        session.run(None, {key: np.zeros(shape, np.float32) for key, shape in shapes.items()})


VARIANT = """
import ctypes, json, sys
import numpy as np
import test_convolutions as tests
library = tests._library()
used = ctypes.CDLL(str(library)).moebius_kernels_variant
used.restype = ctypes.c_char_p
errors = {}
for name in tests.BODIES:
    session = tests._session(tests._model(name, tests.FREE), library)
    for size in tests.SIZES:
        inputs = tests._inputs(size)
        errors[f"{name} {size}"] = tests._error(session.run(None, inputs)[0], tests._expected(name, **inputs))
print(json.dumps([used().decode(), errors]))
"""


@pytest.mark.parametrize("variant", ["generic", "avx2", "avx512", "avx512vnni"])
def test_every_variant_agrees(variant):
    """Each in a process of its own: the library chooses once."""
    environment = os.environ | {"MOEBIUS_KERNELS": variant, "MOEBIUS_TEST_KERNELS_LIBRARY": str(_library())}
    done = subprocess.run(
        [sys.executable, "-c", VARIANT],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    used, errors = json.loads(done.stdout)
    if used != variant:
        pytest.skip(f"this CPU has no {variant}; {used} was used")
    assert max(errors.values()) < TOLERANCE, errors
