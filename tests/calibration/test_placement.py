"""INT8 without a search: a shipped placement, and the check of the error budget."""

import json
import shutil
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from moebius_calibration import placed
from moebius_calibration.choice.graphs import same_node
from moebius_calibration.choice.search import Search
from moebius_calibration.placed import PlacedCalibrator
from moebius_calibration.placement import RELEASED, placement_from, read_placement, write_placement
from moebius_export.commands.app import app
from moebius_export.errors import ExportError, PrecisionError
from moebius_export.graph.opened import Opened, opened
from moebius_export.precision.shipped import RELEASED as RELEASED_PLAN
from moebius_export.precision.shipped import read_shipped
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.errors import InputError


def quiet(what, done, total):
    """A progress callback that says nothing."""


@pytest.fixture
def no_search(monkeypatch):
    def refuse(*args, **keywords):
        raise AssertionError("a search was begun")

    monkeypatch.setattr(Search, "trials", refuse)


@pytest.fixture(scope="module")
def file(calibrated, tmp_path_factory):
    """What the search of the tiny network placed, as a file."""
    folder, plans, _ = calibrated
    path = tmp_path_factory.mktemp("placement") / "placement.json"
    unet = Opened(opened(Bundle.open(folder).model_file("unet")))
    alone = Opened(opened(Bundle.open(folder).model_file("unet_conditional")))
    write_placement(placement_from(plans, unet, "tiny", "a search with random test weights", alone), path)
    return path


def made(bundle, options, path=None):
    notes = []
    return PlacedCalibrator(Bundle.open(bundle), options, quiet, notes.append, path).run(), notes


def test_a_file_of_a_search_only_needs_calibration(tiny_bundle, calibrated, options, file, no_search):
    searched = calibrated[1]
    plans, notes = made(tiny_bundle, replace(options, observer=None), file)
    assert notes == []
    for name, plan in plans.items():
        assert plan.chosen == searched[name].chosen, name
        assert plan.trials == []
        assert plan.psnr is None
        if not name.endswith("conditional") and plan.chosen:
            assert plan.observer == searched[name].observer
            assert bool(plan.bias_correction) == bool(searched[name].bias_correction)
            assert plan.ranges == searched[name].ranges
            # Not equal: of two convolutions at one addition the search's session has the second one's residual.
            assert plan.errors["plan"] == pytest.approx(searched[name].errors["plan"], rel=0.2)
            assert "given placement: a search with random test weights" in plan.verdict


def test_what_is_over_the_budget_is_refused_and_the_search_named(tiny_bundle, options, file, tmp_path):
    with pytest.raises(PrecisionError, match=r"unet is off by 0\.\d+, over --error 0\.001") as caught:
        made(tiny_bundle, replace(options, error=1e-3), file)
    assert f"moebius-export int8 {tiny_bundle} --target tensorrt --search" in str(caught.value)
    assert caught.value.exit_code == 1
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = sorted(folder.rglob("*"))
    arguments = ["int8", str(folder), "--placement", str(file), "--error", "0.001", "--pictures", "1", "--steps", "2"]
    assert isinstance(CliRunner().invoke(app, arguments).exception, PrecisionError)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-fp8"])
def test_an_unknown_network_gets_what_gains_in_the_unet(target, tiny_bundle, options, no_search):
    plans, notes = made(tiny_bundle, replace(options, target=target, observer="minmax", error=2.0))
    assert len(notes) == 1
    assert "no shipped INT8 placement for this network (the topology is " in notes[0]
    assert f"moebius-export int8 {tiny_bundle} --target {target} --search" in notes[0]
    unet, other = plans["unet"], plans["unet_conditional"]
    assert {same_node(node) for node in other.chosen} == {same_node(node) for node in unet.chosen}
    assert (
        len(unet.chosen) > 50
    )  # by the `rates` of these options: the built-in ones see no gain in a network this small
    assert unet.errors["plan"] > 0.01
    for name in ("vae_encoder", "vae_decoder"):
        assert plans[name].chosen == []
        assert set(plans[name].reasons.values()) == {"placement: this graph stays in float"}


@pytest.mark.slow
def test_the_command_calibrates_and_writes(tiny_bundle, file, tmp_path, no_search):
    folder = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    quickly = ["--pictures", "1", "--steps", "2", "--samples", "1", "--error", "0.4"]
    result = CliRunner().invoke(app, ["int8", str(folder), "--placement", str(file), *quickly])
    assert result.exit_code == 0, result.output
    assert "given placement" in result.output
    assert "int8: unet: check against the error budget (" in result.stderr
    Bundle.open(folder).model_file("unet", "int8")
    for asked in (["--search"], ["--psnr", "5"]):
        result = CliRunner().invoke(app, ["int8", str(folder), *quickly, "--observer", "minmax", *asked])
        assert "a search was begun" in str(result.exception)


EDITS = [
    (lambda c: c.update(topology="0" * 64), "a placement for another bundle"),
    (lambda c: c.update(target="ort-cpu"), "it is for ort-cpu, expected tensorrt"),
    (lambda c: c["graphs"]["unet"]["nodes"].append("nowhere/Conv"), "unet has no node nowhere/Conv"),
    (lambda c: c["graphs"].update(unet_conditional=c["graphs"]["unet"]), "whose nodes the other takes over"),
    (lambda c: c["graphs"].clear(), "whose nodes the other takes over"),
    (lambda c: c["graphs"]["unet"].update(observer="best"), "graphs.unet.observer"),
    (lambda c: c["graphs"]["unet"].update(smooth=float("nan")), "graphs.unet.smooth"),
    (lambda c: c.update(more=1), "more: "),
]


@pytest.mark.parametrize(("edit", "words"), EDITS, ids=[words for _, words in EDITS])
def test_a_stale_or_tampered_file_is_refused(edit, words, file, tiny_bundle, options, tmp_path):
    content = json.loads(file.read_text())
    edit(content)
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError) as caught:
        PlacedCalibrator(Bundle.open(tiny_bundle), options, quiet, pytest.fail, path)
    assert words in str(caught.value)
    assert "--save-placement" in str(caught.value)


def test_the_shipped_files_are_of_the_network_of_the_precision_plan():
    plan = read_shipped(RELEASED_PLAN)
    topology, alone = plan.topology, plan.conditional_topology
    assert alone not in (None, topology)
    for target, path in RELEASED.items():
        placement = read_placement(path)
        assert placement.topology == topology
        assert placement.conditional_topology == alone
        assert placement.target == ("ort-cpu" if target == "ort-cpu" else "tensorrt")
        assert "random test weights" in placement.derived
        assert placement.unet.nodes
        assert all("FeedForward" in node for node in placement.unet.nodes)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--placement", "x", "--search"], "--placement is applied without a search"),
        (["--placement", "x", "--reapply"], "--placement is applied without a search"),
        (["--search", "--weights-only"], "--search has no meaning with"),
        (["--save-placement", "x"], "add --search, or --reapply"),
    ],
)
def test_options_that_contradict_each_other(tiny_bundle, arguments, words):
    result = CliRunner().invoke(app, ["int8", str(tiny_bundle), *arguments])
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)


def test_the_check_runs_the_placed_products(tiny_bundle, options, file, monkeypatch):
    """A check that evaluates nothing would pass: it gets the products of all nodes in INT8."""
    seen = []

    class Recorded(placed.Switched):
        def set(self, nodes):
            seen.append(sorted(nodes))
            return super().set(nodes)

    monkeypatch.setattr(placed, "Switched", Recorded)
    plans, _ = made(tiny_bundle, options, file)
    assert seen[0] == sorted(plans["unet"].chosen)
