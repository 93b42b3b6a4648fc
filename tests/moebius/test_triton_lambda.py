"""Local-λ's Triton kernel against the reference: in Triton's interpreter on the CPU, and on a GPU if there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moebius import preset
from moebius.network.lambda_layers import set_lambda_form
from moebius.network.lambda_ops import local_lambda_reference
from moebius.network.triton_lambda import launch, unavailable
from moebius.weights.load import load_student

triton = pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux on x86-64 only)")

# Relative error against float64 on the same rounded inputs. Sums are float32: 1e-7 was seen, and 1e-6 is far below
# what one wrong tap of 225 would make. In 16 bits the bands and the result are rounded: half an ulp is 2^-11 or 2^-9
# of each, and the worst seen were 3e-4 and 6e-3 (the interpreter cuts to bfloat16 rather than rounds).
TOLERANCES = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 8e-3}


def cases(part):
    script = Path(__file__).with_name("triton_cases.py")
    done = subprocess.run(
        [sys.executable, str(script), part],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted():
    return cases("short")


@pytest.fixture(scope="module")
def swept(interpreted):
    return interpreted | cases("long")


def test_sizes(interpreted):
    errors = {case: error for case, error in interpreted.items() if case.endswith(", float32")}
    assert len(errors) == 2
    assert max(errors.values()) < TOLERANCES["float32"], errors


@pytest.mark.slow
def test_every_size(swept):
    errors = {case: error for case, error in swept.items() if case.endswith(", float32")}
    assert len(errors) == 7
    assert max(errors.values()) < TOLERANCES["float32"], errors


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(interpreted, dtype):
    assert interpreted[f"odd, {dtype}"] < TOLERANCES[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_size_in_sixteen_bits(swept, dtype):
    errors = {case: error for case, error in swept.items() if case.endswith(f", {dtype}")}
    assert len(errors) == 7
    assert max(errors.values()) < TOLERANCES[dtype], errors


def test_a_depth_of_three_parts(interpreted):
    """A choice of blocks that is none of the tuner's for these sizes."""
    assert interpreted["depth in three parts"] < TOLERANCES["float32"]


@pytest.mark.slow
def test_every_choice_of_the_tuner(swept):
    errors = {case: error for case, error in swept.items() if case.startswith(("choice", "depth"))}
    assert len(errors) > 6
    assert max(errors.values()) < TOLERANCES["float32"], errors


def test_a_layer_with_its_gradients(interpreted):
    assert interpreted["layer"] < 5e-5  # batch norms in training mode multiply the rounding


def test_refusals(interpreted):
    assert interpreted["mixed"].startswith("ValueError: dtypes ['torch.float16', 'torch.float32']: the Triton kernel")
    assert interpreted["double"].startswith("ValueError: dtypes ['torch.float64']: the Triton kernel takes one")
    assert "do not fit" in interpreted["shapes"]


def test_a_cpu_is_refused():
    query, values, summary, window = (torch.zeros(s) for s in ((1, 4, 8), (1, 4, 4), (1, 4, 4), (4, 3, 3)))
    with pytest.raises(RuntimeError, match=r"runs on CUDA, the tensors are on cpu; choose the form 'fast'"):
        launch(query, values, summary, window, (2, 2))


def test_without_triton_the_form_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "needs Triton, which cannot be imported" in unavailable(torch.device("cuda"))


def test_the_network_imports_without_triton():
    """Where Triton is not installed, the forms "reference" and "fast" work."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from moebius.network.lambda_layers import LocalLambda, set_lambda_form\n"
        "layer = LocalLambda(8, 2, 3).eval(); set_lambda_form(layer, 'fast')\n"
        "print(layer(torch.zeros(1, 4, 8), (2, 2)).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "[1, 4, 8]" in done.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestOnTheGpu:
    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize("sizes", [((64, 64), 40), ((32, 32), 80), ((16, 16), 160), ((7, 9), 12)])
    def test_it_agrees(self, dtype, sizes):
        (height, width), depth = sizes
        generator = torch.Generator().manual_seed(depth)
        shapes = [(2, height * width, 8 * depth), (2, height * width, depth), (2, depth, depth), (depth, 15, 15)]
        inputs = [torch.randn(s, generator=generator).to("cuda", getattr(torch, dtype)) for s in shapes]
        expected = local_lambda_reference(*(tensor.double() for tensor in inputs), (height, width))
        got = launch(*inputs, (height, width))
        assert float((got.double() - expected).norm() / expected.norm()) < TOLERANCES[dtype]

    def test_the_network_agrees(self):
        student, _ = load_student("stand-in", preset("tiny").student)
        student = student.cuda()
        size = preset("tiny").student.sample_size
        sample, ids = torch.randn(1, 9, size, size, device="cuda"), student.conditional_ids[None]
        with torch.inference_mode():
            expected = student(sample, torch.tensor([500], device="cuda"), ids)
            set_lambda_form(student, "triton")
            got = student(sample, torch.tensor([500], device="cuda"), ids)
        assert float((got - expected).norm() / expected.norm()) < 1e-4
