"""The student: its state dict, its output against the original's, and training."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from moebius import Moebius, VaeDecoder, VaeEncoder, build_vae, preset
from moebius.errors import CheckpointError
from moebius.network.config import PRESETS, StudentConfig
from moebius.weights.load import load_student, load_vae, tensor_specs

GOLDEN = Path(__file__).parents[1] / "golden"


def manifest(name):
    entries = json.loads((GOLDEN / name).read_text())
    return {key: (tuple(shape), dtype) for key, (shape, dtype) in entries.items()}


def names_and_shapes(module):
    return {key: (spec.shape, str(spec.dtype).removeprefix("torch.")) for key, spec in tensor_specs(module).items()}


def test_full_state_dict_is_the_released_one():
    with torch.device("meta"):
        model = Moebius(preset("full").student)
    assert names_and_shapes(model) == manifest("moebius_student_manifest.json")
    assert sum(parameter.numel() for parameter in model.parameters()) == 226_041_531


def test_full_vae_state_dict_is_the_released_one():
    with torch.device("meta"):
        vae = build_vae(preset("full").vae)
    assert names_and_shapes(vae) == manifest("vae_manifest.json")


@pytest.mark.slow
def test_full_forward_is_the_originals():
    """Output and feature norms within 1e-5 relative, the golden files' own statement for float32."""
    golden = np.load(GOLDEN / "student_forward_seed0.npz")
    model, checkpoint = load_student("stand-in:0", preset("full").student)
    assert checkpoint.stand_in
    with torch.inference_mode():
        noise, features = model.forward_features(
            *(torch.from_numpy(golden[key]) for key in ("sample", "timesteps", "input_ids"))
        )
    expected = golden["noise_pred"].astype(np.float64)
    assert np.linalg.norm(noise.numpy() - expected) < 1e-5 * np.linalg.norm(expected)
    assert len(features) == 6
    for index, feature in enumerate(features):
        assert feature.double().norm().item() == pytest.approx(float(golden[f"block{index}_norm"]), rel=1e-5)
        corner = golden[f"block{index}_slice"].astype(np.float64)
        assert np.linalg.norm(feature[:, :8, :8, :8].numpy() - corner) < 1e-5 * np.linalg.norm(corner)


@pytest.mark.parametrize("name", list(PRESETS))
def test_student_and_vae_of_a_preset_fit_together(name):
    sizes = preset(name)
    assert sizes.vae.sample_size == sizes.student.sample_size * sizes.vae.downscale
    assert sizes.student.in_channels == 2 * sizes.vae.latent_channels + 1
    assert sizes.student.out_channels == sizes.vae.latent_channels


def test_unknown_preset_names_the_choices():
    with pytest.raises(CheckpointError, match="full, small, tiny"):
        preset("large")


@pytest.mark.parametrize(
    ("field", "value"),
    [("block_out_channels", (30, 60)), ("window", 14), ("num_categories", 7), ("sample_size", 30)],
)
def test_impossible_sizes_are_refused(field, value):
    with pytest.raises(ValueError):
        StudentConfig(**{field: value})


def training_step(model, checkpointing):
    torch.manual_seed(0)
    sample = torch.randn(2, 9, 16, 16)
    ids = torch.stack([model.unconditional_ids, model.conditional_ids])
    model.train()
    model.diff_model.gradient_checkpointing = checkpointing
    model.zero_grad()
    model(sample, torch.tensor([10, 900]), ids).square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return gradients, buffers


def test_training_reaches_every_parameter_and_updates_statistics():
    model, _ = load_student("stand-in:0", preset("tiny").student)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients, after = training_step(model, checkpointing=False)
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_gradient_checkpointing_changes_nothing_but_memory():
    """Also the batch norms' statistics: a recomputed block must not count its batch twice."""
    plain = training_step(load_student("stand-in:0", preset("tiny").student)[0], checkpointing=False)
    saving = training_step(load_student("stand-in:0", preset("tiny").student)[0], checkpointing=True)
    for kept, recomputed in zip(plain, saving, strict=True):
        assert kept.keys() == recomputed.keys()
        for name in kept:
            torch.testing.assert_close(recomputed[name], kept[name], rtol=1e-6, atol=1e-7, msg=name)


def test_batch_rows_do_not_mix():
    model, _ = load_student("stand-in:0", preset("tiny").student)
    torch.manual_seed(1)
    sample, ids = torch.randn(2, 9, 16, 16), torch.stack([model.unconditional_ids, model.conditional_ids])
    timesteps = torch.tensor([40, 800])
    with torch.inference_mode():
        both = model(sample, timesteps, ids)
        alone = torch.cat([model(sample[i : i + 1], timesteps[i : i + 1], ids[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both[0], both[1])


def test_vae_edges_are_diffusers_own():
    """Mode of the posterior times the scale, and back."""
    vae, _ = load_vae("stand-in:0", preset("tiny").vae)
    scale = preset("tiny").vae.scaling_factor
    torch.manual_seed(2)
    image, latent = torch.rand(1, 3, 128, 128) * 2 - 1, torch.randn(1, 4, 16, 16)
    with torch.inference_mode():
        torch.testing.assert_close(VaeEncoder(vae)(image), vae.encode(image).latent_dist.mode() * scale)
        torch.testing.assert_close(VaeDecoder(vae)(latent), vae.decode(latent / scale).sample)
