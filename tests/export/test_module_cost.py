"""The cost of a module before there is a file, against the counter of files, which shares nothing with it."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from moebius import VaeDecoder, preset
from moebius.network import lambda_ops
from moebius.weights.load import load_student, load_vae
from moebius_export.errors import CostError
from moebius_export.graph.cost import node_costs, total_macs
from moebius_export.graph.functions import FORMS
from moebius_export.network.module_cost import module_macs
from moebius_export.network.wrappers import GuidedUNet
from moebius_export.onnx_export.convert import GraphSpec, to_onnx
from moebius_export.onnx_export.examples import example_inputs
from moebius_export.rules import RULE_NAMES, rewrite_decoder, rewrite_unet
from moebius_export.rules.base import Rule
from moebius_runtime.bundle.manifest import read_manifest


def test_every_rewrite_says_what_it_saved_and_the_last_agrees_with_the_file(fused_bundle, tiny_bundle):
    from moebius_bench.measure.costs import count_torch

    manifest, written = read_manifest(fused_bundle), count_torch("tiny")
    for graph in ("unet", "unet_conditional", "vae_encoder", "vae_decoder"):
        rewrites = [rewrite for rewrite in manifest.rewrites if rewrite.graph == graph]
        assert rewrites[0].macs_before == written[graph]["all"]
        for one, following in pairwise(rewrites):
            assert one.macs_after == following.macs_before
        assert rewrites[-1].macs_after == total_macs(
            node_costs(fused_bundle / manifest.graphs[graph].files["fp32"].model)
        )
    saved = {r.name: r.macs_before - r.macs_after for r in manifest.rewrites if r.graph == "unet"}
    assert tuple(saved) == tuple(name for name in RULE_NAMES if name not in ("fuse_conv3x3", "fuse_group_norm"))
    assert all(saved[name] > 0 for name in ("collapse_interactive_lambda", "sub_pixel_upsampling", "share_prefix"))
    assert saved["fuse_feed_forward"] == saved["transformer_products"] == saved["fold_batch_norms"] == 0
    assert read_manifest(tiny_bundle).rewrites == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 2])
def test_the_lambda_operators_cost_what_their_functions_do(form, batch):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            self.window = nn.Parameter(torch.randn(4, 5, 5))

        def forward(self, query, values, keys, context_keys, context_values):
            summary = lambda_ops.lambda_summary(keys, values)
            y = lambda_ops.local_lambda(query, values, summary, self.window, (8, 6), (2, 3))
            return lambda_ops.interactive_lambda(y[None], context_keys, context_values)

    inputs = {
        "query": torch.randn(batch, 48, 12),
        "values": torch.randn(batch, 48, 4),
        "keys": torch.randn(batch, 4, 48),
        "context_keys": torch.randn(1, 48, 4, 7),
        "context_values": torch.randn(1, 7, 4),
    }
    model = to_onnx(GraphSpec("probe", Layers(), inputs, "y", local_lambda_form=form), lambda stage: None)
    assert module_macs(Layers(), inputs.values(), form) == {"all": total_macs(node_costs(model)), "convolutions": 0}


def test_work_that_nothing_uses_is_not_counted():
    class Wasteful(nn.Module):
        def forward(self, x, w):
            torch.matmul(w, w)
            return torch.matmul(x, w)

    assert module_macs(Wasteful(), [torch.zeros(2, 3), torch.zeros(3, 3)])["all"] == 2 * 3 * 3


def test_an_operator_without_a_formula_is_refused():
    @torch.library.custom_op("moebius_test::product", mutates_args=())
    def product(x: torch.Tensor) -> torch.Tensor:
        return x @ x

    @product.register_fake
    def _(x):
        return torch.empty_like(x)

    class Unknown(nn.Module):
        def forward(self, x):
            return product(x)

    with pytest.raises(CostError, match="moebius_test::product is not known here"):
        module_macs(Unknown(), [torch.zeros(3, 3)])


def test_counting_leaves_the_network_as_it_is():
    sizes = preset("tiny")
    student, _ = load_student("stand-in:0", sizes.student)
    module, inputs = GuidedUNet(student).eval(), example_inputs("unet", sizes, 1)
    with torch.inference_mode():
        expected = module(*inputs.values())
        rewritten, outcomes = rewrite_unet(
            module, student, module.category_ids, count=lambda found: module_macs(found, inputs.values())["all"]
        )
        assert torch.equal(module(*inputs.values()), expected)
    assert outcomes[-1].macs == (outcomes[-2].macs[1], module_macs(rewritten, inputs.values())["all"])


@pytest.mark.parametrize("graph", ["unet", "vae_decoder"])
def test_rules_that_keep_the_macs_keep_them(graph, monkeypatch):
    """They are not counted again in an export; here every rule is."""
    keep = {rule.name for rule in Rule.__subclasses__() if rule.keeps_macs}
    for rule in Rule.__subclasses__():
        monkeypatch.setattr(rule, "keeps_macs", False)
    sizes = preset("tiny")
    inputs = example_inputs(graph, sizes, 1).values()

    def count(module):
        return module_macs(module, inputs)["all"]

    if graph == "unet":
        student, _ = load_student("stand-in:0", sizes.student)
        module = GuidedUNet(student).eval()
        _, outcomes = rewrite_unet(module, student, module.category_ids, count=count)
    else:
        _, outcomes = rewrite_decoder(VaeDecoder(load_vae("stand-in:0", sizes.vae)[0]).eval(), count=count)
    kept = [outcome for outcome in outcomes if outcome.name in keep and outcome.fired]
    assert len(kept) == {"unet": 4, "vae_decoder": 2}[graph]
    assert all(before == after for before, after in (outcome.macs for outcome in kept))
