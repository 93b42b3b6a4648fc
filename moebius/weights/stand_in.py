"""Random test weights (`stand-in[:SEED]`): bit-exact on every machine, for tests without the released checkpoint.

The golden files were made with them. Each tensor has its own Philox generator, keyed with the first eight bytes (little
endian) of SHA-256("SEED:NAME"), so tensors can be drawn in any order. `_scale` chooses the distribution by the last
part of the name and the rank. Values are drawn in float64 and rounded once, to float32.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import NamedTuple

import numpy as np
import torch

# Values drawn at a time. The stream of a generator does not depend on how it is cut into pieces; pieces that
# stay in the processor's cache are faster and keep the float64 values from ever taking more than 0.5 MiB.
_PIECE = 1 << 16


class TensorSpec(NamedTuple):
    """Expected shape and dtype of one tensor of a state dict."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def draw(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Draws one tensor, float32 of `shape`; int64 1 for batch-norm counters."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.asarray(1, dtype=np.int64)
    key = int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    rng = np.random.Generator(np.random.Philox(key=key))
    result = np.empty(math.prod(shape), dtype=np.float32)
    piece = np.empty(min(result.size, _PIECE), dtype=np.float64)
    for start in range(0, result.size, _PIECE):
        values = piece[: result.size - start]
        if leaf == "running_var":
            values[:] = rng.uniform(0.5, 1.5, values.size)
        else:
            rng.standard_normal(out=values)
            _scale(values, name, leaf, shape)
        result[start : start + values.size] = values
    return result.reshape(shape)


def _scale(values: np.ndarray, name: str, leaf: str, shape: tuple[int, ...]) -> None:
    """Scales standard normal values in place to the spread that such a tensor has in a trained network."""
    if leaf in ("running_mean", "rel_pos_emb"):
        values *= 0.1
    elif leaf == "bias":
        values *= 0.05
    elif leaf == "weight" and len(shape) == 1:  # the gain of a normalisation layer
        values *= 0.1
        values += 1.0
    elif not name.endswith("embedding_layer.weight"):  # a kernel: unit gain
        values /= math.sqrt(math.prod(shape[1:]))


def stand_in_state_dict(expected: Mapping[str, TensorSpec], seed: int = 0) -> dict[str, torch.Tensor]:
    """Draws random test weights for all tensors of `expected`, in their order and dtypes.

    Memory: the result and about 1 MiB per thread. numpy draws without holding the interpreter's lock.
    """

    def one(name: str) -> torch.Tensor:
        shape, dtype = expected[name]
        return torch.from_numpy(draw(name, tuple(shape), seed)).to(dtype)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return dict(zip(expected, pool.map(one, expected), strict=True))
