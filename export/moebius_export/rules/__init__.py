"""Exact rewrites of the network before it is exported, in order, with how often each must fire.

Each is algebra, not approximation: results differ by float rounding only (docs/rewrites.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moebius import Moebius, StudentConfig, VaeDecoder
from moebius.lambda_ops import default_tile
from moebius_export.errors import ExportError
from moebius_export.rules.base import Outcome, Rule, apply_rules
from moebius_export.rules.interactive_lambda import CollapseInteractiveLambda
from moebius_export.rules.local_lambda import ReassociateLocalLambda
from moebius_export.rules.separable_conv import FoldBatchNorms
from moebius_export.rules.shared_prefix import SharePrefix
from moebius_export.rules.subpixel import SubPixelUpsampling
from moebius_export.rules.timestep_table import TabulateTimesteps
from moebius_export.rules.token_products import FeedForwardProducts, TransformerProducts

Count = Callable[[nn.Module], int]
"""The cost of a call of a network, see `moebius_export.module_cost`."""

RULE_NAMES = (
    "fold_batch_norms",
    "collapse_interactive_lambda",
    "reassociate_local_lambda",
    "feed_forward_products",
    "transformer_products",
    "sub_pixel_upsampling",
    "tabulate_timesteps",
    "share_prefix",
)


def unet_rules(student: Moebius, category_ids: Tensor) -> list[Rule]:
    """The rules of the U-Net, in order. `category_ids` [branches, m] are the branches of the graph's batch."""
    config = student.config
    with torch.no_grad():
        contexts = student.diff_model.encoder_hid_proj(student.embedding_layer(category_ids))
    tiles = {}
    for level, channels in enumerate(config.block_out_channels):
        side = config.sample_size >> level
        tiles[channels // config.num_heads] = (side, default_tile(side, side))
    return [
        FoldBatchNorms(),
        CollapseInteractiveLambda(contexts),
        ReassociateLocalLambda(tiles),
        FeedForwardProducts(),
        TransformerProducts(),
        SubPixelUpsampling(),
        TabulateTimesteps(),
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
        "feed_forward_products": blocks,
        "transformer_products": blocks,
        "sub_pixel_upsampling": levels - 1,
        "tabulate_timesteps": 1,
        "share_prefix": int(guided),
    }


def rewrite_unet(
    module: nn.Module,
    student: Moebius,
    category_ids: Tensor,
    names: Sequence[str] = RULE_NAMES,
    count: Count | None = None,
) -> tuple[nn.Module, list[Outcome]]:
    """Applies the named rules to a U-Net wrapper and checks how often each fired; `count` as in `apply_rules`.

    Raises:
        ExportError: an unknown rule, or one that fired another number of times than the network's sizes say.
    """
    check_names(names)
    rules = [rule for rule in unet_rules(student, category_ids) if rule.name in names]
    return _counted(module, rules, expected_counts(student.config, guided=category_ids.shape[0] == 2), count)


def rewrite_decoder(
    module: VaeDecoder, names: Sequence[str] = RULE_NAMES, count: Count | None = None
) -> tuple[nn.Module, list[Outcome]]:
    """As `rewrite_unet`, for the VAE decoder: its upsamplers, one fewer than it has resolutions."""
    from diffusers.models.upsampling import Upsample2D

    check_names(names)
    rules = [rule for rule in (SubPixelUpsampling(Upsample2D),) if rule.name in names]
    return _counted(module, rules, {"sub_pixel_upsampling": len(module.decoder.up_blocks) - 1}, count)


def check_names(names: Sequence[str]) -> None:
    """Refuses rules that there are not; `ExportError` lists those that there are."""
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
