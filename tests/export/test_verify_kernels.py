"""Verification of a bundle with functions, where compiled kernels may take them: both ways are held to PyTorch."""

import shutil
from pathlib import Path

import onnx
import pytest

from moebius_export.graph.cost import node_costs, total_macs
from moebius_export.verify import VerifyOptions, verify
from moebius_runtime import kernels
from moebius_runtime.bundle.manifest import FileInfo, read_manifest, write_manifest
from moebius_runtime.files import sha256_file

QUICK = VerifyOptions(steps=2, bisect=True)
needs_library = pytest.mark.skipif(not kernels.library_path(), reason=f"compiled kernels: {kernels.in_words()}")


@pytest.fixture(scope="module")
def fused(fused_bundle, tmp_path_factory):
    """Preset tiny, fused. Tests change it one after the other."""
    return Path(shutil.copytree(fused_bundle, tmp_path_factory.mktemp("fused") / "bundle"))


def parity(report):
    """Subject -> the statuses of its rows of parity."""
    found = {}
    for check in report.checks:
        if check.area == "parity":
            found.setdefault(check.subject, set()).add(check.status)
    return found


def all_macs_are_found(report, bundle):
    for placement in report.placements:
        graph = placement.subject.split()[0]
        counted = total_macs(node_costs(bundle / read_manifest(bundle).graphs[graph].files["fp32"].model))
        ((provider, kind, gmac, share),) = placement.rows
        assert (provider, kind, share) == ("CPUExecutionProvider", "float", 1.0)
        assert gmac + placement.ahead == pytest.approx(counted / 1e9, rel=1e-12)


@needs_library
def test_kernels_and_bodies_are_both_held_to_pytorch(fused):
    report = verify(fused, QUICK)
    assert report.held, [c for c in report.checks if c.status not in ("pass", "note")]
    runs = kernels.in_words()
    assert report.facts["compiled kernels"] == runs
    found = parity(report)
    for graph in ("unet", "vae_encoder", "vae_decoder"):
        assert found[f"{graph} fp32, kernels {runs}"] == found[f"{graph} fp32, function bodies"] == {"pass"}
    all_macs_are_found(report, fused)


@pytest.mark.slow
def test_without_kernels_the_bodies_are_the_row(fused, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "off")
    report = verify(fused, QUICK)
    assert report.held, [c for c in report.checks if c.status not in ("pass", "note")]
    assert report.facts["compiled kernels"] == "none (MOEBIUS_KERNELS=off)"
    assert parity(report)["unet fp32"] == {"pass"}
    assert not any("bodies" in subject for subject in parity(report))
    all_macs_are_found(report, fused)


@needs_library
def test_a_wrong_body_is_seen_behind_a_right_kernel(fused):
    """The content term is left out of the body of Local-λ, which the kernel does not read."""
    path = fused / "unet" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    (function,) = [one for one in model.functions if one.name == "LocalLambda"]
    last = function.node[-1]
    assert last.op_type == "Add"
    last.input[1] = last.input[0]
    path.write_bytes(model.SerializeToString())
    manifest = read_manifest(fused)
    info = FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
    write_manifest(manifest.model_copy(update={"files": {**manifest.files, "unet/model.onnx": info}}), fused)
    report = verify(fused, QUICK)
    assert report.exit_code == 1
    found = parity(report)
    assert found[f"unet fp32, kernels {kernels.in_words()}"] == {"pass"}
    assert "fail" in found["unet fp32, function bodies"]
    (named,) = [c.detail for c in report.checks if c.area == "bisect"]
    assert "every tensor of the file is within" not in named  # it was looked for where it is, in the bodies
