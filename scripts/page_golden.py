"""Writes tests/golden/page_engine.json: what the runtime computes, for the tests of the page's engine in Node.

Run it when `moebius_runtime.sampling` or `moebius_runtime.bundle.check_values` changes: python scripts/page_golden.py
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from moebius_runtime.bundle.check_values import (
    check_inputs,
    differing_elements,
    make_check,
    relative_error,
)
from moebius_runtime.bundle.manifest import GraphInfo
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
        "checks": [_check_values(graph, drawn) for graph, drawn in CHECKED],
    }


def _tensor(name: str, *shape: int | str, dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}


CHECKED: list[tuple[list[dict[str, Any]], int]] = [
    (
        [
            _tensor("sample", "batch", 9, 6, 6),
            _tensor("timestep", 1, dtype="int64"),
            _tensor("guidance_scale", 1),
        ],
        2,
    ),
    ([_tensor("sample", 3, 9, 4, 4), _tensor("timestep", 1, dtype="int64")], 3),
    ([_tensor("image", 1, 3, 16, 16)], 1),
    ([_tensor("latent", "batch", 4, 5, 5)], 2),
    (
        [
            _tensor("features", 1, 2, "height", "width"),
            _tensor("overview", 1, 2, 7, 7),
            _tensor("inside", 1, 1, 7, 7),
        ],
        1,
    ),
]
"""Inputs of graphs, open and not, and the number of pictures that the export drew."""


def _check_values(tensors: list[dict[str, Any]], drawn: int) -> dict[str, Any]:
    """The inputs' hash, the check values of an output of whole-number formulas, and what a wrong one gives."""
    info = {"inputs": tensors, "outputs": [_tensor("y", 1)], "files": {"fp32": {"model": "a.onnx", "weights": None}}}
    inputs = check_inputs(GraphInfo.model_validate(info), drawn)
    output = ((np.arange(1001) * 7919 % 1009) / np.float64(1009) - 0.5).astype(np.float32)
    wrong = output.copy()
    wrong[[142, 500]] += np.float32(0.25)
    check = make_check(inputs, output, drawn)
    return {
        "inputs": tensors,
        "check": check.model_dump(),
        "sums": {name: float(array.astype(np.float64).sum()) for name, array in inputs.items()},
        "shapes": {name: list(array.shape) for name, array in inputs.items()},
        "wrong": {
            "places": [142, 500],
            "error": relative_error(check, wrong),
            "words": differing_elements(check, wrong),
        },
    }


def _numbers(array: np.ndarray) -> list[float]:
    return [float(value) for value in array.ravel()]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(content()) + "\n")
