"""INT8 only where it wins on this machine: each layer timed in both forms, and what the command makes of it."""

import json
import os
import subprocess
import sys

import onnx
import pytest

pytest.importorskip("torch", reason="the bundle is a real export")
from typer.testing import CliRunner

from moebius_calibration.choice.graphs import same_node
from moebius_calibration.files import machine, timing
from moebius_calibration.files.machine import Timed, decision, slower, time_graph
from moebius_calibration.files.write import plans_of
from moebius_calibration.graph.cpu_candidates import candidates
from moebius_export.commands.app import app
from moebius_runtime import kernels
from moebius_runtime.bundle.bundle import Bundle

TIMED = {
    "a/MatMul": Timed("Int8Linear", 2.0, 1.0),
    "b/MatMul": Timed("Int8Linear", 1.0, 1.25),
    "c/FeedForward": Timed("Int8FeedForward", 3.0, 2.0),
}


def test_what_is_not_faster_stays_in_float(monkeypatch):
    monkeypatch.setattr(kernels, "in_words", lambda: "avx2")
    assert slower(TIMED) == {"b/MatMul": "no gain: INT8 takes 1.25 times as long as fp32 on this machine"}
    assert decision(TIMED) == (
        "this machine's kernels: avx2. Speed of INT8 over fp32, layer by layer: Int8FeedForward 1.5 to 1.5 (1 of 1 "
        "layers win), Int8Linear 0.8 to 2 (1 of 2 layers win). 2 of 3 layers can become INT8; the others stay in float"
    )
    alike = {"a": Timed("Int8Linear", 1.0, 1.0)}
    assert list(slower(alike)) == ["a"]
    assert decision(alike).endswith("INT8 wins nowhere: all layers stay in float")


def test_every_candidate_is_timed_with_the_kernels_in_use(fused_bundle):
    """In processes of their own, because kernels are chosen when they are first used."""
    script = (
        "import json, sys; from moebius_calibration.files.machine import *; from moebius_runtime.bundle.bundle import "
        "Bundle; from pathlib import Path; found = time_graph(Bundle.open(Path(sys.argv[1])), 'unet', rounds=1); "
        "print(json.dumps([kernels.in_words(), {node: [t.operator, t.float32, t.int8] for node, t in found.items()}]))"
    )
    model = onnx.load(str(Bundle.open(fused_bundle).model_file("unet")), load_external_data=False)
    expected = {node: candidate.operator for node, candidate in candidates(model)[0].items()}
    for variant in ("generic", "avx2"):
        command = [sys.executable, "-c", script, str(fused_bundle)]
        environment = os.environ | {kernels.SWITCH: variant}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if "this CPU has no" in done.stderr or "has no compiled kernels" in done.stderr:
            pytest.skip(f"no kernels of variant {variant} here")
        assert done.returncode == 0, done.stderr
        words, found = json.loads(done.stdout)
        assert words == variant
        assert {node: one[0] for node, one in found.items()} == expected
        assert all(seconds > 0 for one in found.values() for seconds in one[1:])


def test_equal_layers_are_timed_once(fused_bundle, monkeypatch):
    bundle, asked = Bundle.open(fused_bundle), []
    monkeypatch.setattr(machine, "_timed", lambda *given: asked.append(given[1]) or Timed(given[1].operator, 1.0, 1.0))
    found = time_graph(bundle, "unet")
    assert 7 <= len(asked) < len(found)
    assert {one.operator for one in asked} == {one.operator for one in found.values()}


@pytest.mark.parametrize("wins", ["feed-forwards", "nothing"])
def test_the_command_decides_by_it(wins, fused_bundle_copy, monkeypatch):
    """Layers that are slower here are float in both U-Nets' plans, with the reason; the others are INT8."""
    monkeypatch.setattr(machine, "_timed", _fake(wins))
    monkeypatch.setattr(timing, "compare_all", lambda *_: {})  # of whole graphs, which are too small here to tell
    quick = ["--pictures", "1", "--steps", "2", "--samples", "1", "--error", "10"]
    done = CliRunner().invoke(app, ["int8", str(fused_bundle_copy), "--target", "ort-cpu", *quick])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    plans = plans_of(Bundle.open(fused_bundle_copy), "ort-cpu")
    for name in ("unet", "unet_conditional"):
        plan = plans[name]
        assert {same_node(node).rpartition("/")[2] for node in plan.chosen} == (
            {"FeedForward"} if wins == "feed-forwards" else set()
        )
        slow = [reason for reason in plan.reasons.values() if "4.00 times as long as fp32 on this machine" in reason]
        assert len(slow) > 30
    assert f"this machine's kernels: {kernels.in_words()}. Speed of INT8 over fp32" in said
    assert ("INT8 wins nowhere: all layers stay in float" in said) is (wins == "nothing")


def _fake(wins):
    def timed(_, candidate, *__):
        fast = wins == "feed-forwards" and "FeedForward" in candidate.operator
        return Timed(candidate.operator, 1.0, 0.5 if fast else 4.0)

    return timed


def test_untimed_is_for_the_cpu(fused_bundle):
    done = CliRunner().invoke(app, ["int8", str(fused_bundle), "--untimed"])
    assert done.exit_code != 0
    assert "--untimed is an option of --target ort-cpu, and the target is tensorrt" in str(
        done.exception or done.output
    )
