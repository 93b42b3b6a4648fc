"""Interactive-λ collapses, because its context is a constant of the checkpoint.

Per branch, K, softmax(K) and V [m, v] are constants, and with E'[n, m, k] = rel_pos_emb[n, m, k] + softmax(K)[k, m]:

    Y = sum_k Q[h, k, n] (sum_m softmax(K)[k, m] V[v, m] + sum_m rel_pos_emb[n, m, k] V[v, m]) = (Q E') V.

Two matrix products of m = 10 columns replace λp [B, n, k, v]. The norm of Q folds into its projection.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebius.network.lambda_layers import InteractiveLambda
from moebius.network.lambda_ops import interactive_lambda
from moebius_export.rules.base import Rule
from moebius_export.rules.linear import batch_norm_affine, constant, frozen, pointwise


class CollapsedInteractiveLambda(nn.Module):
    """`InteractiveLambda` for fixed contexts, one per branch; the batch is [branch 0's pictures, branch 1's, ...]."""

    def __init__(self, source: InteractiveLambda, contexts: Tensor) -> None:
        super().__init__()
        self.branches = contexts.shape[0]
        scale, shift = batch_norm_affine(source.norm_q)
        self.query = constant(pointwise(source.to_q, scale).t())  # [C, h*k]
        self.query_bias = constant(shift)
        # One branch at a time: a product of both rounds otherwise, and the graph of one could not share its bytes.
        each = contexts.split(1)
        keys = torch.cat([source.to_k(one).transpose(1, 2).softmax(dim=-1) for one in each])  # [branch, k, m]
        values = torch.cat([source.norm_v(source.to_v(one).transpose(1, 2)) for one in each])  # [branch, v, m]
        embedding = source.rel_pos_emb.squeeze(-1).permute(0, 2, 1)  # [n, m, k] -> [n, k, m]
        self.keys = constant(embedding[None] + keys[:, None])  # [branch, n, k, m]
        self.values = constant(values.transpose(1, 2))  # [branch, m, v]

    def forward(self, x: Tensor, context: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens [branches * B, n, C] -> the same; `context` is the constant that went in, and not looked at."""
        batch, positions, channels = x.shape
        q = torch.matmul(x, self.query) + self.query_bias
        q = q.reshape(self.branches, -1, positions, channels)  # [branches * B, n, h*k] -> [branch, B, n, h*k]
        return interactive_lambda(q, self.keys, self.values).reshape(batch, positions, channels)


class CollapseInteractiveLambda(Rule):
    """Rule: `InteractiveLambda` -> `CollapsedInteractiveLambda`."""

    name = "collapse_interactive_lambda"
    target = InteractiveLambda

    def __init__(self, contexts: Tensor) -> None:
        self.contexts = contexts  # [branches, m, cross_attention_dim]

    def check(self, module: nn.Module) -> str | None:
        """Refuses contexts of another shape and norms without constants."""
        assert isinstance(module, InteractiveLambda)
        expected = (module.rel_pos_emb.shape[1], module.to_k.in_features)
        if tuple(self.contexts.shape[1:]) != expected:
            return f"contexts are {tuple(self.contexts.shape[1:])}, the layer takes {expected}"
        return frozen(module.norm_q) or frozen(module.norm_v)

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, InteractiveLambda)
        return CollapsedInteractiveLambda(module, self.contexts)
