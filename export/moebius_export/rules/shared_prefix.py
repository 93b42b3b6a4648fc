"""Both guidance branches are the same until the first Interactive-λ, where the context first enters.

conv_in, the first residual block, and the first transformer as far as its Local-λ see the same latents in both
branches: they are computed once, and the tokens doubled where the branches part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebius import Moebius
from moebius.network.student import LambdaBlock, Level
from moebius_export.network.wrappers import GuidedUNet, parted
from moebius_export.rules.base import Rule, shared_copy
from moebius_export.rules.token_products import ProductTransformer


class PartingTransformer(nn.Module):
    """The first transformer: pictures of one branch in, pictures of both out."""

    def __init__(self, source: ProductTransformer) -> None:
        super().__init__()
        self.inner = source

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W] -> [2B, C, H, W], [unconditional, conditional]."""
        size = (x.shape[2], x.shape[3])
        (block,) = self.inner.transformer_blocks
        assert isinstance(block, LambdaBlock)
        tokens = self.inner.enter_tokens(x)  # [B, n, C]
        tokens = tokens + block.attn1(block.norm1(tokens), size)
        tokens = torch.cat([tokens, tokens])
        tokens = tokens + block.attn2(block.norm2(tokens), context, size)
        tokens = tokens + block.ff(block.norm3(tokens), size)
        return self.inner.leave_tokens(torch.cat([x, x]), tokens)


class SharedPrefixUNet(nn.Module):
    """`GuidedUNet` that doubles the batch late."""

    category_ids: Tensor

    def __init__(self, source: GuidedUNet) -> None:
        super().__init__()
        student = shared_copy(source.student)
        assert isinstance(student, Moebius)
        level = student.diff_model.down_blocks[0]
        assert isinstance(level, Level)
        first = level.attentions[0]
        assert isinstance(first, ProductTransformer)
        level.attentions[0] = PartingTransformer(first)
        self.student = student
        self.register_buffer("category_ids", source.category_ids, persistent=False)

    def forward(self, sample: Tensor, timestep: Tensor, guidance_scale: Tensor) -> Tensor:
        """As `GuidedUNet.forward`: sample [B, 9, S, S], timestep [1], guidance_scale [1] -> noise [B, 4, S, S]."""
        batch = sample.shape[0]
        ids = self.category_ids.repeat_interleave(batch, dim=0)  # [2B, m]
        noise = self.student(sample, timestep, ids)
        unconditional, conditional = parted(noise, batch)
        return unconditional + guidance_scale * (conditional - unconditional)


class SharePrefix(Rule):
    """Rule: `GuidedUNet` -> `SharedPrefixUNet`; needs the transformers as matrix products."""

    name = "share_prefix"
    target = GuidedUNet

    def check(self, module: nn.Module) -> str | None:
        """Refuses a first transformer that is not a `ProductTransformer` of one `LambdaBlock`."""
        assert isinstance(module, GuidedUNet)
        level = module.student.diff_model.down_blocks[0]
        assert isinstance(level, Level)
        first = level.attentions[0]
        if not isinstance(first, ProductTransformer):
            return "the first transformer is not written as matrix products"
        if [type(block) for block in first.transformer_blocks] != [LambdaBlock]:
            return "the first transformer has not one λ block"
        return None

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, GuidedUNet)
        return SharedPrefixUNet(module)
