"""Losses switched on and off: which settings a combination becomes, and what its row says."""

import pytest

from moebius.distill.ablation import COMBINATIONS, ablate, settings_of
from moebius.distill.settings import parse_settings
from moebius.errors import TrainingError

BASE = {
    "train": "student",
    "out": "run",
    "steps": 9,
    "batch": 2,
    "network": {"preset": "tiny"},
    "teacher": "stand-in",
    "vae": "stand-in",
    "data": {"pictures": [{"source": "scenes:50"}], "threads": 0},
    "losses": {"perceptual": 0, "coarse": 0.5},
    "ema": None,
}


def test_a_combination_changes_the_losses_only():
    base = parse_settings(BASE, "test")
    for name, active, balanced in COMBINATIONS:
        settings = settings_of(base, (name, active, balanced), 3)
        assert settings.losses.active == tuple(loss for loss in ("coarse", "task", "fine") if loss in active)
        assert settings.losses.coarse in (0, 0.5), "a multiplier of the base is kept"
        assert settings.balance.enabled == balanced
        assert settings.steps == 3
        assert settings.seed == base.seed
    assert len({settings_of(base, row, 3).out for row in COMBINATIONS}) == len(COMBINATIONS)


def test_what_a_combination_needs_must_be_there():
    alone = parse_settings(BASE | {"teacher": None, "losses": {"perceptual": 0, "coarse": 0, "fine": 0}}, "test")
    with pytest.raises(TrainingError, match="task \\+ fine compares with a teacher"):
        settings_of(alone, ("task + fine", ("task", "fine"), True), 3)
    with pytest.raises(TrainingError, match="needs `perceptual"):
        settings_of(alone, ("perceptual", ("task", "perceptual"), True), 3)


def test_each_is_trained_from_the_same_weights(tmp_path):
    """Steps of no length: all rows then have one network, so whatever differs came from elsewhere."""
    still = BASE | {"out": str(tmp_path), "optimizer": {"learning_rate": 0.0}, "batch_norm": "frozen"}
    sums = []

    def measure(student):
        sums.append(sum(float(parameter.detach().double().sum()) for parameter in student.parameters()))
        return 1.0, 2.0

    rows = ablate(parse_settings(still, "test"), 1, measure, combinations=COMBINATIONS[:3])
    assert [row.name for row in rows] == [name for name, _, _ in COMBINATIONS[:3]]
    assert len(set(sums)) == 1
