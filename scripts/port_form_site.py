"""Writes a site whose U-Net has the graph form of the public browser port (simonw/moebius-web), to be timed with ours.

That form, by the port's own notes: the λ layers unfused, their 1x15x15 convolution as a Conv2d over folded slices,
traced with both branches as a batch of 2, opset 18, one fp32 file. Inputs and output are those of our U-Net, so that
the device check compares it with PyTorch. The VAE is not part of the site.

    python scripts/port_form_site.py SITE OUT --weights stand-in
    moebius-bench browser OUT SITE --graph unet
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import onnx
import torch
from torch import Tensor, nn

from moebius import preset
from moebius.network.lambda_layers import LocalLambda
from moebius.weights.load import load_student
from moebius_export.network.wrappers import GuidedUNet
from moebius_export.onnx_export.examples import example_inputs

_OPSET = 18


class _FoldedConvolution(nn.Module):
    """The position convolution as a Conv2d: [B, 1, v, H, W] -> [B, k, v, H, W]."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(convolution.weight.squeeze(2))  # [k, 1, r, r]
        self.bias = convolution.bias
        self.padding = convolution.padding[1]

    def forward(self, values: Tensor) -> Tensor:
        batch, _, depth, height, width = values.shape
        folded = values.reshape(batch * depth, 1, height, width)
        found = nn.functional.conv2d(folded, self.weight, self.bias, padding=self.padding)  # [B*v, k, H, W]
        return found.reshape(batch, depth, -1, height, width).permute(0, 2, 1, 3, 4)


def main() -> None:
    """Writes OUT."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path, help="of `moebius-export web`, of the same weights")
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--weights", default="stand-in")
    parser.add_argument("--preset", default="full")
    given = parser.parse_args()
    sizes = preset(given.preset)
    step = GuidedUNet(load_student(given.weights, sizes.student)[0]).eval()
    for module in step.modules():
        if isinstance(module, LocalLambda):
            module.pos_conv = _FoldedConvolution(module.pos_conv)
    inputs = example_inputs("unet", sizes, 1)
    shutil.copytree(given.site, given.out, ignore=shutil.ignore_patterns("shards"))
    (given.out / "shards").mkdir()
    with tempfile.TemporaryDirectory(dir=given.out) as scratch:
        file = Path(scratch) / "unet.onnx"
        torch.onnx.export(
            step,
            tuple(inputs.values()),
            file,
            dynamo=False,
            opset_version=_OPSET,
            input_names=list(inputs),
            output_names=["noise_pred"],
        )
        content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (given.out / f"shards/{digest}.bin").write_bytes(content)
    described = json.loads((given.site / "site.json").read_text())
    nodes = len(onnx.load_from_string(content).graph.node)
    model = [{"sha256": digest, "size": len(content)}]
    described["graphs"] = {"unet": {"model": model, "data": {}, "nodes": nodes}}
    described["size"] = len(content)
    (given.out / "site.json").write_text(json.dumps(described, indent=1))


if __name__ == "__main__":
    main()
