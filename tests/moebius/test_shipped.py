"""The weights that come with the package: all there, small enough, and what their recipes say."""

import json
from pathlib import Path

import pytest
import torch

import moebius
from moebius import preset
from moebius.distill.settings import load_settings
from moebius.load import default_sources, load_student, load_vae
from moebius.sources import SHIPPED, ShippedSource

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


@pytest.mark.parametrize(("name", "recipe"), [("small", "student-holes"), ("small/vae", "vae-colour")])
def test_the_weights_are_those_of_the_recipe(name, recipe):
    """`config.json` holds the settings of the run that made the weights."""
    made = json.loads((ShippedSource(name).path / "config.json").read_text())["trained"]
    settings = load_settings(FOLDER / "recipe" / f"{recipe}.yaml")
    now = settings.identity()
    assert made["settings"] == {name: now[name] for name in made["settings"]}
    assert made["steps"] == settings.steps


def test_the_network_fills_better_than_it_was_drawn():
    """The trained student's noise prediction beats the best constant, 0, whose error is 1."""
    sizes = preset("small")
    student, _ = load_student("shipped:small", sizes.student)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, 64, 64, generator=generator)
    sample = torch.cat([noise, torch.ones(2, 1, 64, 64), torch.zeros(2, 4, 64, 64)], dim=1)
    with torch.no_grad():
        predicted = student(sample, torch.tensor([950, 950]), student.conditional_ids[None].expand(2, -1))
    assert float((predicted - noise).square().mean()) < 0.2
