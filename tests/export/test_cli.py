"""`moebius-export onnx`: what its options mean together, and what it prints. The export itself is played."""

import pytest
from typer.testing import CliRunner

from moebius_export.commands.app import app
from moebius_export.onnx_export import export as exporting
from moebius_export.rules import RULE_NAMES
from moebius_runtime.bundle.manifest import read_manifest
from moebius_runtime.errors import InputError


@pytest.fixture
def asked(monkeypatch, fused_bundle):
    """The options that the command hands to the export, which then answers with a fused bundle's manifest."""
    options = []

    def export(_out, given, _progress, _note, *, two_processes):
        assert two_processes
        options.append(given)
        return read_manifest(fused_bundle)

    monkeypatch.setattr(exporting, "export_onnx", export)
    return options


def invoke(*arguments):
    return CliRunner().invoke(app, ["onnx", "--out", "unused", *arguments])


@pytest.mark.parametrize(
    ("arguments", "rules", "target"),
    [
        ([], RULE_NAMES, "ort-cpu"),
        (["--fuse", "--target", "tensorrt"], RULE_NAMES, "tensorrt"),
        (["--no-fuse"], (), "ort-cpu"),
        (["--rules", "fold_batch_norms,share_prefix"], ("fold_batch_norms", "share_prefix"), "ort-cpu"),
    ],
)
def test_the_network_is_fused_unless_asked_otherwise(asked, arguments, rules, target):
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    (options,) = asked
    assert (options.rules, options.target) == (rules, target)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--no-fuse", "--rules", "share_prefix"], "--rules share_prefix has no effect with --no-fuse"),
        (["--no-fuse", "--target", "generic"], "--target generic has no effect with --no-fuse"),
        (["--precision", "fp8"], "--precision fp8: expected some of fp32, fp16, bf16"),
        (["--precision", "fp16,bf16"], "two lower precisions need fp32 too"),
    ],
)
def test_options_that_contradict_each_other_are_refused(asked, arguments, words):
    result = invoke(*arguments)
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)
    assert asked == []


@pytest.mark.parametrize(
    ("precision", "typed"),
    [("fp32", []), ("fp32,fp16", [("fp16", False)]), ("fp16", [("fp16", True)]), ("bf16,fp32", [("bf16", False)])],
)
def test_precisions_are_typed_after_the_export(asked, fused_bundle, monkeypatch, precision, typed):
    calls = []

    def type_bundle(path, options, *, only):
        calls.append((options.to, only))
        return read_manifest(fused_bundle)

    monkeypatch.setattr("moebius_export.commands.onnx.type_bundle", type_bundle)
    assert invoke("--precision", precision).exit_code == 0
    assert len(asked) == 1
    assert calls == typed


def test_how_often_each_rule_fired_and_its_gmac_are_printed(asked, fused_bundle):
    lines = [line.split() for line in invoke().output.splitlines()]
    for rewrite in read_manifest(fused_bundle).rewrites:
        macs = [f"{macs / 1e9:.6g}" for macs in (rewrite.macs_before, rewrite.macs_after)]
        assert [rewrite.graph, rewrite.name, str(rewrite.count), *macs] in lines
