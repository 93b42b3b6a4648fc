"""1x1 convolutions on tokens are matrix products, and a transposition next to a product costs nothing.

`proj_in` and `proj_out` go from tokens [B, n, C] to pictures [B, C, H, W] and back. Written as
products W X and X^T W^T with the transposition at the product's operand, a runtime reads the operand transposed
(ONNX Runtime: FusedMatMul) instead of moving the data. The gain and bias of the transformer's group norm
fold into `proj_in`: W (g x + b) = (W g) x + W b.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moebius.network.student import LambdaTransformer
from moebius_export.rules.base import Rule
from moebius_export.rules.linear import constant, no_matrix, pointwise


class ProductTransformer(nn.Module):
    """`LambdaTransformer` whose projections are matrix products and whose group norm has no gain."""

    def __init__(self, source: LambdaTransformer) -> None:
        super().__init__()
        norm, matrix = source.norm, pointwise(source.proj_in)
        assert source.proj_in.bias is not None
        assert source.proj_out.bias is not None
        self.groups, self.eps = norm.num_groups, norm.eps
        self.enter = constant((matrix * norm.weight).t())  # [C, C]
        self.enter_bias = constant(source.proj_in.bias + matrix @ norm.bias)
        self.transformer_blocks = source.transformer_blocks
        self.leave = constant(pointwise(source.proj_out))  # [C, C]
        self.leave_bias = constant(source.proj_out.bias[:, None])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W]."""
        tokens = self.enter_tokens(x)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, (x.shape[2], x.shape[3]))
        return self.leave_tokens(x, tokens)

    def enter_tokens(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> normalised and projected tokens [B, n, C]."""
        normal = F.group_norm(x, self.groups, eps=self.eps).flatten(2)  # [B, C, n]
        return torch.matmul(normal.transpose(1, 2), self.enter) + self.enter_bias

    def leave_tokens(self, x: Tensor, tokens: Tensor) -> Tensor:
        """The input plus the projected tokens, [B, C, H, W]."""
        out = torch.matmul(self.leave, tokens.transpose(1, 2)) + self.leave_bias  # [B, C, n]
        return x + out.unflatten(2, (x.shape[2], x.shape[3]))


class TransformerProducts(Rule):
    """Rule: `LambdaTransformer` -> `ProductTransformer`."""

    name = "transformer_products"
    target = LambdaTransformer
    keeps_macs = True

    def check(self, module: nn.Module) -> str | None:
        """Refuses projections that are more than a matrix and a bias."""
        assert isinstance(module, LambdaTransformer)
        return no_matrix(module.proj_in, bias=True) or no_matrix(module.proj_out, bias=True)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, LambdaTransformer)
        return ProductTransformer(module)
