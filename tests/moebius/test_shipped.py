"""The weights that come with the package: all there, small enough, and what their recipes say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import moebius
from moebius import preset
from moebius.data.scenes import scene
from moebius.distill.loop.tasks import halves
from moebius.distill.objectives.timesteps import add_noise, alphas_cumprod, predict_clean
from moebius.distill.settings import changed, load_settings
from moebius.weights.load import default_sources, load_student, load_vae
from moebius.weights.sources import SHIPPED, ShippedSource

FOLDER = Path(moebius.__file__).parent / "small"


def test_student_and_vae_load_by_the_presets_defaults():
    weights, vae = default_sources("small")
    sizes = preset("small")
    student, checkpoint = load_student(weights, sizes.student)
    assert checkpoint.origin.startswith("shipped:small")
    assert not checkpoint.stand_in
    assert sum(parameter.numel() for parameter in student.parameters()) == 3_666_995
    assert load_vae(vae, sizes.vae)[0].config.scaling_factor == sizes.vae.scaling_factor


def test_both_are_within_24_megabytes():
    files = [ShippedSource(name).path / "diffusion_pytorch_model.safetensors" for name in SHIPPED]
    assert sum(file.stat().st_size for file in files) < 24e6


@pytest.mark.parametrize("name", sorted(path.stem for path in (FOLDER / "recipe").glob("*.yaml")))
def test_the_recipes_are_settings_that_can_be_run(name):
    settings = load_settings(FOLDER / "recipe" / f"{name}.yaml")
    assert settings.network.preset == "small"


@pytest.mark.parametrize(("name", "recipe"), [("small", "near"), ("small/vae", "vae-colour")])
def test_the_weights_are_those_of_the_recipe(name, recipe):
    """`config.json` holds the settings of the run that made the weights."""
    made = json.loads((ShippedSource(name).path / "config.json").read_text())["trained"]
    settings = load_settings(FOLDER / "recipe" / f"{recipe}.yaml")
    assert changed(made["settings"], settings) == []
    assert made["steps"] == settings.steps


@pytest.mark.parametrize("timestep", [500, pytest.param(950, marks=pytest.mark.slow)])
def test_the_network_knows_what_belongs_into_a_hole(timestep):
    """The clean latents that it predicts there, against those of the mean colour around, on held-out scenes.

    Squared errors of all three together: 0.35 (timestep 500) and 0.49 of the mean colour's.
    """
    sizes = preset("small")
    student, _ = load_student("shipped:small", sizes.student)
    encoder, _ = halves(load_vae("shipped:small/vae", sizes.vae)[0])
    pictures = np.stack([scene(index, 512, held_out=True) for index in (0, 2, 6)])  # two landscapes, a surface
    image = (torch.from_numpy(pictures).float() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()  # [3, 3, 512, 512]
    mask = torch.zeros(1, 1, 512, 512)
    mask[..., 200:280, 216:296] = 1
    mean = (image * (1 - mask)).sum((2, 3), keepdim=True) / (1 - mask).sum((2, 3), keepdim=True)
    with torch.no_grad():
        clean, emptied, flat = (encoder(x) for x in (image, image * (1 - mask), image * (1 - mask) + mean * mask))
        small = mask[:, :, ::8, ::8].expand(3, -1, -1, -1)
        times, bars = torch.full((3,), timestep), alphas_cumprod()
        noisy = add_noise(clean, torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), times, bars)
        predicted = student(
            torch.cat([noisy, small, emptied], dim=1), times, student.conditional_ids[None].expand(3, -1)
        )
    found = predict_clean(noisy, predicted, times, bars, sizes.prediction_type)
    error, baseline = (float(((value - clean) * small).square().sum()) for value in (found, flat))
    assert error < 0.5 * baseline
