"""What is exported: guidance as the paper has it, in the order that the golden files have."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moebius import Moebius, preset
from moebius.weights.load import load_student
from moebius_export.errors import ExportError
from moebius_export.network.wrappers import ConditionalUNet, GuidedUNet

GOLDEN = Path(__file__).parents[1] / "golden"


def parts():
    student, _ = load_student("stand-in:0", preset("tiny").student)
    torch.manual_seed(0)
    return student, torch.randn(1, 9, 16, 16), torch.tensor([730])


def test_guidance_is_the_formula():
    student, sample, t = parts()
    with torch.inference_mode():
        guided = GuidedUNet(student)(sample, t, torch.tensor([2.5]))
        unconditional = student(sample, t, torch.arange(6, 12)[None])
        conditional = student(sample, t, torch.arange(0, 6)[None])
    torch.testing.assert_close(guided, unconditional + 2.5 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(conditional, unconditional, rtol=1e-2)


def test_scale_one_is_the_conditional_branch():
    student, sample, t = parts()
    with torch.inference_mode():
        guided = GuidedUNet(student)(sample, t, torch.tensor([1.0]))
        conditional = ConditionalUNet(student)(sample, t)
    torch.testing.assert_close(guided, conditional, rtol=1e-4, atol=1e-5)


def test_the_branches_are_in_the_golden_order():
    """Row 0 of the original's batch has the unconditional ids, row 1 the conditional ones."""
    ids = np.load(GOLDEN / "student_forward_seed0.npz")["input_ids"]
    with torch.device("meta"):
        student = Moebius(preset("full").student)
    student.embedding_layer.to_empty(device="cpu")
    assert GuidedUNet(student).category_ids.tolist() == ids.tolist()


def test_a_batch_of_pictures_is_a_batch_of_results():
    student, _, t = parts()
    sample = torch.randn(3, 9, 16, 16)
    model = GuidedUNet(student)
    with torch.inference_mode():
        together = model(sample, t, torch.tensor([2.5]))
        apart = torch.cat([model(sample[i : i + 1], t, torch.tensor([2.5])) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wrapper", [GuidedUNet, ConditionalUNet])
def test_other_layers_than_the_released_ones_are_refused(wrapper):
    student = Moebius(replace(preset("tiny").student, self_attention="gla", feed_forward="geglu"))
    with pytest.raises(ExportError, match="self_attention gla, feed_forward geglu was given; only the released"):
        wrapper(student)


@pytest.mark.slow
def test_the_command_refuses_the_weights_of_other_layers_in_a_line(tmp_path):
    student = Moebius(replace(preset("tiny").student, convolution="full"))
    save_file(student.state_dict(), tmp_path / "weights.safetensors")
    options = ["--preset", "tiny", "--vae", "stand-in", "--weights", str(tmp_path / "weights.safetensors")]
    command = [sys.executable, "-m", "moebius_export.commands.app", "onnx", *options, "--out", str(tmp_path / "bundle")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    message = " ".join(done.stderr.split())
    assert "other layers than this network: convolution full, expected convolution separable" in message
    assert "Only the released network's layers can be exported" in message
    assert "Traceback" not in message
    assert not (tmp_path / "bundle").exists()
