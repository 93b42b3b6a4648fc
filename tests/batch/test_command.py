"""What the command passes on."""

import pytest
from typer.testing import CliRunner

from moebius_batch import cli, run


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([], {"mode": "best"}),
        (["--mode", "fast"], {"mode": "fast"}),  # its sampler is the mode's, and the bundle's where it was distilled
        (["--sampler", "unipc", "--steps", "3"], {"mode": "best", "sampler": "unipc", "steps": 3}),
    ],
)
def test_what_is_not_given_is_left_to_mode_and_bundle(monkeypatch, given, options):
    asked = []
    monkeypatch.setattr(run, "run_job", lambda request: asked.append(request) or 0)
    done = CliRunner().invoke(cli.app, ["photos", "--out", "filled", *given])
    assert done.exit_code == 0, done.output
    assert asked[0].options == {**options, "max_squares": 64}
