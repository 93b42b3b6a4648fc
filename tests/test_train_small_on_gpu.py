"""scripts/train-small-on-gpu.sh at toy length, on the CPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moebius import preset
from moebius.distill.settings import load_settings
from moebius.weights.load import load_student

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts/train-small-on-gpu.sh"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
TOY = {
    "PICTURES": "2",
    "MASKS": "1",
    "STEPS": "1",
    "BATCH": "2",
    "WHOLE_STEPS": "1",
    "WHOLE_BATCH": "1",
    "THREADS": "0",
}


def run(*arguments, **variables):
    environment = os.environ | TOY | {"PYTHON": sys.executable, "DEVICE": "cpu"} | variables
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)


def test_wrong_calls_are_refused(tmp_path):
    for done in (run(), run(tmp_path / "out", PYTHON="no-such-python")):
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_from_data_to_weights_and_again(tmp_path):
    out = tmp_path / "out"
    done = run(out)
    assert done.returncode == 0, done.stderr
    assert f"{out}/whole" in done.stdout
    student, checkpoint = load_student(str(out / "whole"), preset("small").student)
    assert not checkpoint.stand_in
    before, _ = load_student("shipped:small", preset("small").student)
    weights = zip(student.parameters(), before.parameters(), strict=True)
    assert sum(not ours.equal(theirs) for ours, theirs in weights) > 500  # of 620
    for name, steps in (("near", 1), ("whole", 1)):
        made = load_settings(out / f"{name}.yaml")
        recipe = yaml.safe_load((ROOT / f"moebius/small/recipe/{name}.yaml").read_text())
        assert made.steps == made.schedule.cosine == steps
        assert made.hole_weight == recipe["hole_weight"]
    again = run(out)  # everything is there already
    assert again.returncode == 0, again.stderr
    assert "step" not in again.stdout
