"""Trajectory and picture checks of `moebius-export verify`, on pictures made by hand."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moebius_export.trajectories.scenes import Scene, seeded_scene
from moebius_export.verify.budgets import BUDGETS
from moebius_export.verify.pictures import Filled, picture_checks, trajectory_checks
from moebius_runtime import InpaintOptions
from moebius_runtime.bundle.manifest import read_manifest


@pytest.fixture(scope="module")
def manifest(tiny_bundle):
    return read_manifest(tiny_bundle)


def scene(size=64):
    rng = np.random.RandomState(0)
    mask = np.zeros((size, size), bool)
    mask[16:48, 20:50] = True
    return Scene(rng.randint(0, 256, (size, size, 3)).astype(np.uint8), mask, InpaintOptions())


def filled(made, value=None, place=None, change=0):
    picture = made.picture.copy()
    if value is not None:
        picture[made.mask] = value
    if place is not None:
        picture[place] = picture[place] ^ change
    return Filled(picture, [])


def statuses(made, ours):
    checks, _ = picture_checks("s", made, filled(made), ours, BUDGETS["fp32"])
    return {check.name: check.status for check in checks if check.status != "pass"}


def test_pictures_that_are_not_pytorchs_fail():
    made = scene()
    assert statuses(made, filled(made)) == {"LPIPS": "note"}
    one = statuses(made, filled(made, place=(30, 30), change=128))
    assert one == {"PSNR in the mask": "fail", "SSIM in the mask": "fail", "LPIPS": "note"}
    assert statuses(made, filled(made, place=(2, 2), change=1)) == {"exact outside the seam": "fail", "LPIPS": "note"}
    black = statuses(made, filled(made, value=0))
    assert black["not constant"] == black["saturation"] == "fail"
    assert black["PSNR in the mask"] == black["SSIM in the mask"] == "fail"
    (refused,), shown = picture_checks("s", made, filled(made), Filled(None, [], "it holds NaN"), BUDGETS["fp32"])
    assert (refused.status, refused.detail) == ("fail", "it holds NaN")
    assert shown.candidate is None
    (unrun,), shown = picture_checks("s", made, Filled(None, [], "NaN"), filled(made), BUDGETS["fp32"])
    assert unrun.status == "not run"
    assert shown is None


def test_lpips_where_its_weights_are_at_hand(monkeypatch, tmp_path):
    """The package is played by one that returns the mean difference: what it is given is what is tested."""
    seen = []

    class Distance:
        def __init__(self, **options):
            assert options == {"net": "alex", "verbose": False}

        def eval(self):
            return self

        def __call__(self, first, second):
            seen.extend([first, second])
            return (first - second).abs().mean()

    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=Distance))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    made = scene()
    assert "LPIPS" in statuses(made, filled(made))  # no weights: a note
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert "LPIPS" not in statuses(made, filled(made))
    assert statuses(made, filled(made, value=9))["LPIPS"] == "fail"
    assert seen[0].shape == (1, 3, 64, 64)
    assert torch.equal(seen[0], torch.from_numpy(made.picture).permute(2, 0, 1)[None] / 127.5 - 1)


def test_drift_is_relative_and_step_by_step():
    latents = [np.full((1, 4, 2, 2), value, np.float32) for value in (1, 2, 4)]
    reference = Filled(None, latents)
    moved = Filled(None, [latents[0], latents[1] * np.float32(1.5), latents[2]])
    (check,), trajectory = trajectory_checks("s", [500, 0], reference, moved, 0.1)
    assert trajectory.drift == [0, 0.5, 0]
    assert (check.status, check.measured) == ("fail", 0.5)
    assert "after step 1 (timestep 500)" in check.detail
    (check,), _ = trajectory_checks("s", [500, 0], reference, Filled(None, latents[:2], "NaN"), 0.1)
    assert check.status == "fail"
    assert check.detail == "stopped after 1 of 2 steps: NaN"
    (check,), _ = trajectory_checks("s", [500, 0], Filled(None, [], "no batch of 2"), moved, 0.1)
    assert check.status == "not run"
    assert "no batch of 2" in check.detail


def test_the_scene_is_drawn_from_the_seed(manifest):
    first, again, other = (seeded_scene(manifest, 4, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.picture, again.picture)
    assert np.array_equal(first.options.noise, again.options.noise)
    assert not np.array_equal(first.picture, other.picture)
    assert 0.1 < first.mask.mean() < 0.4
    assert first.mask[1:-1, 1:-1].sum() == first.mask.sum()  # nothing at the border
