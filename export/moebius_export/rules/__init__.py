"""Exact rewrites of the network before it is exported, in order, with how often each must fire.

Each is algebra, not approximation: results differ by float rounding only (docs/rewrites.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moebius import Moebius, StudentConfig, VaeDecoder, VaeEncoder
from moebius.network.tiny_vae import TinyDecoder
from moebius_export.errors import ExportError
from moebius_export.lowering.lowering import Lowering
from moebius_export.network.masked_decoder import LowerDecoder, UpperDecoder
from moebius_export.rules.base import Outcome, Rule, apply_rules
from moebius_export.rules.conv3x3 import FuseConv3x3
from moebius_export.rules.feed_forward import FuseFeedForward
from moebius_export.rules.group_norm import FuseGroupNorm
from moebius_export.rules.interactive_lambda import CollapseInteractiveLambda
from moebius_export.rules.local_lambda import ReassociateLocalLambda
from moebius_export.rules.residual_block import FuseResidualBlock
from moebius_export.rules.separable_conv import FoldBatchNorms
from moebius_export.rules.shared_prefix import SharePrefix
from moebius_export.rules.subpixel import SubPixelUpsampling
from moebius_export.rules.timestep_table import TabulateTimesteps
from moebius_export.rules.token_products import TransformerProducts

Count = Callable[[nn.Module], int]
"""The cost of a call of a network, see `moebius_export.network.module_cost`."""

RULE_NAMES = (
    "fold_batch_norms",
    "collapse_interactive_lambda",
    "reassociate_local_lambda",
    "fuse_feed_forward",
    "transformer_products",
    "sub_pixel_upsampling",
    "fuse_conv3x3",
    "fuse_group_norm",
    "tabulate_timesteps",
    "fuse_residual_block",
    "share_prefix",
)


def unet_rules(student: Moebius, category_ids: Tensor, lowering: Lowering | None = None) -> list[Rule]:
    """The rules of the U-Net, in order. `category_ids` [branches, m] are the branches of the graph's batch."""
    lowering = lowering or Lowering()
    config = student.config
    with torch.no_grad():
        embedded = student.embedding_layer(category_ids).split(1)  # branch by branch: see `CollapsedInteractiveLambda`
        contexts = torch.cat([student.diff_model.encoder_hid_proj(one) for one in embedded])
    tiles = {}
    for level, channels in enumerate(config.block_out_channels):
        side = config.sample_size >> level
        tiles[channels // config.num_heads] = (side, lowering.tile(side))
    return [
        FoldBatchNorms(),
        CollapseInteractiveLambda(contexts),
        ReassociateLocalLambda(tiles),
        FuseFeedForward(),
        TransformerProducts(),
        SubPixelUpsampling(),
        TabulateTimesteps(),
        FuseResidualBlock(),
        SharePrefix(),
    ]


def expected_counts(config: StudentConfig, *, guided: bool) -> dict[str, int]:
    """How often each rule fires on a network of these sizes."""
    levels = len(config.block_out_channels)
    blocks = levels * (2 * config.layers_per_block + 1)  # residual blocks, and as many transformers
    return {
        "fold_batch_norms": 2 * blocks + 2,
        "collapse_interactive_lambda": blocks,
        "reassociate_local_lambda": blocks,
        "fuse_feed_forward": blocks,
        "transformer_products": blocks,
        "sub_pixel_upsampling": levels - 1,
        "tabulate_timesteps": 1,
        "fuse_residual_block": blocks,
        "share_prefix": int(guided),
    }


def rewrite_unet(
    module: nn.Module,
    student: Moebius,
    category_ids: Tensor,
    names: Sequence[str] = RULE_NAMES,
    count: Count | None = None,
    lowering: Lowering | None = None,
) -> tuple[nn.Module, list[Outcome]]:
    """Applies the named rules to a U-Net wrapper and checks how often each fired; `count` as in `apply_rules`.

    `lowering` gives the tiles of Local-λ; without it they are `moebius.network.lambda_ops.default_tile`'s.

    Raises:
        ExportError: an unknown rule, or one that fired another number of times than expected from the network's sizes.
    """
    check_names(names)
    rules = [rule for rule in unet_rules(student, category_ids, lowering) if rule.name in names]
    return _counted(module, rules, expected_counts(student.config, guided=category_ids.shape[0] == 2), count)


def rewrite_decoder(
    module: VaeDecoder, names: Sequence[str] = RULE_NAMES, count: Count | None = None
) -> tuple[nn.Module, list[Outcome]]:
    """As `rewrite_unet`, for the VAE decoder: its upsamplers, one fewer than resolutions, and its 3x3 convolutions."""
    levels = [len(block.resnets) for block in module.decoder.up_blocks]
    expected = {
        "sub_pixel_upsampling": len(levels) - 1,
        "fuse_conv3x3": _convs(levels),
        "fuse_group_norm": _norms(levels),
    }
    return _rewrite_vae(module, names, expected, count)


def rewrite_encoder(
    module: VaeEncoder, names: Sequence[str] = RULE_NAMES, count: Count | None = None
) -> tuple[nn.Module, list[Outcome]]:
    """As `rewrite_unet`, for the VAE encoder: its 3x3 convolutions, but for those that halve the picture."""
    levels = [len(block.resnets) for block in module.encoder.down_blocks]
    return _rewrite_vae(module, names, {"fuse_conv3x3": _convs(levels), "fuse_group_norm": _norms(levels)}, count)


def rewrite_decoder_part(
    module: LowerDecoder | UpperDecoder, names: Sequence[str] = RULE_NAMES, count: Count | None = None
) -> tuple[nn.Module, list[Outcome]]:
    """As `rewrite_decoder`, for one of the two parts of a masked decode."""
    if isinstance(module, LowerDecoder):
        inner = len(module.up_block.resnets) + 2  # residual blocks, with the middle's
        upsamplers, convs, norms = len(module.up_block.upsamplers or ()), 2 * inner + 1, 2 * inner + 1
    else:
        inner = sum(len(block.resnets) for block in module.up_blocks)
        upsamplers = sum(len(block.upsamplers or ()) for block in module.up_blocks)
        convs, norms = 2 * inner + 1, 2 * inner + 1
    expected = {"sub_pixel_upsampling": upsamplers, "fuse_conv3x3": convs, "fuse_group_norm": norms}
    return _rewrite_vae(module, names, expected, count)


def rewrite_tiny_decoder(
    module: TinyDecoder, names: Sequence[str] = RULE_NAMES, count: Count | None = None
) -> tuple[nn.Module, list[Outcome]]:
    """As `rewrite_decoder`, for the tiny decoder: all of its convolutions but the three that follow an upsampling."""
    convs = [one for one in module.modules() if isinstance(one, nn.Conv2d)]
    upsamplings = sum(isinstance(one, nn.Upsample) for one in module.modules())
    return _rewrite_vae(module, names, {"fuse_conv3x3": len(convs) - upsamplings}, count)


def _convs(resnets: Sequence[int]) -> int:
    """Two in every residual block, of which the middle has two, and the first and the last."""
    return 2 * (sum(resnets) + 2) + 2


def _norms(resnets: Sequence[int]) -> int:
    """Two in every residual block, one in the middle's attention, and the last."""
    return 2 * (sum(resnets) + 2) + 2


def _rewrite_vae(
    module: nn.Module, names: Sequence[str], expected: dict[str, int], count: Count | None
) -> tuple[nn.Module, list[Outcome]]:
    from diffusers.models.upsampling import Upsample2D

    check_names(names)
    rules = [SubPixelUpsampling(Upsample2D), FuseConv3x3(), FuseGroupNorm()]
    return _counted(module, [rule for rule in rules if rule.name in expected and rule.name in names], expected, count)


def check_names(names: Sequence[str]) -> None:
    """Raises `ExportError` with the known names where a rule is unknown."""
    if unknown := [name for name in names if name not in RULE_NAMES]:
        raise ExportError(f"unknown rule {', '.join(unknown)}; expected some of {', '.join(RULE_NAMES)}")


def _counted(
    module: nn.Module, rules: Sequence[Rule], expected: dict[str, int], count: Count | None
) -> tuple[nn.Module, list[Outcome]]:
    module, outcomes = apply_rules(module, rules, count)
    for outcome in outcomes:
        if outcome.fired != expected[outcome.name]:
            reasons = "; ".join(f"{path}: {reason}" for path, reason in outcome.refused[:3]) or "nothing matched"
            raise ExportError(
                f"rule {outcome.name} fired {outcome.fired} times, expected {expected[outcome.name]} ({reasons})"
            )
    return module, outcomes
