"""The toy bundle's graphs compute what its NumPy functions say: only then do they prove anything."""

from __future__ import annotations

import numpy as np

from moebius_runtime.backends import create_backend
from moebius_runtime.bundle.bundle import Bundle


def test_the_graphs_are_their_numpy_functions(toy_bundle):
    backend = create_backend(Bundle.open(toy_bundle.path), "ort-cpu", threads=1)
    rng = np.random.RandomState(0)
    image = rng.uniform(-1, 1, (1, 3, 128, 128)).astype(np.float32)
    sample = rng.standard_normal((1, 9, 16, 16)).astype(np.float32)
    timestep, scale = np.array([350]), np.float32([2.5])
    latent = sample[:, :4]
    for graph, inputs, expected in (
        ("vae_encoder", {"image": image}, toy_bundle.encode(image)),
        ("unet_conditional", {"sample": sample, "timestep": timestep}, toy_bundle.conditional(sample, 350)),
        (
            "unet",
            {"sample": sample, "timestep": timestep, "guidance_scale": scale},
            toy_bundle.unet(sample, 350, 2.5),
        ),
        ("vae_decoder", {"latent": latent}, toy_bundle.decode(latent)),
    ):
        got = backend.run(graph, inputs)
        assert got.dtype == np.float32
        # float32 against float64: sums of at most 81 products
        assert np.abs(got - expected).max() < 2e-6 * np.abs(expected).max(), graph
