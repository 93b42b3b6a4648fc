"""The compiled kernels against the functions that define their operators, for every instruction set of this CPU."""

import gc
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime import kernels

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SCRIPT = Path(__file__).with_name("operators.py")
_spec = importlib.util.spec_from_file_location("operators", SCRIPT)
operators = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(operators)

if not kernels.library_path():
    # tests/runtime/test_kernels.py fails where it should have been built
    pytest.skip(f"compiled kernels: {kernels.in_words()}", allow_module_level=True)

# Sums of up to 3,000 float32 products in another order: 4e-7 at most was measured. One tap of a window too many or too
# few, or an epsilon of the norm that is off by ten, costs 1e-5 and more. (Of a norm over a single value nothing is left
# but its rounding, so there is no such case.)
TOLERANCE = 1e-6


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
    assert set(found["errors"]) == set(operators.CASES)
    assert {name: error for name, error in found["errors"].items() if not error < TOLERANCE} == {}


@pytest.mark.parametrize("case", ["ff network", "rb network", "prb network", "λ network"])
def test_results_do_not_depend_on_the_number_of_threads(case):
    operator, attributes, inputs = operators.CASES[case]
    made = operators.model(operator, attributes, inputs)
    one, two, five = (operators.session(made, threads=n).run(None, inputs)[0] for n in (1, 2, 5))
    assert np.array_equal(one, two)
    assert np.array_equal(one, five)


def test_sessions_in_threads_do_not_disturb_each_other():
    """Sessions, each run from two threads at once, while others come and go: they share scratch memory."""
    cases = [operators.CASES[name] for name in ("ff network", "prb network", "λ network")]
    sessions = [operators.session(operators.model(*case)) for case in cases]
    expected = [session.run(None, case[2])[0] for session, case in zip(sessions, cases, strict=True)]

    def work(index):
        for _ in range(10):
            got = sessions[index % 3].run(None, cases[index % 3][2])[0]
            assert np.array_equal(got, expected[index % 3])
            passing = operators.session(operators.model(*operators.CASES["ff odd"]))
            passing.run(None, operators.CASES["ff odd"][2])

    with ThreadPoolExecutor(6) as threads:
        list(threads.map(work, range(6)))
    sessions.clear()
    gc.collect()
    session = operators.session(operators.model(*cases[0]))  # after the last kernel of before went
    assert np.array_equal(session.run(None, cases[0][2])[0], expected[0])


