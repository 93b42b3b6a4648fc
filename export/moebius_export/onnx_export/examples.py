"""Seeded inputs of every graph of a bundle."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moebius import Preset
from moebius_export.network.masked_decoder import BLOCK
from moebius_runtime.bundle.manifest import GraphName


def example_inputs(graph: GraphName, sizes: Preset, batch: int, *, guided: bool = True) -> dict[str, Tensor]:
    """Seeded inputs of a graph, with the statistics that the sampler gives it: the manifest's names and shapes.

    `guided` is False for the graph `unet` of a network whose guidance is distilled: it takes no scale.
    """
    rng = np.random.RandomState(7)
    side, channels = sizes.student.sample_size, sizes.vae.latent_channels
    pixels = side * sizes.vae.downscale
    if graph == "vae_encoder":
        return {"image": _tensor(rng.uniform(-1, 1, (batch, 3, pixels, pixels)))}
    if graph in ("vae_decoder", "vae_decoder_tiny"):
        return {"latent": _tensor(rng.standard_normal((batch, channels, side, side)))}
    if graph == "vae_decoder_lower":
        return {"latent": _tensor(rng.standard_normal((1, channels, side, side)))}
    if graph == "vae_decoder_upper":
        width, small = sizes.vae.block_out_channels[-1], 2 * side // BLOCK
        inside = np.zeros((1, 1, small, small))
        inside[:, :, : small // 2, : small // 2 + 1] = 1
        window = (1, width, BLOCK * (small // 2), BLOCK * (small // 2 + 1))
        return {
            "features": _tensor(rng.standard_normal(window)),
            "overview": _tensor(rng.standard_normal((1, width, small, small))),
            "inside": _tensor(inside),
        }
    latents = rng.standard_normal((batch, channels, side, side))
    mask = (rng.uniform(size=(batch, 1, side, side)) < 0.3).astype(np.float64)
    masked = rng.standard_normal((batch, channels, side, side))
    inputs = {
        "sample": _tensor(np.concatenate([latents, mask, masked], axis=1)),
        "timestep": torch.tensor([500], dtype=torch.int64),
    }
    return inputs | ({"guidance_scale": torch.tensor([2.5])} if graph == "unet" and guided else {})


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))
