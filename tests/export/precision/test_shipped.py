"""Plans without a search: a shipped plan, the fixed rules alone, and what checks them."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moebius_export.commands.app import app
from moebius_export.errors import ExportError, PrecisionError
from moebius_export.graph.opened import Opened, opened
from moebius_export.precision import choose, quick, rules, shipped
from moebius_export.precision.plan import read_plan
from moebius_export.precision.planning import Planner, PlanOptions
from moebius_export.precision.quick import QuickPlanner, make_plans, quick_options
from moebius_export.precision.shipped import (
    RELEASED,
    is_topology_of,
    read_shipped,
    shipped_from,
    topology_of,
    write_shipped,
)
from moebius_export.precision.trials import Trials
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.errors import InputError

SEARCH = PlanOptions(pictures=1, steps=2, evaluations=8, samples=1, error=2e-3)
QUICK = quick_options(steps=2)


def silent(what, done, total):
    """A progress callback that says nothing."""


@pytest.fixture(scope="module")
def searched(fused_bundle):
    """The plan of a search of the tiny network."""
    return Planner(Bundle.open(fused_bundle), SEARCH, silent).run()["unet"]


@pytest.fixture(scope="module")
def unet(fused_bundle):
    return Opened(opened(Bundle.open(fused_bundle).model_file("unet")))


@pytest.fixture(scope="module")
def conditional(fused_bundle):
    return Opened(opened(Bundle.open(fused_bundle).model_file("unet_conditional")))


@pytest.fixture(scope="module")
def file(searched, unet, conditional, tmp_path_factory):
    """What that search found, as a file."""
    path = tmp_path_factory.mktemp("shipped") / "plan.json"
    write_shipped(shipped_from(searched, unet, "tiny", "random test weights", conditional), path)
    return path


@pytest.fixture
def no_search(monkeypatch):
    def refuse(*args, **keywords):
        raise AssertionError("a search was begun")

    monkeypatch.setattr(choose.Chooser, "__init__", refuse)


def made(bundle, options=QUICK, path=None):
    notes = []
    return make_plans(Bundle.open(bundle), options, silent, notes.append, shipped=path), notes


def kept(plan):
    return {name for name, node in plan.nodes.items() if node.type == "fp32"}


def test_a_file_of_a_search_gives_the_search_s_plan_again(searched, file, fused_bundle, no_search):
    assert any(node.reason.startswith("error") for node in searched.nodes.values())
    plans, notes = made(fused_bundle, path=file)
    assert notes == []
    plan = plans["unet"]
    assert kept(plan) == kept(searched)
    assert plan.stores == searched.stores
    assert plan.source == "given plan: random test weights"
    assert plan.errors["plan"] == pytest.approx(searched.errors["plan"], rel=0.3)  # of another run
    errors = {name for name, node in plans["unet_conditional"].nodes.items() if node.reason.startswith("error")}
    assert errors
    assert all(node.largest is not None for node in plans["unet_conditional"].nodes.values())
    assert all(weight.type == "fp16" for weight in plans["vae_decoder"].weights.values() if not weight.reason)


@pytest.mark.parametrize("keep", [(), ("LocalLambda",)])
def test_one_file_serves_every_lowering(searched, file, tensorrt_bundle, unet, no_search, keep):
    lowered = Bundle.open(tensorrt_bundle).model_file("unet")
    assert topology_of(Opened(opened(lowered))) == topology_of(unet)
    planner = QuickPlanner(Bundle.open(tensorrt_bundle), replace(QUICK, keep=keep), silent, pytest.fail, file)
    assert planner.plan is not None
    there = set(shipped.kept_nodes(planner.plan, planner.graphs["unet"]))
    same = {name for name in searched.nodes if name in planner.graphs["unet"].nodes and "Lambda" not in name}
    errors = {name for name, node in searched.nodes.items() if node.reason.startswith("error")}
    assert errors & same
    assert errors & same <= there


@pytest.mark.slow
def test_the_same_file_serves_the_one_graph_of_a_distilled_network(searched, file, distilled_bundle, no_search):
    plans, notes = made(distilled_bundle, path=file)
    assert set(plans) == {"unet", "vae_encoder", "vae_decoder"}
    assert notes == []
    alone, both = (
        {shipped.stored_name(name) for name, node in plan.nodes.items() if node.reason.startswith("error")}
        for plan in (plans["unet"], searched)
    )
    assert alone
    assert alone <= both
    assert plans["unet"].source == "given plan: random test weights"


def test_a_file_without_the_conditional_topology_does_not_serve_it(searched, unet, distilled_bundle):
    plan = shipped_from(searched, unet, "tiny", "random test weights")
    alone = Opened(opened(Bundle.open(distilled_bundle).model_file("unet")))
    assert plan.mismatch(unet) == ""
    assert plan.mismatch(alone).startswith("its topology is ")


def test_the_topology_is_that_of_names_and_shapes(unet, tiny_bundle, fused_bundle):
    other = Opened(opened(Bundle.open(tiny_bundle).model_file("unet")))  # as written, without rewrites
    alone = Opened(opened(Bundle.open(fused_bundle).model_file("unet_conditional")))
    assert len({topology_of(graph) for graph in (unet, other, alone)}) == 3
    changed = Opened(type(unet.model)())
    changed.model.CopyFrom(unet.model)
    tensor = next(t for t in changed.model.graph.initializer if t.name in unet.storable and len(t.dims) == 2)
    tensor.dims[0], tensor.dims[1] = tensor.dims[1] + 1, tensor.dims[0]
    assert topology_of(changed) != topology_of(unet)


def test_an_unknown_network_gets_the_rules_alone_and_the_search_is_offered(fused_bundle, no_search):
    plans, notes = made(fused_bundle)
    assert len(notes) == 1
    assert "no shipped precision plan for this network (its topology is " in notes[0]
    assert f"moebius-export precision {fused_bundle} --to fp16 --search" in notes[0]
    reasons = {node.reason.partition(":")[0] for node in plans["unet"].nodes.values() if node.type == "fp32"}
    assert "norm statistics" in reasons
    assert not reasons & {"error", "overflow"}
    assert plans["unet"].source == "fixed rules alone"
    assert 1e-4 < plans["unet"].errors["plan"] < quick.STEP_ERROR["fp16"]


@pytest.mark.slow
def test_values_near_the_end_of_the_range_stay_float32(fused_bundle, file, monkeypatch, no_search):
    """Whatever the plan says. The limit is lowered into what this network has, in place of other weights."""
    before = made(fused_bundle, path=file)[0]
    largest = sorted(node.largest for node in before["unet"].nodes.values())
    limit = largest[-len(largest) // 10]
    monkeypatch.setattr(rules, "MARGIN", 65504 / limit)
    plans = made(fused_bundle, path=file)[0]
    for name in ("unet", "unet_conditional"):
        over = {node: entry for node, entry in plans[name].nodes.items() if entry.reason.startswith("overflow")}
        assert over
        assert set(over) - kept(before[name])
        assert all(entry.type == "fp32" for entry in over.values())
        assert all(entry.type == "fp32" for entry in plans[name].nodes.values() if entry.largest > limit)


def test_a_step_that_is_not_finite_or_far_off(fused_bundle, file, monkeypatch):
    monkeypatch.setattr(Trials, "error", lambda *args: float("inf"))
    with pytest.raises(PrecisionError, match=r"numbers that are not finite.*--to fp16 --search") as caught:
        made(fused_bundle, path=file)
    assert caught.value.exit_code == 1
    monkeypatch.setattr(Trials, "error", lambda *args: 0.05)
    [note] = made(fused_bundle, path=file)[1]
    assert "a step in fp16 is off by 5.0e-02" in note
    assert "--search" in note


EDITS = [
    (lambda c: c.update(topology="0" * 64), "a plan of another network"),
    (lambda c: c["modules"].append({**c["modules"][0], "module": "nowhere.0"}), "it has no nowhere.0"),
    (lambda c: c["weights"].append("nowhere.weight"), "it has no weight nowhere.weight"),
    (lambda c: c["modules"].append(c["modules"][0]), "is named twice"),
    (lambda c: c["modules"][0].update(kind="some"), "modules.0.kind"),
    (lambda c: c["modules"][0].update(error=float("nan")), "modules.0.error"),
    (lambda c: c["modules"][0].update(error=-1), "modules.0.error"),
    (lambda c: c.update(colour="red"), "colour"),
    (lambda c: c.pop("topology"), "topology"),
    (lambda c: c.update(schema_version=2), "schema_version"),
]


@pytest.mark.parametrize(("edit", "words"), EDITS, ids=[words for _, words in EDITS])
def test_a_stale_or_tampered_file_is_refused(edit, words, file, fused_bundle, tmp_path):
    content = json.loads(file.read_text())
    edit(content)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ExportError, match=words.replace(".", r"\.")) as caught:
        QuickPlanner(Bundle.open(fused_bundle), QUICK, silent, pytest.fail, path)
    assert "--save-plan" in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b" " * (2 << 20)])
def test_what_is_no_plan(data, tmp_path):
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(ExportError, match="expected a plan that"):
        read_shipped(tmp_path / "plan.json")
    with pytest.raises(ExportError, match="expected a plan that"):
        read_shipped(tmp_path / "missing.json")


def test_the_shipped_file_says_what_it_was_made_from():
    plan = read_shipped(RELEASED)
    assert "226,041,531" in plan.network
    assert "random test weights" in plan.derived
    assert plan.modules
    assert plan.errors["plan"] < plan.errors["blunt"]


@pytest.mark.slow
def test_a_quick_plan_is_not_saved_as_one_of_a_search(fused_bundle, unet):
    with pytest.raises(ExportError, match="was not made by the search"):
        shipped_from(made(fused_bundle)[0]["unet"], unet, "tiny", "none")


@pytest.mark.slow
def test_the_command_searches_only_when_asked(fused_bundle_copy, no_search, tmp_path):
    """It says its stages on plain lines, as there is no terminal."""
    result = CliRunner().invoke(app, ["precision", str(fused_bundle_copy), "--steps", "2"])
    assert result.exit_code == 0, result.output
    assert "precision: weights of unet (" in result.stderr
    assert "precision: write vae_decoder: 3 of 4 (" in result.stderr
    assert "no shipped precision plan for this network" in result.stderr
    assert set(read_manifest(fused_bundle_copy).graphs["unet"].files) == {"fp32", "fp16"}
    for asked in (["--search"], ["--evaluations", "4"], ["--error", "1e-3"], ["--samples", "1"]):
        result = CliRunner().invoke(
            app, ["precision", str(fused_bundle_copy), "--steps", "2", "--pictures", "1", *asked]
        )
        assert "a search was begun" in str(result.exception)


@pytest.mark.slow
def test_the_command_saves_a_plan_and_takes_it(fused_bundle, tmp_path, monkeypatch):
    bundle, path = shutil.copytree(fused_bundle, tmp_path / "bundle"), tmp_path / "plan.json"
    quickly = ["--pictures", "1", "--steps", "2", "--samples", "1", "--evaluations", "6"]
    result = CliRunner().invoke(app, ["precision", str(bundle), "--search", *quickly, "--save-plan", str(path)])
    assert result.exit_code == 0, result.output
    first = read_plan(bundle / "unet/precision_fp16.json")
    result = CliRunner().invoke(app, ["precision", str(bundle), "--plan", str(path), "--steps", "2"])
    assert result.exit_code == 0, result.output
    second = read_plan(bundle / "unet/precision_fp16.json")
    assert kept(second) == kept(first)
    assert second.source.startswith("given plan: a search with random test weights (stand-in")
    monkeypatch.setattr(quick, "RELEASED", path)  # as if this network were the released one
    result = CliRunner().invoke(app, ["precision", str(bundle), "--steps", "2"])
    assert "no shipped" not in result.stderr
    assert read_plan(bundle / "unet/precision_fp16.json").source.startswith("shipped plan")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--search", "--reapply"], "--search searches, and --reapply does not"),
        (["--evaluations", "3", "--plan", "x"], "--evaluations searches, and --plan does not"),
        (["--reapply", "--plan", "x"], "leave one of them out"),
        (["--save-plan", "x"], "--save-plan writes the result of a search: add --search"),
    ],
)
def test_options_that_contradict_each_other(fused_bundle, arguments, words):
    result = CliRunner().invoke(app, ["precision", str(fused_bundle), *arguments])
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)


def test_the_exporters_numbers_of_constants_are_no_part_of_the_topology(unet, conditional):
    """A newer torch numbers them otherwise. Files of version 0.1, in whose hashes they count, still fit."""
    weight = unet.stored[min(unet.storable)]

    def named(name):
        return SimpleNamespace(storable=[name], stored={name: weight}, model=unet.model, computes=unet.computes)

    first, second, other = map(named, ("val_3", "val_40", "a"))
    assert topology_of(first) == topology_of(second) != topology_of(other)
    old = shipped._hashed(first, lambda name: name)
    assert is_topology_of(first, old, None)
    assert not is_topology_of(second, old, None)
    assert is_topology_of(unet, topology_of(conditional), topology_of(unet))
