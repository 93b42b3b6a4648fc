"""Graphs whose batch stays open: the file keeps it open, and a picture's result does not depend on the others."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import moebius_export.onnx_export.export  # noqa: E402, F401 - defines the operators of the exporter's table
from moebius_export.errors import ExportError  # noqa: E402
from moebius_export.network.wrappers import parted  # noqa: E402
from moebius_export.onnx_export.convert import GraphSpec, to_onnx  # noqa: E402
from moebius_runtime.backends import create_backend  # noqa: E402
from moebius_runtime.bundle.bundle import Bundle  # noqa: E402
from moebius_runtime.images.pictures import Picture  # noqa: E402
from moebius_runtime.pipeline import InpaintPipeline, make_options  # noqa: E402


class Halves(torch.nn.Module):
    """Both branches as the guided U-Net computes them: by `chunk`, or by `parted`."""

    def __init__(self, safe: bool) -> None:
        super().__init__()
        self.safe = safe

    def forward(self, sample):
        both = torch.cat([sample, sample * 3])
        first, second = parted(both, sample.shape[0]) if self.safe else both.chunk(2)
        return first + 2 * second


def spec(safe):
    return GraphSpec("halves", Halves(safe), {"sample": torch.ones(2, 3, 4, 4)}, "noise", dynamic=("sample",))


def test_an_axis_that_the_exporter_fixed_ends_the_export():
    """`chunk` makes torch.onnx fix the open batch at the example's 2, without an error of its own."""
    with pytest.raises(ExportError, match=r"halves: sample \[2, 3, 4, 4\] should be open at axis 0"):
        to_onnx(spec(safe=False), lambda stage: None)


def test_both_branches_part_at_an_open_batch():
    model = to_onnx(spec(safe=True), lambda stage: None)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param


@pytest.mark.slow
def test_every_graph_gives_a_picture_the_same_bytes_beside_others_as_alone(open_bundle):
    bundle = Bundle.open(open_bundle)
    backend = create_backend(bundle, "ort-cpu", threads=1)
    rng = np.random.default_rng(0)
    for graph, info in bundle.manifest.graphs.items():
        inputs = {
            tensor.name: np.array([500])
            if tensor.dtype == "int64"
            else rng.standard_normal([5 if size == "batch" else size for size in tensor.shape]).astype(np.float32)
            for tensor in info.inputs
        }
        several = backend.run(graph, inputs)
        assert len(several) == 5
        for size in (1, 2, 4):
            parts = [
                backend.run(graph, {n: a[first : first + size] if len(a) == 5 else a for n, a in inputs.items()})
                for first in range(0, 5, size)
            ]
            np.testing.assert_array_equal(np.concatenate(parts), several, err_msg=f"{graph}, {size} at a time")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"mode": "balanced"}, {"mode": "best", "steps": 2}], ids=str)
def test_pictures_of_a_batch_get_the_bytes_that_each_gets_alone(open_bundle, options):
    """With the masked decoder too, which takes one square a run in any bundle."""
    pipeline = InpaintPipeline.from_bundle(open_bundle, threads=1, memory="fast")
    requests = []
    for seed, (height, width) in enumerate([(128, 128), (150, 230), (128, 128), (300, 200), (128, 128)]):
        mask = np.zeros((height, width), bool)
        mask[40:72, 50:82] = True
        mask[height - 20 : height - 8, width - 20 : width - 8] = seed % 2
        pixels = np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)
        requests.append((Picture(pixels, "RGB"), mask, make_options(**options, seed=seed)))
    alone = [pipeline.inpaint(*request).picture.pixels for request in requests]
    for batch in (2, 3, 8):
        for one, other in zip(pipeline.inpaint_many(requests, batch=batch), alone, strict=True):
            np.testing.assert_array_equal(one.picture.pixels, other)
