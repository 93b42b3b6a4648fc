"""What the command passes on."""

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moebius_batch import cli, run
from moebius_runtime.cli import inpaint

ONE_PICTURE = {  # options of moebius-inpaint that make no sense for a job, which has its own for the first three
    *("image", "mask", "runtime", "noise", "save_comparison", "keep_loaded", "overwrite", "recursive", "format"),
}


def asked_for(monkeypatch, *given):
    asked = []
    monkeypatch.setattr(run, "run_job", lambda request: asked.append(request) or 0)
    done = CliRunner().invoke(cli.app, ["photos", "--out", "filled", *given])
    assert done.exit_code == 0, done.output
    return asked[0]


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ([], {"mode": "best"}),
        (["--mode", "fast"], {"mode": "fast"}),  # its sampler is the mode's, and the bundle's where it was distilled
        (["--sampler", "unipc", "--steps", "3"], {"mode": "best", "sampler": "unipc", "steps": 3}),
        (["--guidance-scale", "1", "--guidance-interval", "200:800"],
         {"mode": "best", "guidance_scale": 1.0, "guidance_interval": [200, 800]}),
        (["--decode", "masked", "--vae-decoder", "full"], {"mode": "best", "decode": "masked", "vae_decoder": "full"}),
        (["--start", "pixels", "--mask-reduce", "max"], {"mode": "best", "start": "pixels", "mask_reduce": "max"}),
        (["--fit", "whole", "--blend", "hard", "--mask-dilate", "auto", "--strength", "0.5", "--compensate-colour"],
         {"mode": "best", "fit": "whole", "blend": "hard", "mask_dilate": "auto", "strength": 0.5,
          "compensate_colour": True}),
    ],
)  # fmt: skip
def test_what_is_not_given_is_left_to_mode_and_bundle(monkeypatch, given, options):
    assert asked_for(monkeypatch, *given).options == {**options, "max_squares": 64}


def test_the_device_of_a_runtime(monkeypatch):
    asked = asked_for(monkeypatch, "--runtime", "openvino", "--device", "GPU")
    assert (asked.runtime, asked.device) == ("openvino", "GPU")


def test_every_option_of_moebius_inpaint_is_there_and_declared_once():
    theirs, ours = (inspect.signature(one, eval_str=True).parameters for one in (inpaint, cli.batch))
    shared = theirs.keys() - ONE_PICTURE - {"out", "bundle", "threads", "seed"}
    assert shared <= ours.keys()
    for name in shared:
        assert ours[name].annotation == theirs[name].annotation, name
        assert ours[name].default == theirs[name].default, name


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--guidance-interval", "5"], "expected LOW:HIGH"),
        (["--mask-dilate", "-1"], "expected auto or a whole number"),
        (["--runtime", "auto"], "--runtime auto: workers and later runs could take different runtimes"),
        (
            ["--vae-decoder", "tiny", "--start", "cells", "--mode", "reference"],
            "mode reference starts from the picture",
        ),
    ],
)
def test_wrong_values_are_one_sentence(given, text, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["moebius-batch", "photos", "--out", "filled", *given])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert leaving.value.code == 2
    errors = capsys.readouterr().err
    assert text in re.sub(r"\s+", " ", errors)
    assert errors.count("error:") == 1


@pytest.mark.parametrize(
    ("given", "remote", "expected"),
    [("hub:owner/bundle", object(), "hub:owner/bundle"), ("bundle", None, str(Path("bundle").absolute()))],
)
def test_workers_get_the_bundle_of_a_hub_by_its_name(given, remote, expected):
    """They fetch it themselves; as a path below the current folder it would be nowhere."""
    request = run.Request(source="in", out="out", bundle=Path(given))
    source = SimpleNamespace(kind="folder", mask=None)
    assert run._settings(request, source, SimpleNamespace(remote=remote)).bundle == expected
