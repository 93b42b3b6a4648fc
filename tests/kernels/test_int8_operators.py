"""The compiled kernels in bytes against the functions that define their operators, for every instruction set."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime import kernels

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SCRIPT = Path(__file__).with_name("int8_operators.py")
_spec = importlib.util.spec_from_file_location("int8_operators", SCRIPT)
int8 = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(int8)

if not kernels.library_path():
    pytest.skip(f"compiled kernels: {kernels.in_words()}", allow_module_level=True)

# Sums of whole numbers are exact; what is around them is rounded as in float32: 4e-7 at most was measured. Where the
# two differ in a last bit before they round, one number in thousands goes the other way: up to 1e-4 of a small case.
TOLERANCE = 1e-6
FLIPPED = 3e-4
FLIPS = ("ff odd", "ff wide", "ff network", "rb odd", "rb wide", "rb network", "prb odd", "prb wide", "prb network")
NORMS = ("normed odd", "normed network", "of picture wide", "of picture network", "norm conv odd", "norm conv VAE")
MAY_FLIP = (*FLIPS, *NORMS, "norm ff odd", "norm ff network")


@pytest.mark.parametrize("variant", kernels.VARIANTS)
def test_every_variant_is_its_function(variant):
    done = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env=os.environ | {kernels.SWITCH: variant},
        capture_output=True,
        text=True,
        timeout=120,
    )
    if variant != "generic" and f"this CPU has no {variant}" in done.stderr:
        pytest.skip(f"this CPU has no {variant}")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["variant"] == variant
    assert set(found["errors"]) == set(int8.CASES)
    limits = {name: FLIPPED if name in MAY_FLIP else TOLERANCE for name in int8.CASES}
    assert {name: error for name, error in found["errors"].items() if not error < limits[name]} == {}
    assert sum(error > TOLERANCE for error in found["errors"].values()) <= 5
    assert len(found["differences"]) == len(int8.EXACT) * len(int8.PATTERNS)
    assert {name: count for name, count in found["differences"].items() if count} == {}


def test_the_patterns_show_saturation():
    """Else the bit-exact comparison above would pass with `vpmaddubsw`, which adds pairs within 16 bits."""
    for pattern in int8.PATTERNS:
        rows, weight = int8.whole_numbers(pattern, 1, (5, 68), 7, 68)
        exact = rows.astype(np.int64) @ weight.T.astype(np.int64)
        differ = (int8.saturated(rows, weight) != exact).any()
        assert differ == (pattern != "every second"), pattern


def test_the_largest_sums_do_not_overflow_or_saturate():
    """255 times -128 in every place: pairs of such products leave 16 bits, which some instructions saturate at."""
    operator, attributes, inputs = int8.CASES["linear network"]
    one, zero = np.ones(320, np.float32), np.zeros(320, np.float32)
    inputs = inputs | {"x": np.full_like(inputs["x"], 300), "x_inverse": one, "x_zero": zero}
    inputs |= {"weight": np.full_like(inputs["weight"], -128)}
    inputs |= {"weight_scale": np.ones(400, np.float32), "weight_offset": np.zeros(400, np.float32)}
    got = int8.operators.session(int8.model(operator, attributes, inputs)).run(None, inputs)[0]
    assert np.all(got == -255 * 128 * 320)


@pytest.mark.parametrize("case", ["linear network", "picture network", "ff network", "prb network", "up network"])
def test_results_do_not_depend_on_the_number_of_threads(case):
    operator, attributes, inputs = int8.CASES[case]
    made = int8.model(operator, attributes, inputs)
    one, two, five = (int8.operators.session(made, threads=n).run(None, inputs)[0] for n in (1, 2, 5))
    assert np.array_equal(one, two)
    assert np.array_equal(one, five)


FLOAT, INT8 = np.float32, np.int8
WRONG = {
    "x of rank 1": ("linear odd", {"x": ((20,), FLOAT)}, r"x is \[20\]; expected \[batch, tokens, channels\]"),
    "channels in no fours": ("linear odd", {"x": ((2, 13, 18), FLOAT)}, r"x_inverse is \[20\]; expected \[18\]"),
    "weights not packed": ("linear odd", {"weight": ((37, 20), INT8)}, r"weight is .*; expected \[3, 5, 16, 4\]"),
    "too few weights": ("linear odd", {"weight": ((2, 5, 16, 4), INT8)}, r"weight is .*; expected \[3, 5, 16, 4\]"),
    "offsets": ("linear odd", {"weight_offset": ((36,), FLOAT)}, r"weight_offset is \[36\]; expected \[37\]"),
    "no scales": ("linear odd", {"weight_scale": ((0,), FLOAT)}, r"weight_scale is \[0\]; expected \[outputs\]"),
    "rows": ("picture odd", {"x": ((13, 20), FLOAT)}, r"x is \[13, 20\]; expected \[batch, tokens, channels\]"),
    "zeros": ("picture odd", {"x_zero": ((1,), FLOAT)}, r"x_zero is \[1\]; expected \[20\]"),
    "packed for a picture": ("picture odd", {"weight": ((3, 5, 16, 4), INT8)}, r"weight is .*; expected \[37, 20\]"),
    "expanded": ("ff odd", {"expand_scale": ((80,), FLOAT)}, r"expand_scale is \[80\]; .* a multiple of 32"),
    "gated": ("ff odd", {"gated_inverse": ((160,), FLOAT)}, r"gated_inverse is \[160\]; expected \[80\]"),
    "project": ("ff odd", {"project": ((2, 5, 16, 4), INT8)}, r"project is .*; expected \[2, 20, 16, 4\]"),
    "gain": ("normed odd", {"gain": ((19,), FLOAT)}, r"gain is \[19\]; expected \[20\]"),
    "shift": ("norm ff odd", {"shift": ((1,), FLOAT)}, r"shift is \[1\]; expected \[24\]"),
    "gain of a convolution": ("norm conv odd", {"gain": ((3,), FLOAT)}, r"gain is \[3\]; expected \[12\]"),
    "another picture": (
        "added odd",
        {"skip": ((3, 37, 7, 6), FLOAT)},
        r"skip is .*; expected \[batch, outputs, height",
    ),
    "a picture of rank 3": (
        "added odd",
        {"skip": ((3, 37, 35), FLOAT)},
        r"skip is .*; expected \[batch, outputs, height",
    ),
    "tokens": ("of picture odd", {"x": ((2, 35, 12), FLOAT)}, r"x is \[2, 35, 12\]; expected \[batch, inputs"),
    "a picture's groups": ("of picture odd", {"x": ((2, 16, 5, 7), FLOAT)}, r"groups is 3; expected a divisor of 16$"),
    "no taps": ("pointwise odd", {"weight": ((17, 12, 3, 3), INT8)}, r"weight is .*; expected \[17, 12, 1, 1\]"),
    "one row": ("down below odd", {"x": ((2, 12, 1, 7), FLOAT)}, r"x is .*; expected a height and width of 2 or more"),
    "pixels": ("ff odd", {"x": ((2, 36, 24), FLOAT)}, r"x is \[2, 36, 24\]; expected \[batch, height\*width"),
    "first weight": ("rb odd", {"first_pointwise": ((24, 24), INT8)}, r"first_pointwise is .*\[24, 24, 1, 1\]"),
    "second zero": ("rb odd", {"second_zero": ((20,), FLOAT)}, r"second_zero is \[20\]; expected \[24\]"),
    "shortcut": ("prb odd", {"shortcut": ((24, 36, 1, 1), INT8)}, r"shortcut is .*; expected \[36, 24, 1, 1\]"),
    "shortcut scale": ("prb odd", {"shortcut_scale": ((24,), FLOAT)}, r"shortcut_scale is \[24\]; expected \[36\]"),
    "picture of rank 3": ("down odd", {"x": ((12, 5, 7), FLOAT)}, r"x is \[12, 5, 7\]; expected \[batch, inputs"),
    "taps last": ("down odd", {"weight": ((17, 12, 3, 3), INT8)}, r"weight is .*; expected \[17, 3, 3, 12\]"),
    "one place": ("up odd", {"weight_scale": ((1, 17), FLOAT)}, r"weight_scale is \[1, 17\]; expected \[4, outputs\]"),
    "places": ("up odd", {"weight": ((17, 4, 2, 2, 12), INT8)}, r"weight is .*; expected \[4, 17, 2, 2, 12\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    """Models that no rewrite makes: a message, not a read beyond the end."""
    case, shapes, words = WRONG[name]
    operator, attributes, inputs = int8.CASES[case]
    inputs = inputs | {name: np.ones(shape, kind) for name, (shape, kind) in shapes.items()}
    session = int8.operators.session(int8.model(operator, attributes, inputs, body=False, shapes=False))
    with pytest.raises(Exception, match=f"moebius::{operator}: {words}"):
        session.run(None, inputs)


def test_channels_come_in_fours():
    operator, attributes, inputs = int8.CASES["linear 1"]
    inputs = inputs | {"x": np.ones((1, 1, 6), FLOAT), "x_inverse": np.ones(6, FLOAT), "x_zero": np.ones(6, FLOAT)}
    session = int8.operators.session(int8.model(operator, attributes, inputs, body=False, shapes=False))
    with pytest.raises(Exception, match="weight's input channels is 6; expected a multiple of 4"):
        session.run(None, inputs)


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (int8.linear(0, 13, 20, 37), (0, 13, 37)),
        (int8.linear(2, 0, 20, 37, to_picture=True), (2, 37, 0)),
        (int8.feed_forward(0, 5, 7, 24, 160), (0, 35, 24)),
        (int8.residual_block(0, 5, 7, 24, 36, 3), (0, 36, 5, 7)),
        (int8.upsample(0, 5, 7, 12, 17), (0, 17, 10, 14)),
        (int8.downsample(0, 5, 7, 12, 17), (0, 17, 3, 4)),
        (int8.downsample_below(0, 5, 7, 12, 17), (0, 17, 2, 3)),
        (int8.norm_conv(0, 5, 7, 12, 17, 3), (0, 17, 5, 7)),
        (int8.pointwise(0, 5, 7, 12, 17), (0, 17, 5, 7)),
        (int8.linear_of_picture(0, 5, 7, 12, 17, 3), (0, 35, 17)),
        (int8.linear_added(0, 5, 7, 12, 17), (0, 17, 5, 7)),
        (int8.norm_linear(0, 13, 20, 37), (0, 13, 37)),
        (int8.norm_feed_forward(0, 5, 7, 24, 160), (0, 35, 24)),
    ],
)
def test_an_empty_batch_is_no_work(case, shape):
    operator, attributes, inputs = case
    inputs = int8.ordered(operator, inputs)
    session = int8.operators.session(int8.model(operator, attributes, inputs, body=False, shapes=False))
    assert session.run(None, inputs)[0].shape == shape


@pytest.mark.parametrize("case", [name for name in int8.CASES if name.endswith(" odd")])
def test_the_kernel_takes_the_node_whole(case, tmp_path):
    """Else every test above would compare the body with itself."""
    operator, attributes, inputs = int8.CASES[case]
    made = int8.model(operator, attributes, inputs)
    profile = {"enable_profiling": True, "profile_file_prefix": str(tmp_path / "profile")}
    ran = []
    for compiled in (True, False):
        session = int8.operators.session(made, compiled, **profile)
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
        ran.append([e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")])
    assert ran[0] == [operator]
    assert len(ran[1]) > 5
    assert operator not in ran[1]
