"""Everything that depends on the timestep alone becomes a table.

The timestep is an integer below 1000, so the embedding, its two layers and the projections of all residual blocks are
a table with a row per timestep: 1000 rows of 11,200 numbers for the released network, less than the weights it
replaces.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moebius.network.student import DiffusionModel, Level, ResidualBlock
from moebius_export.rules.base import Rule, shared_copy
from moebius_export.rules.linear import constant

TIMESTEPS = 1000


class TimestepTable(nn.Module):
    """Takes the place of the time embedding: looks rows up."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = constant(table)  # [1000, sum of the blocks' channels]

    def forward(self, timesteps: Tensor) -> Tensor:
        """int64 [B] -> [B, sum of channels]."""
        return self.table.index_select(0, timesteps)


class TableColumns(nn.Module):
    """Takes the place of a block's `time_emb_proj`: its columns of the row."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.start, self.stop = start, stop

    def forward(self, row: Tensor) -> Tensor:
        """[B, sum of channels] -> [B, channels]."""
        return row[:, self.start : self.stop]


class TabulateTimesteps(Rule):
    """Rule: the time embedding of a `DiffusionModel` and its blocks' projections -> one table."""

    name = "tabulate_timesteps"
    target = DiffusionModel

    def check(self, module: nn.Module) -> str | None:
        """Refuses a network whose time embedding is a table already."""
        assert isinstance(module, DiffusionModel)
        return "its timesteps are a table already" if isinstance(module.time_embedding, TimestepTable) else None

    def rewrite(self, module: nn.Module) -> nn.Module:
        """See the module's docstring."""
        assert isinstance(module, DiffusionModel)
        embedded = module.time_embedding(torch.arange(TIMESTEPS))  # [1000, time_dim]
        result = shared_copy(module)
        assert isinstance(result, DiffusionModel)
        columns, start = [], 0
        for level in (*result.down_blocks, *result.up_blocks):
            assert isinstance(level, Level)
            for block in level.resnets:
                assert isinstance(block, ResidualBlock)
                columns.append(block.time_emb_proj(embedded))  # [1000, channels]
                stop = start + columns[-1].shape[1]
                block.add_module("time_emb_proj", TableColumns(start, stop))
                start = stop
        result.add_module("time_embedding", TimestepTable(torch.cat(columns, dim=1)))
        return result
