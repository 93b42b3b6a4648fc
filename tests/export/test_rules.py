"""Rewrite rules: each fires and agrees, a near miss is refused with a reason, and nothing that was found is changed."""

import pytest
import torch
from torch import nn

from moebius import preset
from moebius.network.lambda_layers import InteractiveLambda, LocalLambda
from moebius.network.student import LambdaTransformer, MixFeedForward, Resample, ResidualBlock, SeparableConv
from moebius.weights.load import load_student, tensor_specs
from moebius.weights.stand_in import stand_in_state_dict
from moebius_export.errors import ExportError
from moebius_export.network.wrappers import ConditionalUNet, GuidedUNet
from moebius_export.rules import RULE_NAMES, expected_counts, rewrite_unet, unet_rules
from moebius_export.rules.base import apply_rules, shared_copy
from moebius_export.rules.conv3x3 import FuseConv3x3
from moebius_export.rules.feed_forward import FuseFeedForward
from moebius_export.rules.group_norm import FuseGroupNorm
from moebius_export.rules.interactive_lambda import CollapseInteractiveLambda
from moebius_export.rules.local_lambda import ReassociateLocalLambda, TiledLocalLambda
from moebius_export.rules.residual_block import FuseResidualBlock
from moebius_export.rules.separable_conv import FoldBatchNorms, FoldedSeparableConv
from moebius_export.rules.shared_prefix import SharePrefix
from moebius_export.rules.subpixel import SubPixelUpsampling
from moebius_export.rules.timestep_table import TabulateTimesteps
from moebius_export.rules.token_products import TransformerProducts

# float32 on both sides, sums of up to some thousand terms in another order: single layers measure 2e-7 to 6e-7, the
# tiny network 2e-6. Leaving one bias of one layer out of its fold costs 1e-3 and more.
LAYER, NETWORK = 3e-6, 1e-5


def filled(module, seed=0):
    """The module with stand-in weights, whose batch norms have statistics that matter."""
    module.load_state_dict(stand_in_state_dict(tensor_specs(module), seed))
    return module.eval()


def error(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def rewritten(module, rule):
    root = nn.ModuleList([module])
    root.training = False  # of the root alone: a near miss may have a part in training mode
    result, (outcome,) = apply_rules(root, [rule])
    return result[0], outcome


def agree(module, rule, *inputs):
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with torch.inference_mode():
        expected = module(*inputs)
        result, outcome = rewritten(module, rule)
        assert outcome.fired == 1
        assert outcome.refused == ()
        assert type(result) is not type(module)
        assert error(result(*inputs), expected) < LAYER
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    return result


def refused(module, rule, words):
    result, outcome = rewritten(module, rule)
    assert result.__class__ is module.__class__
    assert outcome.fired == 0
    assert words in outcome.refused[0][1]


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 20), (16, 16)])
def test_batch_norms_fold(inputs, outputs):
    agree(filled(SeparableConv(inputs, outputs)), FoldBatchNorms(), torch.randn(2, inputs, 9, 7))


def test_batch_norms_in_training_are_left_alone():
    module = filled(SeparableConv(8, 8))
    module.bn2.train()
    refused(module, FoldBatchNorms(), "training mode")
    module = filled(SeparableConv(8, 8))
    module.conv_dw.bias = nn.Parameter(torch.zeros(8))
    refused(module, FoldBatchNorms(), "has a bias")


@pytest.mark.parametrize("side", [8, 12])
@pytest.mark.parametrize("tile", [(1, 4), (2, 2), (4, 4), (1, "row"), (2, 4)])
@pytest.mark.parametrize("window", [5, 15])
def test_local_lambda_reassociates(side, tile, window):
    tile = (tile[0], side if tile[1] == "row" else tile[1])
    layer = filled(LocalLambda(32, 4, window))
    agree(layer, ReassociateLocalLambda({8: (side, tile)}), torch.randn(2, side * side, 32), (side, side))


def test_local_lambda_pads_after_the_shift_of_the_norm():
    """A value bias that leaked into the padding would show at the border only: compare there."""
    layer = filled(LocalLambda(32, 4, 15))
    with torch.no_grad():
        layer.norm_v.bias += 5
    x = torch.randn(1, 64, 32)
    fast = agree(layer, ReassociateLocalLambda({8: (8, (2, 4))}), x, (8, 8))
    with torch.inference_mode():
        corner = torch.tensor([0, 7, 56, 63])
        assert error(fast(x, (8, 8))[:, corner], layer(x, (8, 8))[:, corner]) < LAYER


