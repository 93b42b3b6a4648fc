"""Writes tests/golden/page_engine.json: what the runtime computes, for the tests of the page's engine in Node.

Run it when `moebius_runtime.sampling` changes: python scripts/page_golden.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from moebius_runtime.sampling.samplers import SAMPLERS, SPACINGS
from moebius_runtime.sampling.schedule import Latents, NoiseSchedule, initial_noise

GOLDEN = Path(__file__).parents[1] / "tests/golden/page_engine.json"
SHAPE = (1, 4, 3, 5)


def denoise(latents: Latents, timestep: int) -> Latents:
    """A network of two float32 operations, which JavaScript repeats to the bit."""
    return np.float32(0.3) * latents + np.float32(timestep / 1000 - 0.4)


def content() -> dict[str, Any]:
    """The golden values. Arrays of float32 as numbers: JSON keeps every digit of them."""
    schedules = []
    for kind in ("epsilon", "v_prediction"):
        info = {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": kind,
        }
        schedule = NoiseSchedule(**info)  # type: ignore[arg-type]
        runs = []
        for sampler, sample in SAMPLERS.items():
            for steps, strength in ((4, 1.0), (9, 0.7), (1, 1.0)):
                timesteps = schedule.inference_timesteps(steps, strength, SPACINGS[sampler])
                trajectory: list[list[float]] = []
                start = initial_noise(5, SHAPE)
                sample(denoise, start, schedule, timesteps, lambda _s, _t, x, to=trajectory: to.append(_numbers(x)))
                runs.append({"sampler": sampler, "start": _numbers(start), "timesteps": timesteps.tolist()})
                runs[-1] |= {"steps": steps, "strength": strength, "trajectory": trajectory}
        noisy = schedule.add_noise(initial_noise(1, SHAPE), initial_noise(2, SHAPE), 481)
        schedules.append(
            {
                "info": info,
                "alphas_sha256": hashlib.sha256(schedule.alphas_cumprod.astype("<f4").tobytes()).hexdigest(),
                "noisy": _numbers(noisy),
                "runs": runs,
            }
        )
    state = np.random.RandomState(4294967295)
    noises = [
        {"seed": seed, "offset": offset, "values": _numbers(initial_noise(seed, SHAPE, offset))}
        for seed, offset in ((0, 0.0357), (7, 0.0), (4294967295, 0.0357))
    ]
    return {
        "shape": list(SHAPE),
        "uniform": {"seed": 4294967295, "values": state.random_sample(700).tolist()},
        "noises": noises,
        "schedules": schedules,
    }


def _numbers(array: np.ndarray) -> list[float]:
    return [float(value) for value in array.ravel()]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(content()) + "\n")
