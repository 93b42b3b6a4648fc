"""The teacher: its state dict, its output against the original's, its features, and what is not loaded."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moebius import Teacher, preset
from moebius.network.config import PRESETS, TeacherConfig
from moebius.network.gla import GatedLinearAttention
from moebius.weights import hub
from moebius.weights.checkpoint import CheckpointError
from moebius.weights.load import DEFAULT_TEACHER, load_student, load_teacher, tensor_specs
from moebius.weights.sources import HubSource, LocatedFile

GOLDEN = Path(__file__).parents[1] / "golden"
TINY = preset("tiny").teacher


@pytest.fixture(scope="module")
def tiny():
    return load_teacher("stand-in:0", TINY)[0]


def batch(teacher, size=(16, 16), dtype=torch.float32):
    torch.manual_seed(1)
    ids = torch.stack([teacher.unconditional_ids, teacher.conditional_ids])
    return torch.randn(2, 9, *size).to(dtype), torch.tensor([40, 800]), ids


# The released network


def test_full_state_dict_is_the_released_one():
    with torch.device("meta"):
        teacher = Teacher(preset("full").teacher)
    released = json.loads((GOLDEN / "pixelhacker_teacher_manifest.json").read_text())
    assert len(released) == 753
    found = {
        name: [list(shape), str(dtype).removeprefix("torch.")] for name, (shape, dtype) in tensor_specs(teacher).items()
    }
    assert found == released
    assert sum(parameter.numel() for parameter in teacher.parameters()) == 862_251_708
    assert sum(isinstance(module, GatedLinearAttention) for module in teacher.modules()) == 16


@pytest.mark.full
def test_full_forward_is_the_originals():
    """Output and features within 1e-5 relative, the golden files' own statement for float32. 3.5 GB of weights."""
    golden = np.load(GOLDEN / "teacher_forward_seed0.npz")
    teacher, checkpoint = load_teacher("stand-in:0", preset("full").teacher)
    assert checkpoint.stand_in
    with torch.inference_mode():
        noise, features = teacher.forward_features(
            *(torch.from_numpy(golden[key]) for key in ("sample", "timesteps", "input_ids"))
        )
    expected = golden["noise_pred"].astype(np.float64)
    assert np.linalg.norm(noise.numpy() - expected) < 1e-5 * np.linalg.norm(expected)
    assert len(features) == 9
    for index, feature in enumerate(features):
        assert feature.double().norm().item() == pytest.approx(float(golden[f"block{index}_norm"]), rel=1e-5)
        corner = golden[f"block{index}_slice"].astype(np.float64)
        assert np.linalg.norm(feature[:, :8, :8, :8].numpy() - corner) < 1e-5 * np.linalg.norm(corner)


# Sizes


@pytest.mark.parametrize("name", list(PRESETS))
def test_teacher_and_student_of_a_preset_fit_together(name):
    """The same inputs and categories, and feature maps of one shape where distillation compares them."""
    sizes = preset(name)
    student, teacher = sizes.student, sizes.teacher
    for field in ("in_channels", "out_channels", "num_categories", "embedding_dim", "tokens"):
        assert getattr(teacher, field) == getattr(student, field), field
    # Last down level of the student, first up level of the teacher: one level more, one doubling back.
    assert len(teacher.block_out_channels) == len(student.block_out_channels) + 1
    assert teacher.block_out_channels[-1] == student.block_out_channels[-1]
    assert student.sample_size % (1 << len(student.block_out_channels)) == 0


def test_features_that_distillation_compares_have_one_shape(tiny):
    student, _ = load_student("stand-in:0", preset("tiny").student)
    given = batch(tiny)
    with torch.inference_mode():
        of_student, of_teacher = student.forward_features(*given)[1], tiny.forward_features(*given)[1]
    assert of_student[1].shape == of_teacher[4].shape == (2, 32, 8, 8)


