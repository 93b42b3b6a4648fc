"""docs/bundle.md, "What schema 1 promises": which fields a bundle must have, and what happens to unknown ones."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from moebius_runtime.bundle import manifest, passport
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.errors import BundleError
from moebius_runtime.version import own_version

ROOT = Path(__file__).parents[2]
# The fields that version 0.1 wrote. None may be added here: a later field is optional. None may go.
REQUIRED = {
    "Manifest": "schema_version created model geometry schedule defaults graphs files rewrites parity tools",
    "ModelInfo": "preset parameters unet vae",
    "WeightsInfo": "origin sha256 stand_in",
    "Geometry": "image_size latent_size latent_channels scaling_factor",
    "ScheduleInfo": "num_train_timesteps beta_start beta_end beta_schedule prediction_type",
    "Defaults": "num_inference_steps guidance_scale strength noise_offset",
    "GraphInfo": "files inputs outputs",
    "GraphFile": "model weights",
    "TensorInfo": "name dtype shape",
    "FileInfo": "size sha256",
    "Rewrite": "graph name count",
    "Parity": "relative_error max_error",
}
LATER = {"GuidanceInfo", "ModeDefaults", "GraphCheck"}  # objects in optional fields, whole or absent


def required(model: type) -> set[str]:
    absent = dataclasses.MISSING
    return {f.name for f in dataclasses.fields(model) if f.default is absent and f.default_factory is absent}


def test_the_required_fields_are_those_of_version_0_1():
    models = {
        name: one
        for name, one in vars(manifest).items()
        if dataclasses.is_dataclass(one) and one.__module__ == manifest.__name__
    }
    assert set(models) == set(REQUIRED) | LATER
    assert {name: required(models[name]) for name in REQUIRED} == {
        name: set(fields.split()) for name, fields in REQUIRED.items()
    }


def test_a_manifest_with_these_fields_alone_loads_and_means_what_it_meant(toy_copy, edit_manifest):
    def strip(content):
        keep = {name: set(fields.split()) for name, fields in REQUIRED.items()}
        for name in set(content) - keep["Manifest"]:
            del content[name]
        for name, model in (("model", "ModelInfo"), ("defaults", "Defaults"), ("schedule", "ScheduleInfo")):
            content[name] = {key: value for key, value in content[name].items() if key in keep[model]}
        for graph in content["graphs"].values():
            for file in graph["files"].values():
                for key in set(file) - keep["GraphFile"]:
                    del file[key]
        for rewrite in content["rewrites"]:
            for key in set(rewrite) - keep["Rewrite"]:
                del rewrite[key]

    edit_manifest(toy_copy.path, strip)
    found = Bundle.open(toy_copy.path).manifest
    assert (found.guidance, found.modes, found.decoders, found.checks) == (None, {}, {}, {})
    assert (found.defaults.sampler, found.model.tiny_decoder) == ("ddim", None)


@pytest.mark.parametrize(
    ("change", "unknown"),
    [
        (lambda c: c.update(lora=[1]), "'lora'"),
        (lambda c: c["defaults"].update(eta=0.5), "'defaults.eta'"),
        (lambda c: c["graphs"]["unet"].update(tiles=2), "'graphs.unet.tiles'"),
    ],
)
def test_an_intact_bundle_of_a_newer_version_is_refused_by_field_and_version(toy_copy, edit_manifest, change, unknown):
    def newer(content):
        change(content)
        content["tools"]["moebius-edge"] = "9.1.0"

    edit_manifest(toy_copy.path, newer)
    with pytest.raises(BundleError) as caught:
        read_manifest(toy_copy.path)
    ours = own_version() or "of this checkout"
    assert f"moebius-edge {ours} does not know {unknown}, which a newer version wrote ('9.1.0')" in str(caught.value)
    assert "Update moebius-edge" in str(caught.value)


def test_a_field_added_by_hand_is_not_taken_for_a_newer_version(toy_copy, edit_manifest):
    edit_manifest(toy_copy.path, lambda content: content.update(lora=[1]), sign=False)
    with pytest.raises(BundleError, match="lora: Extra inputs are not permitted") as caught:
        read_manifest(toy_copy.path)
    assert "newer" not in str(caught.value)


def test_another_fault_beside_an_unknown_field_is_named(toy_copy, edit_manifest):
    edit_manifest(toy_copy.path, lambda content: content.update(lora=[1], created=7))
    with pytest.raises(BundleError, match="created"):
        read_manifest(toy_copy.path)


def test_the_page_names_every_field():
    page = (ROOT / "docs/bundle.md").read_text(encoding="utf-8")
    table = page.partition("## manifest.json")[2]
    for field in dataclasses.fields(manifest.Manifest):
        assert f"| `{field.name}` |" in table, field.name


def test_no_passport_field_is_optional():
    """Engines are built again rather than carried over versions, so a passport needs no defaults."""
    assert required(passport.Passport) == {field.name for field in dataclasses.fields(passport.Passport)}


def test_changelog_and_project_name_one_version():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    project = re.search(r'^\[project\]\n(?:.*\n)*?version = "([^"]+)"$', text, re.MULTILINE)
    sections = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert project is not None
    assert next(name for name in sections if name != "Unreleased") == project[1]
    assert sections.count(project[1]) == 1