def test_local_lambda_near_misses():
    layer = filled(LocalLambda(32, 4, 15))
    refused(layer, ReassociateLocalLambda({16: (8, (2, 4))}), "no resolution is known for a depth of 8")
    refused(layer, ReassociateLocalLambda({8: (9, (2, 4))}), "do not divide 9x9")
    layer.norm_v.train()
    refused(layer, ReassociateLocalLambda({8: (8, (2, 4))}), "training mode")


@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_interactive_lambda_collapses(branches, batch):
    layer = filled(InteractiveLambda(32, 4, 36, 6, 20))
    contexts = torch.randn(branches, 6, 20)
    x = torch.randn(branches * batch, 36, 32)
    context = contexts.repeat_interleave(batch, dim=0)  # [branch 0's pictures, branch 1's pictures]
    agree(layer, CollapseInteractiveLambda(contexts), x, context, (6, 6))


def test_interactive_lambda_near_misses():
    layer = filled(InteractiveLambda(32, 4, 36, 6, 20))
    refused(layer, CollapseInteractiveLambda(torch.randn(2, 5, 20)), "contexts are (5, 20), the layer takes (6, 20)")
    layer.norm_q.train()
    refused(layer, CollapseInteractiveLambda(torch.randn(2, 6, 20)), "training mode")


def test_upsampling_goes_sub_pixel():
    """Odd sizes, so that rows and columns cannot be mixed up."""
    agree(filled(Resample(6, up=True)), SubPixelUpsampling(), torch.randn(2, 6, 5, 7))


def test_upsampling_near_misses():
    refused(filled(Resample(6, up=False)), SubPixelUpsampling(), "downsampler")
    module = filled(Resample(6, up=True))
    module.conv.padding = (0, 0)
    refused(module, SubPixelUpsampling(), "not a plain 3x3 convolution")


def test_feed_forward_becomes_products():
    agree(filled(MixFeedForward(16, 3)), FuseFeedForward(), torch.randn(2, 35, 16), (5, 7))


def test_feed_forward_near_miss():
    module = filled(MixFeedForward(16, 3))
    module.point_conv.conv = nn.Conv2d(24, 16, 1)
    refused(module, FuseFeedForward(), "a bias was not expected")


def test_transformers_become_products():
    config = preset("tiny").student
    module = filled(LambdaTransformer(16, 256, config))
    agree(module, TransformerProducts(), torch.randn(2, 16, 16, 16), torch.randn(2, 6, 20))
    module.proj_out = nn.Conv2d(16, 16, 1, bias=False)
    refused(module, TransformerProducts(), "a bias was expected")


@pytest.mark.parametrize("channels", [(16, 16), (16, 24)])
def test_residual_blocks_fuse_once_their_norms_are_folded(channels):
    module = filled(ResidualBlock(*channels, time_dim=12, groups=4))
    inputs = torch.randn(2, channels[0], 6, 7), torch.randn(2, 12)
    refused(module, FuseResidualBlock(), "not folded")
    with torch.inference_mode():
        expected = module(*inputs)
    folded, _ = rewritten(module, FoldBatchNorms())
    with torch.inference_mode():
        assert error(agree(folded, FuseResidualBlock(), *inputs)(*inputs), expected) < LAYER
    folded.norm2.eps = 1e-3
    refused(folded, FuseResidualBlock(), "groups or epsilon")
    folded.norm2.eps = folded.norm1.eps
    folded.conv2.residual = False
    refused(folded, FuseResidualBlock(), "inner skip")


def test_plain_3x3_convolutions_fuse_and_others_do_not():
    agree(filled(nn.Conv2d(5, 7, 3, padding=1)), FuseConv3x3(), torch.randn(2, 5, 6, 9))
    refused(nn.Conv2d(4, 4, 3, padding=1, stride=2), FuseConv3x3(), "not a plain 3x3 convolution")
    refused(nn.Conv2d(4, 4, 3, padding=1, groups=4), FuseConv3x3(), "not a plain 3x3 convolution")
    refused(nn.Conv2d(4, 4, 1), FuseConv3x3(), "not a plain 3x3 convolution")
    refused(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), FuseConv3x3(), "reflect")
    refused(nn.Conv2d(4, 4, 3, padding=1, bias=False), FuseConv3x3(), "no bias")


def test_group_norms_fuse():
    norm = filled(nn.GroupNorm(4, 12, eps=1e-3))
    agree(norm, FuseGroupNorm(), torch.randn(2, 12, 5, 7))
    agree(norm, FuseGroupNorm(), torch.randn(2, 12, 9))
    refused(nn.GroupNorm(4, 12, affine=False), FuseGroupNorm(), "no gain")


def tiny(wrapper):
    student, _ = load_student("stand-in:0", preset("tiny").student)
    return student, wrapper(student).eval()


