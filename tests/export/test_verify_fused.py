"""`moebius-export verify` of a rewritten bundle: a good one passes, and a planted fault is found in the right layer.

Rewritten graphs hold few tensors of the checkpoint as they were, and functions; so nothing may hinge on either.
"""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from moebius_export.graph.cost import node_costs, total_macs
from moebius_export.verify import VerifyOptions, verify
from moebius_runtime import kernels
from moebius_runtime.bundle.manifest import FileInfo, read_manifest, write_manifest
from moebius_runtime.files import sha256_file

QUICK = VerifyOptions(steps=2, bisect=True)


def parity_subjects(graph):
    """The rows of a graph with functions: one for each way to run these."""
    if kernels.library_path() is None:
        return {f"{graph} fp32"}
    return {f"{graph} fp32, kernels {kernels.in_words()}", f"{graph} fp32, function bodies"}


def test_a_good_bundle_passes_every_check(fused_bundle):
    report = verify(fused_bundle, QUICK)
    assert report.held, [c for c in report.checks if c.status not in ("pass", "note")]
    manifest = read_manifest(fused_bundle)
    asked = {(check.area, check.subject) for check in report.checks}
    for graph in manifest.graphs:
        assert {(area, f"{graph} fp32") for area in ("files", "weights", "placement")} <= asked
        assert {("parity", subject) for subject in parity_subjects(graph)} <= asked
    for placement in report.placements:
        file = manifest.graphs[placement.subject.split()[0]].files["fp32"]
        ((provider, kind, gmac, share),) = placement.rows
        assert (provider, kind, share) == ("CPUExecutionProvider", "float", 1.0)
        assert gmac + placement.ahead == pytest.approx(total_macs(node_costs(fused_bundle / file.model)) / 1e9)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("attn1.window", "attn1"),
        pytest.param("attn2.values", "attn2", marks=pytest.mark.slow),
        pytest.param("ff.depth_conv.conv.weight", "ff", marks=pytest.mark.slow),
    ],
)
def test_a_derived_tensor_off_by_one_per_cent(fused_bundle_copy, name, module):
    layer = "up_blocks.0.attentions.1.transformer_blocks.0"
    path = fused_bundle_copy / "unet" / "model.onnx"
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == f"student.diff_model.{layer}.{name}"]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.01), tensor.name))
    onnx.save(model, path)
    manifest = read_manifest(fused_bundle_copy)
    info = FileInfo(size=path.stat().st_size, sha256=sha256_file(path))
    changed = {**manifest.files, "unet/model.onnx": info}
    write_manifest(manifest.model_copy(update={"files": changed}), fused_bundle_copy)
    report = verify(fused_bundle_copy, QUICK)
    assert report.exit_code == 1
    wrong = {(check.subject, check.name) for check in report.checks if check.status == "fail"}
    rows = parity_subjects("unet")
    assert {(subject, "relative error") for subject in rows} <= wrong
    assert {subject for subject, _ in wrong} <= rows | {"fp32 on ort-cpu"}  # and nothing else is blamed
    (found,) = [check.detail for check in report.checks if check.area == "bisect"]
    assert found.startswith(f"{layer}.{module}/")