BLOCKS = (("block", "rb odd"), ("projected block", "prb odd"))
# Those of a block of 24 channels in 3 groups, x [2, 24, 5, 7].
WRONG_BLOCK = {
    "x of rank 3": ({"x": (2, 24, 35)}, {}, r"x is \[2, 24, 35\]; expected \[batch, inputs, height, width\]"),
    "x of no channels": ({"x": (2, 0, 5, 7)}, {}, r"x is \[2, 0, 5, 7\]"),
    "x of no height": ({"x": (2, 24, 0, 7)}, {}, r"x is \[2, 24, 0, 7\]"),
    "x of no width": ({"x": (2, 24, 5, 0)}, {}, r"x is \[2, 24, 5, 0\]"),
    "time of three rows": ({"time": (3, 24)}, {}, r"time is \[3, 24\]; expected \[1 or batch, "),
    "time of no rows": ({"time": (0, 24)}, {}, r"time is \[0, 24\]"),
    "time of no channels": ({"time": (1, 0)}, {}, r"time is \[1, 0\]"),
    "time of rank 1": ({"time": (24,)}, {}, r"time is \[24\]"),
    "no groups": ({}, {"groups": None}, "groups is 0; expected a divisor of 24"),
    "0 groups": ({}, {"groups": 0}, "groups is 0"),
    "groups below 0": ({}, {"groups": -3}, "groups is -3"),
    "groups that do not divide": ({}, {"groups": 5}, "groups is 5; expected a divisor of 24"),
    "far too many groups": ({}, {"groups": 2**63 - 1}, f"groups is {2**63 - 1}"),
    "as few groups as there are": ({}, {"groups": -(2**63)}, f"groups is {-(2**63)}"),
    "no epsilon": ({}, {"epsilon": None}, "epsilon is -1.000000 or missing; expected 0 or more"),
    "epsilon below 0": ({}, {"epsilon": -1e-5}, "epsilon is -0.000010"),
    "epsilon that is no number": ({}, {"epsilon": float("nan")}, "epsilon is -?nan"),
    "first_gain": ({"first_gain": (25,)}, {}, r"first_gain is \[25\]; expected \[24\]"),
    "first_gain as a scalar": ({"first_gain": ()}, {}, r"first_gain is \[\]; expected \[24\]"),
    "first_shift": ({"first_shift": (1, 24)}, {}, r"first_shift is \[1, 24\]; expected \[24\]"),
    "first_depthwise": ({"first_depthwise": (24, 1, 5, 5)}, {}, r"first_depthwise is .*; expected \[24, 1, 3, 3\]"),
    "first_depthwise_bias": ({"first_depthwise_bias": (23,)}, {}, r"first_depthwise_bias is \[23\]; expected \[24\]"),
    "first_pointwise": ({"first_pointwise": (9, 24, 1, 1)}, {}, r"first_pointwise is .*; .*, 24, 1, 1\]"),
    "first_pointwise_bias": ({"first_pointwise_bias": (9,)}, {}, r"first_pointwise_bias is \[9\]; expected"),
    "second_gain": ({"second_gain": (9,)}, {}, r"second_gain is \[9\]; expected"),
    "second_shift": ({"second_shift": (9,)}, {}, r"second_shift is \[9\]; expected"),
    "second_depthwise": ({"second_depthwise": (9, 1, 3, 3)}, {}, r"second_depthwise is .*, 1, 3, 3\]"),
    "second_depthwise_bias": ({"second_depthwise_bias": (9,)}, {}, r"second_depthwise_bias is \[9\]; expected"),
    "second_pointwise": ({"second_pointwise": (24, 9, 1, 1)}, {}, r"second_pointwise is .*, 1, 1\]"),
    "second_pointwise_bias": ({"second_pointwise_bias": (9,)}, {}, r"second_pointwise_bias is \[9\]; expected"),
}
WRONG = {
    "gn of rank 2": ("gn odd", {"x": (2, 24)}, {}, r"x is \[2, 24\]; expected \[batch, channels"),
    "gn of no channels": ("gn odd", {"x": (2, 0, 5, 7)}, {}, r"x is \[2, 0, 5, 7\]"),
    "gn groups 0": ("gn odd", {}, {"groups": 0}, r"groups is 0; expected a divisor of 24"),
    "gn groups that do not divide": ("gn odd", {}, {"groups": 7}, r"groups is 7; expected a divisor of 24"),
    "gn groups below 0": ("gn odd", {}, {"groups": -(2**63)}, f"groups is {-(2**63)}"),
    "gn without epsilon": ("gn odd", {}, {"epsilon": None}, "epsilon is -1.000000 or missing; expected 0 or more"),
    "gn gain": ("gn odd", {"gain": (23,)}, {}, r"gain is \[23\]; expected \[24\]"),
    "gn shift": ("gn odd", {"shift": (24, 1)}, {}, r"shift is \[24, 1\]; expected \[24\]"),
    "x of other positions": ("ff odd", {"x": (2, 34, 24)}, {}, r"x is \[2, 34, 24\]; expected \[batch, height\*width"),
    "x of rank 2": ("ff odd", {"x": (35, 24)}, {}, r"x is \[35, 24\]"),
    "x of no channels": ("ff odd", {"x": (2, 35, 0)}, {}, r"x is \[2, 35, 0\]"),
    "x of other channels": ("ff odd", {"x": (2, 35, 25)}, {}, r"expand is .*; expected \[120, 25, 1, 1\]"),
    "odd hidden": ("ff odd", {"expand": (119, 24, 1, 1)}, {}, r"expand is \[119, 24, 1, 1\]; expected .*even hidden"),
    "no hidden": ("ff odd", {"expand": (0, 24, 1, 1)}, {}, r"expand is \[0, 24, 1, 1\]"),
    "expand_bias": ("ff odd", {"expand_bias": (60,)}, {}, r"expand_bias is \[60\]; expected \[120\]"),
    "5x5 depthwise": ("ff odd", {"depthwise": (120, 1, 5, 5)}, {}, r"depthwise is .*; expected \[120, 1, 3, 3\]"),
    "depthwise_bias": ("ff odd", {"depthwise_bias": (1, 120)}, {}, r"depthwise_bias is \[1, 120\]; expected \[120\]"),
    "project": ("ff odd", {"project": (24, 120, 1, 1)}, {}, r"project is .*; expected \[24, 60, 1, 1\]"),
    "no size": ("ff odd", {}, {"size": None}, r"x is \[2, 35, 24\]"),
    "size of three": ("ff odd", {}, {"size": [5, 7, 1]}, r"x is \[2, 35, 24\]"),
    "size below 0": ("ff odd", {}, {"size": [-5, -7]}, r"x is \[2, 35, 24\]"),
    "no size, no positions": ("ff odd", {"x": (2, 0, 24)}, {"size": None}, r"x is \[2, 0, 24\]"),
    "a size whose product is 0 in 64 bits": ("ff odd", {"x": (2, 0, 24)}, {"size": [2**62, 4]}, r"x is \[2, 0, 24\]"),
    "a size whose product is 36 in 64 bits": (
        "ff odd",
        {"x": (2, 36, 24)},
        {"size": [4, 2**62 + 9]},
        r"x is \[2, 36, 24",
    ),
    "query": ("λ odd", {"query": (1, 99, 40)}, {}, r"query is \[1, 99, 40\]; expected .*heads\*depth"),
    "no heads": ("λ odd", {}, {"heads": None}, r"query is \[1, 99, 39\]"),
    "heads whose product is 8 in 64 bits": (
        "λ odd",
        {"query": (1, 99, 8), "window": (8, 5, 5)},
        {"heads": 2**61 + 1},
        r"query is \[1, 99, 8\]; expected .*heads\*depth",
    ),
    "no depth": ("λ odd", {"query": (1, 99, 0), "window": (0, 5, 5)}, {"heads": 2**62}, r"window is \[0, 5, 5\]"),
    "another size": ("λ odd", {}, {"size": [9, 12]}, r"query is \[1, 99, 39\]"),
    "values": ("λ odd", {"values": (2, 99, 13)}, {}, r"values is \[2, 99, 13\]; expected \[1, 99, 13\]"),
    "summary": ("λ odd", {"summary": (1, 13, 12)}, {}, r"summary is .*; expected \[1, 13, 13\]"),
    "even window": ("λ odd", {"window": (13, 4, 4)}, {}, r"window is \[13, 4, 4\]; expected .*odd reach"),
    "oblong window": ("λ odd", {"window": (13, 5, 3)}, {}, r"window is \[13, 5, 3\]"),
    "window of rank 1": ("λ odd", {"window": (13,)}, {}, r"window is \[13\]"),
    **{f"{where}, {name}": (case, *wrong) for where, case in BLOCKS for name, wrong in WRONG_BLOCK.items()},
    "x and time of other channels": ("rb odd", {"time": (1, 39)}, {}, r"time is \[1, 39\]; .*channels of x\]"),
    "shortcut of other inputs": ("prb odd", {"shortcut": (39, 25, 1, 1)}, {}, r"shortcut is .*; .*\[39, 24, 1, 1\]"),
    "shortcut the other way": ("prb odd", {"shortcut": (24, 39, 1, 1)}, {}, r"shortcut is .*; .*\[39, 24, 1, 1\]"),
    "3x3 shortcut": ("prb odd", {"shortcut": (39, 24, 3, 3)}, {}, r"shortcut is .*; .*\[39, 24, 1, 1\]"),
    "shortcut_bias": ("prb odd", {"shortcut_bias": (24,)}, {}, r"shortcut_bias is \[24\]; expected \[39\]"),
    "outputs that groups do not divide": (
        "prb odd",
        {"time": (1, 40)},
        {},
        "groups is 3; expected a divisor of 24 and 40",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name):
    """Models that no export makes: a message, not a read beyond the end."""
    case, shapes, changed, words = WRONG[name]
    operator, attributes, inputs = operators.CASES[case]
    inputs = inputs | {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    attributes = {name: value for name, value in (attributes | changed).items() if value is not None}
    session = operators.session(operators.model(operator, attributes, inputs, body=False, shapes=False))
    with pytest.raises(Exception, match=f"moebius::{operator}: {words}"):
        session.run(None, inputs)


@pytest.mark.parametrize(
    ("case", "shape"),
    [
        (operators.feed_forward(0, 5, 7, 24, 48), (0, 35, 24)),
        (operators.residual_block(0, 5, 7, 24, 24, 3), (0, 24, 5, 7)),
        (operators.residual_block(0, 5, 7, 24, 39, 3, rows=0), (0, 39, 5, 7)),
        (operators.group_norm(0, 24, (5, 7), 3), (0, 24, 5, 7)),
        (operators.group_norm(2, 24, (0, 7), 3), (2, 24, 0, 7)),
        (operators.local_lambda(0, 9, 11, 13, 3, 5), (0, 99, 39)),
    ],
)
def test_an_empty_batch_is_no_work(case, shape):
    operator, attributes, inputs = case
    session = operators.session(operators.model(operator, attributes, inputs, body=False, shapes=False))
    assert session.run(None, inputs)[0].shape == shape


@pytest.mark.parametrize("case", ["ff odd", "rb odd", "prb odd", "gn odd", "λ odd"])
def test_the_kernel_takes_the_node_whole(case, tmp_path):
    """Else every test above would compare the body with itself."""
    operator, attributes, inputs = operators.CASES[case]
    made = operators.model(operator, attributes, inputs)
    profile = {"enable_profiling": True, "profile_file_prefix": str(tmp_path / "profile")}
    ran = []
    for compiled in (True, False):
        session = operators.session(made, compiled, **profile)
        session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
        ran.append([e["args"]["op_name"] for e in events if e["name"].endswith("_kernel_time")])
    assert ran[0] == [operator]
    assert len(ran[1]) > 5
    assert operator not in ran[1]