def guided_inputs(batch=1):
    torch.manual_seed(3)
    return torch.randn(batch, 9, 16, 16), torch.tensor([730]), torch.tensor([2.5])


@pytest.mark.parametrize("batch", [1, 2])
def test_timesteps_and_prefix_need_the_whole_network(batch):
    student, module = tiny(GuidedUNet)
    rules = unet_rules(student, module.category_ids)
    products = [rule for rule in rules if rule.name == "transformer_products"]
    with torch.inference_mode():
        expected = module(*guided_inputs(batch))
        for chosen in ([TabulateTimesteps()], [*products, SharePrefix()], rules):
            result, outcomes = apply_rules(module, chosen)
            assert outcomes[-1].fired == 1
            assert error(result(*guided_inputs(batch)), expected) < NETWORK


def test_every_timestep_has_its_row():
    _, module = tiny(ConditionalUNet)
    table, _ = apply_rules(module, [TabulateTimesteps()])
    sample = guided_inputs()[0]
    with torch.inference_mode():
        for t in (0, 1, 500, 999):
            assert error(table(sample, torch.tensor([t])), module(sample, torch.tensor([t]))) < NETWORK


def test_sharing_the_prefix_refuses_transformers_as_written():
    _, module = tiny(GuidedUNet)
    result, (outcome,) = apply_rules(module, [SharePrefix()])
    assert isinstance(result, GuidedUNet)
    assert "not written as matrix products" in outcome.refused[0][1]


@pytest.mark.parametrize("wrapper", [GuidedUNet, ConditionalUNet])
def test_all_rules_fire_as_often_as_the_sizes_say(wrapper):
    student, module = tiny(wrapper)
    inputs = guided_inputs()[: 3 if wrapper is GuidedUNet else 2]
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    with torch.inference_mode():
        expected = module(*inputs)
        result, outcomes = rewrite_unet(module, student, module.category_ids)
        assert error(result(*inputs), expected) < NETWORK
        assert torch.equal(module(*inputs), expected)
    counts = expected_counts(student.config, guided=wrapper is GuidedUNet)
    assert {outcome.name: outcome.fired for outcome in outcomes} == counts
    assert counts["reassociate_local_lambda"] == 6
    assert tuple(counts) == tuple(name for name in RULE_NAMES if name not in ("fuse_conv3x3", "fuse_group_norm"))
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_full_size_counts():
    assert expected_counts(preset("full").student, guided=True) == {
        "fold_batch_norms": 32,
        "collapse_interactive_lambda": 15,
        "reassociate_local_lambda": 15,
        "fuse_feed_forward": 15,
        "transformer_products": 15,
        "sub_pixel_upsampling": 2,
        "tabulate_timesteps": 1,
        "fuse_residual_block": 15,
        "share_prefix": 1,
    }


def test_a_rule_that_fires_too_seldom_stops_the_export():
    student, module = tiny(GuidedUNet)
    student.diff_model.down_blocks[0].resnets[0].conv1.conv_dw.bias = nn.Parameter(torch.zeros(16))
    with pytest.raises(ExportError, match=r"fold_batch_norms fired 13 times, expected 14 .*has a bias"):
        rewrite_unet(module, student, module.category_ids)
    with pytest.raises(ExportError, match="unknown rule fuse_everything"):
        rewrite_unet(module, student, module.category_ids, ["fuse_everything"])


def test_a_shared_module_is_rewritten_once_and_stays_shared():
    conv = filled(SeparableConv(8, 8))
    root = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv)}).eval()
    result, (outcome,) = apply_rules(root, [FoldBatchNorms()])
    assert outcome.fired == 1
    assert result["a"] is result["b"][0]
    assert isinstance(result["a"], FoldedSeparableConv)
    assert root["a"] is conv


def test_training_networks_are_refused():
    with pytest.raises(ValueError, match="eval"):
        apply_rules(SeparableConv(8, 8).train(), [FoldBatchNorms()])


def test_a_shared_copy_shares_weights_but_not_modules():
    conv = filled(SeparableConv(8, 8))
    root = nn.Sequential(conv, conv)
    copied = shared_copy(root)
    assert copied[0] is copied[1]
    assert copied[0] is not conv
    assert copied[0].conv_dw.weight is conv.conv_dw.weight
    copied[0].conv_dw = nn.Identity()
    assert isinstance(conv.conv_dw, nn.Conv2d)


def test_tiles_hold_no_gradient_and_no_shared_memory():
    layer = filled(LocalLambda(32, 4, 5))
    fast, _ = rewritten(layer, ReassociateLocalLambda({8: (8, (2, 2))}))
    assert isinstance(fast, TiledLocalLambda)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    assert fast.key.data_ptr() != layer.to_k.weight.data_ptr()
