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
# few, or an epsilon of the norm that is off by ten, costs 1e-5 and more.
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


@pytest.mark.parametrize("case", ["ff network", "λ network"])
def test_results_do_not_depend_on_the_number_of_threads(case):
    operator, attributes, inputs = operators.CASES[case]
    made = operators.model(operator, attributes, inputs)
    one, two, five = (operators.session(made, threads=n).run(None, inputs)[0] for n in (1, 2, 5))
    assert np.array_equal(one, two)
    assert np.array_equal(one, five)


def test_sessions_in_threads_do_not_disturb_each_other():
    """Two sessions, each run from two threads at once, while others come and go: they share scratch memory."""
    cases = [operators.CASES[name] for name in ("ff network", "λ network")]
    sessions = [operators.session(operators.model(*case)) for case in cases]
    expected = [session.run(None, case[2])[0] for session, case in zip(sessions, cases, strict=True)]

    def work(index):
        for _ in range(10):
            got = sessions[index % 2].run(None, cases[index % 2][2])[0]
            assert np.array_equal(got, expected[index % 2])
            passing = operators.session(operators.model(*operators.CASES["ff odd"]))
            passing.run(None, operators.CASES["ff odd"][2])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    sessions.clear()
    gc.collect()
    session = operators.session(operators.model(*cases[0]))  # after the last kernel of before went
    assert np.array_equal(session.run(None, cases[0][2])[0], expected[0])


WRONG = {
    "x of other positions": ("ff odd", {"x": (2, 34, 24)}, {}, r"x is \[2, 34, 24\]; expected \[batch, height\*width"),
    "x of rank 2": ("ff odd", {"x": (35, 24)}, {}, r"x is \[35, 24\]"),
    "x of no channels": ("ff odd", {"x": (2, 35, 0)}, {}, r"x is \[2, 35, 0\]"),
    "x of other channels": ("ff odd", {"x": (2, 35, 25)}, {}, r"gain is \[24\]; expected \[25\]"),
    "gain as a scalar": ("ff odd", {"gain": ()}, {}, r"gain is \[\]; expected \[24\]"),
    "shift too short": ("ff odd", {"shift": (23,)}, {}, r"shift is \[23\]; expected \[24\]"),
    "odd hidden": ("ff odd", {"expand": (119, 24, 1, 1)}, {}, r"expand is \[119, 24, 1, 1\]; expected .*even hidden"),
    "no hidden": ("ff odd", {"expand": (0, 24, 1, 1)}, {}, r"expand is \[0, 24, 1, 1\]"),
    "expand_bias": ("ff odd", {"expand_bias": (60,)}, {}, r"expand_bias is \[60\]; expected \[120\]"),
    "5x5 depthwise": ("ff odd", {"depthwise": (120, 1, 5, 5)}, {}, r"depthwise is .*; expected \[120, 1, 3, 3\]"),
    "depthwise_bias": ("ff odd", {"depthwise_bias": (1, 120)}, {}, r"depthwise_bias is \[1, 120\]; expected \[120\]"),
    "project": ("ff odd", {"project": (24, 120, 1, 1)}, {}, r"project is .*; expected \[24, 60, 1, 1\]"),
    "no size": ("ff odd", {}, {"size": None}, r"x is \[2, 35, 24\]"),
    "size of three": ("ff odd", {}, {"size": [5, 7, 1]}, r"x is \[2, 35, 24\]"),
    "size below 0": ("ff odd", {}, {"size": [-5, -7]}, r"x is \[2, 35, 24\]"),
    "query": ("λ odd", {"query": (1, 99, 40)}, {}, r"query is \[1, 99, 40\]; expected .*heads\*depth"),
    "no heads": ("λ odd", {}, {"heads": None}, r"query is \[1, 99, 39\]"),
    "values": ("λ odd", {"values": (2, 99, 13)}, {}, r"values is \[2, 99, 13\]; expected \[1, 99, 13\]"),
    "summary": ("λ odd", {"summary": (1, 13, 12)}, {}, r"summary is .*; expected \[1, 13, 13\]"),
    "even window": ("λ odd", {"window": (13, 4, 4)}, {}, r"window is \[13, 4, 4\]; expected .*odd reach"),
    "oblong window": ("λ odd", {"window": (13, 5, 3)}, {}, r"window is \[13, 5, 3\]"),
    "window of rank 1": ("λ odd", {"window": (13,)}, {}, r"window is \[13\]"),
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


def test_an_empty_batch_is_no_work():
    operator, attributes, inputs = operators.feed_forward(0, 5, 7, 24, 48)
    session = operators.session(operators.model(operator, attributes, inputs, body=False, shapes=False))
    assert session.run(None, inputs)[0].shape == (0, 35, 24)


@pytest.mark.parametrize("case", ["ff odd", "λ odd"])
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
