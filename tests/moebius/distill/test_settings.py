"""The training file: what it may say, and what it is told when it says something else."""

import pytest

from moebius.distill.objectives.losses import Tap
from moebius.distill.settings import changed, load_settings, parse_settings
from moebius.errors import TrainingError

STUDENT = {
    "train": "student",
    "out": "run",
    "steps": 3,
    "batch": 2,
    "teacher": "stand-in",
    "data": {"latents": "encoded"},
    "losses": {"perceptual": 0},
    "network": {"preset": "tiny"},
}


def test_the_defaults_are_the_papers():
    settings = parse_settings(STUDENT, "here")
    assert (settings.losses.coarse, settings.losses.task, settings.losses.fine) == (1.0, 1.0, 1.0)
    assert settings.balance.exponent == 2.0
    assert settings.optimizer.learning_rate == 2e-4
    assert tuple(settings.schedule.milestones) == (111_000, 129_000)
    assert settings.timesteps.noise_offset == 0.0357
    assert settings.losses.taps == (Tap(2, 5),)


def test_taps_and_sizes_can_be_written_short():
    settings = parse_settings(
        STUDENT
        | {"losses": {"perceptual": 0, "taps": ["1:4:0.5"]}, "network": {"preset": "tiny", "student": {"window": 5}}},
        "here",
    )
    assert settings.losses.taps == (Tap(1, 4, 0.5),)
    assert settings.network.build().student.window == 5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"unknown": 1}, "unknown: Extra inputs are not permitted"),
        ({"steps": 0}, "steps: Input should be greater than or equal to 1"),
        ({"steps": "many"}, "steps: .* (received 'many')"),
        ({"losses": {"percep": 0}}, "losses: no percep here; expected some of coarse, task"),
        ({"losses": {"task": -1, "perceptual": 0}}, "the multiplier of task is -1"),
        ({"losses": {"perceptual": 0, "taps": ["x"]}}, "tap 'x': expected STUDENT:TEACHER"),
        ({"losses": {}}, "the perceptual loss is on .* write `perceptual: 0`"),
        ({"balance": {"exponent": -1}}, "the balance's exponent is -1"),
        ({"optimizer": {"lr": 1}}, "optimizer: no lr here; expected some of learning_rate"),
        ({"teacher": None}, "coarse and fine compare with a teacher and `teacher` is null"),
        ({"data": {"pictures": [{"source": "scenes:3"}]}}, "a `vae` must encode them"),
        ({"data": {}}, "expected either `pictures` or `latents`"),
        ({"train": "vae", "teacher": None}, "the VAE is trained on pictures"),
        ({"train": "teacher"}, "`teacher` is for `train: student`"),
        ({"samples": {"every": 5}}, "`samples` are pictures, so they need a `vae`"),
        ({"network": {"preset": "huge"}}, "there is no preset 'huge'"),
        ({"network": {"preset": "tiny", "student": {"windows": 5}}}, "do not fit StudentConfig"),
        ({"network": {"preset": "tiny", "student": {"window": 4}}}, "window 4 is even"),
    ],
)
def test_refusals(change, words):
    with pytest.raises((TrainingError, ValueError)) as caught:
        parse_settings(STUDENT | change, "here")
    import re

    assert re.search(words.replace("(", r"\(").replace(")", r"\)"), str(caught.value)), caught.value


def test_files(tmp_path):
    path = tmp_path / "c.yaml"
    with pytest.raises(TrainingError, match="cannot read"):
        load_settings(path)
    path.write_text("a: [")
    with pytest.raises(TrainingError, match="is not YAML"):
        load_settings(path)
    path.write_text("- 1")
    with pytest.raises(TrainingError, match="holds a list; expected names and values"):
        load_settings(path)
    path.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(TrainingError, match="is not YAML"):
        load_settings(path)
    path.write_bytes(b" " * (1 << 21))
    with pytest.raises(TrainingError, match="larger than 1 MiB"):
        load_settings(path)


def test_what_changed_since_a_run_is_named_and_new_options_count_as_their_defaults():
    now = parse_settings(STUDENT, "test")
    before = now.identity()
    assert changed(before, now) == []
    del before["hole_weight"], before["network"]["prediction_type"]  # as written before they existed
    assert changed(before, now) == []
    other = parse_settings(
        STUDENT | {"hole_weight": 20, "network": {"preset": "tiny", "prediction_type": "v_prediction"}}, "test"
    )
    assert sorted(changed(before, other)) == ["hole_weight", "network"]
    assert changed(before | {"strange": 1}, now) == ["strange: Extra inputs are not permitted (received 1)"]