@pytest.mark.parametrize("name", list(PRESETS))
def test_shapes_are_had_on_the_meta_device(name):
    """Without memory or arithmetic: to count, and to check a set-up before weights are fetched."""
    sizes = preset(name)
    side, channels = sizes.student.sample_size, sizes.teacher.block_out_channels
    with torch.device("meta"):
        teacher = Teacher(sizes.teacher)
        sample, timesteps = torch.empty(1, 9, side, side), torch.zeros(1, dtype=torch.long)
        noise, features = teacher.forward_features(sample, timesteps, teacher.conditional_ids[None])
    assert noise.shape == (1, 4, side, side)
    top = len(channels) - 1
    down = [(channels[level], side >> min(level + 1, top)) for level in range(top + 1)]
    up = [(channels[level], side >> max(level - 1, 0)) for level in reversed(range(top + 1))]
    expected = [*down, down[-1], *up]
    assert [tuple(x.shape) for x in features] == [(1, width, size, size) for width, size in expected]


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_out_channels", (320, 330)), ("block_out_channels", (320,)), ("num_heads", 7), ("num_categories", 7)],
)
def test_impossible_sizes_are_refused(field, value):
    with pytest.raises(ValueError):
        TeacherConfig(**{field: value})


# Forward


@pytest.mark.parametrize("size", [(16, 16), (13, 22)])
def test_forward_is_diffusers_own(tiny, size):
    """Noise as its `forward` gives it, and each feature as its block returned it."""
    unet, seen = tiny.diff_model, []

    def keep(_module, _inputs, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    hooks = [block.register_forward_hook(keep) for block in blocks]
    sample, timesteps, ids = batch(tiny, size)
    try:
        with torch.inference_mode():
            expected = unet(sample, timesteps, tiny.embedding_layer(ids)).sample
    finally:
        for hook in hooks:
            hook.remove()
    with torch.inference_mode():
        noise, features = tiny.forward_features(sample, timesteps, ids)
    assert torch.equal(noise, expected)
    assert len(features) == len(seen) == 7
    assert all(torch.equal(found, right) for found, right in zip(features, seen, strict=True))


def test_tiny_forward_in_float32_is_the_recurrence_in_float64(tiny):
    """Within 5e-6: 2e-6 was seen, with the recurrence in float32 as well."""
    exact, _ = load_teacher("stand-in:0", TINY)
    exact.double().set_gla_form("recurrence")
    sample, timesteps, ids = batch(tiny)
    with torch.inference_mode():
        noise, features = tiny.forward_features(sample, timesteps, ids)
        right, rights = exact.forward_features(sample.double(), timesteps, ids)
    for found, expected in [(noise, right), *zip(features, rights, strict=True)]:
        assert (found.double() - expected).norm() < 5e-6 * expected.norm()


def test_self_attention_sees_only_what_lies_before(tiny):
    """A token's output follows from those before it in raster order: no softmax attention is left in attn1."""
    layer = tiny.diff_model.down_blocks[0].attentions[0].transformer_blocks[0].attn1
    torch.manual_seed(2)
    x = torch.randn(1, 40, 16)
    changed = torch.cat([x[:, :25], torch.randn(1, 15, 16)], 1)
    with torch.inference_mode():
        before, after = layer(x), layer(changed)
    torch.testing.assert_close(after[:, :25], before[:, :25])
    assert not torch.allclose(after[:, 25:], before[:, 25:])


def test_batch_rows_do_not_mix(tiny):
    given = batch(tiny)
    with torch.inference_mode():
        both = tiny(*given)
        alone = torch.cat([tiny(*(x[row : row + 1] for x in given)) for row in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


def test_the_categories_matter(tiny):
    sample, timesteps, ids = batch(tiny)
    with torch.inference_mode():
        assert not torch.allclose(tiny(sample, timesteps, ids), tiny(sample, timesteps, ids.flip(0)))


def test_bfloat16_weights():
    """Against float64 of the same rounded weights: 0.035 was seen, and 0.034 with the recurrence."""
    rounded, exact = (load_teacher("stand-in:0", TINY)[0].bfloat16() for _ in range(2))
    exact.double().set_gla_form("recurrence")
    sample, timesteps, ids = batch(rounded, dtype=torch.bfloat16)
    with torch.inference_mode():
        noise, expected = rounded(sample, timesteps, ids), exact(sample.double(), timesteps, ids)
    assert noise.dtype == torch.bfloat16
    assert (noise.double() - expected).norm() < 0.05 * expected.norm()


# Training


def gradients(checkpointing):
    teacher, _ = load_teacher("stand-in:0", TINY)
    teacher.train()
    if checkpointing:
        teacher.diff_model.enable_gradient_checkpointing()
    teacher(*batch(teacher)).square().mean().backward()
    return {name: parameter.grad for name, parameter in teacher.named_parameters()}


def test_training_reaches_every_parameter_and_checkpointing_changes_nothing():
    plain, saving = gradients(checkpointing=False), gradients(checkpointing=True)
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, rtol=1e-6, atol=1e-7, msg=name)


# Loading


@pytest.fixture
def state(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
    return dict(tiny.state_dict())


def same(teacher, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in teacher.state_dict().items())


def test_files_and_folders_load(state, tmp_path):
    save_file(state, tmp_path / "model.safetensors")
    assert same(load_teacher(str(tmp_path), TINY)[0], state)
    torch.save({"module." + name: tensor for name, tensor in state.items()}, tmp_path / "of_ddp.bin")
    teacher, checkpoint = load_teacher(str(tmp_path / "of_ddp.bin"), TINY)
    assert same(teacher, state)
    assert not checkpoint.stand_in
    assert not teacher.training


def test_half_precision_is_raised_and_said(state, tmp_path):
    halves = {name: tensor.half() for name, tensor in state.items()}
    save_file(halves, tmp_path / "model.safetensors")
    teacher, checkpoint = load_teacher(str(tmp_path), TINY)
    assert same(teacher, {name: tensor.float() for name, tensor in halves.items()})
    assert f"{len(state)} half-precision tensors converted to float32" in checkpoint.origin


def test_the_default_is_the_released_fine_tuning_of_the_hub(state, tmp_path, monkeypatch):
    save_file(state, tmp_path / "model.safetensors")
    asked = []

    def fetch(source, _progress):
        asked.append(source)
        return LocatedFile(tmp_path / "model.safetensors", "the hub")

    monkeypatch.setattr(hub, "fetch_weights", fetch)
    teacher, checkpoint = load_teacher(DEFAULT_TEACHER, TINY)
    assert asked == [HubSource("hustvl/PixelHacker", "ft_places2")]
    assert checkpoint.origin == "the hub"
    assert same(teacher, state)


LAYER = "diff_model.mid_block.attentions.0.transformer_blocks.0.attn1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({f"{LAYER}.gk_proj.1.bias": None}, rf"1 missing \({LAYER}.gk_proj.1.bias\)"),
        ({f"{LAYER}.to_q.weight": torch.zeros(32, 32)}, rf"1 unexpected \({LAYER}.to_q.weight\)"),
        ({f"{LAYER}.q_proj.weight": torch.zeros(32, 32)}, r"q_proj.weight \[32, 32\], expected \[16, 32\]"),
        ({"embedding_layer.weight": torch.zeros(12, 24, dtype=torch.float64)}, "embedding_layer.weight float64"),
        ({f"{LAYER}.o_proj.weight": torch.full((32, 32), torch.nan)}, "hold NaN or infinite values"),
    ],
)
def test_what_does_not_fit_is_refused(state, tmp_path, change, message):
    damaged = {name: tensor for name, tensor in (state | change).items() if tensor is not None}
    save_file(damaged, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_teacher(str(tmp_path), TINY)


def test_a_student_is_not_a_teacher(state, tmp_path):
    student, _ = load_student("stand-in:0", preset("tiny").student)
    save_file(student.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"does not fit a network of {len(state)} tensors"):
        load_teacher(str(tmp_path), TINY)
