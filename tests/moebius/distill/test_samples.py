"""Sample pictures: the sampler against the device's own."""

import numpy as np
import pytest
import torch

from moebius import preset
from moebius.data.encoded import LatentBatch
from moebius.distill.outputs.samples import fill_latents
from moebius.weights.load import load_student


def batch_of(side=16):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(2, 4, side, side, generator=generator)
    return LatentBatch(normal, normal * 0.5, (normal[:, :1] > 0).float(), torch.zeros(2, 6, dtype=torch.long))


@pytest.mark.parametrize(("guidance", "predicts"), [(1.0, "epsilon"), (2.0, "epsilon"), (2.0, "v_prediction")])
def test_the_sampler_is_ddim_as_written(guidance, predicts):
    """Against DDIM as written: Song et al. 2020, equation 12 with eta 0, on the scaled-linear schedule."""
    student = load_student("stand-in", preset("tiny").student)[0]
    batch, steps = batch_of(), 4
    got = fill_latents(
        student,
        batch,
        steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(1),
        prediction_type=predicts,
    )
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bars = np.cumprod(1 - betas)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        for index in reversed(range(steps)):
            t = index * (1000 // steps)
            seen = torch.cat([x.float(), batch.mask, batch.masked], dim=1)
            times = torch.full((2,), t)
            noise = student(seen, times, student.conditional_ids[None].expand(2, -1)).double()
            if guidance != 1:
                other = student(seen, times, student.unconditional_ids[None].expand(2, -1)).double()
                noise = other + guidance * (noise - other)
            if predicts == "v_prediction":  # Salimans and Ho 2022, appendix D
                noise = bars[t] ** 0.5 * noise + (1 - bars[t]) ** 0.5 * x
            clean = (x - (1 - bars[t]) ** 0.5 * noise) / bars[t] ** 0.5
            # After the last timestep diffusers ends at alpha-bar 1.
            before = bars[t - 1000 // steps] if index else 1.0
            x = before**0.5 * clean + (1 - before) ** 0.5 * noise
    torch.testing.assert_close(got.double(), x, rtol=1e-3, atol=1e-3)
