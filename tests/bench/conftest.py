"""Answers of workers that never ran: what the parent makes of them is tested without waiting for a network."""

from collections.abc import Callable
from typing import Any

import pytest


def _picture(step: float, steps: int, began: float) -> dict[str, Any]:
    stages = {
        "preprocess": [0.01],
        "encode": [0.2, 0.2],
        "step": [step] * steps,
        "decode": [0.5],
        "paste": [0.02],
    }
    return {"stages": stages, "total": sum(map(sum, stages.values())), "began": began}


@pytest.fixture
def worker_result() -> Callable[..., dict[str, Any]]:
    """Makes a worker's result whose every step takes `step` seconds."""

    def make(step: float = 0.1, steps: int = 8, sha256: str = "ab" * 32, began: float = 0.0) -> dict[str, Any]:
        return {
            "import_seconds": 0.3,
            "load_seconds": {"vae_encoder": 1.0, "unet": 2.0, "vae_decoder": 1.5},
            "cold": _picture(3 * step, 1, began),
            "pictures": [_picture(step, steps, began)],
            "peak_memory": 3_000_000_000,
            "output_sha256": sha256,
            "described": {"runtime": "ort-cpu", "onnxruntime": "1.31.1", "threads": "2"},
        }

    return make


@pytest.fixture
def rate_result() -> dict[str, Any]:
    """A machine of 132 GMAC/s."""
    macs = {"median": 132e9, "min": 130e9, "max": 135e9, "count": 7}
    return {
        "runtime": "ort-cpu",
        "library": "onnxruntime 1.31.1 MatMul",
        "threads": 2,
        "size": 2048,
        "macs_per_second": macs,
    }


@pytest.fixture
def cost_result() -> dict[str, Any]:
    """The released network as written."""
    return {
        "unet": {"all": 315_977_082_112, "convolutions": 307_396_616_192},
        "unet_conditional": {"all": 157_988_541_056, "convolutions": 153_698_308_096},
        "vae_encoder": {"all": 558_329_233_408, "convolutions": 536_854_396_928},
        "vae_decoder": {"all": 1_257_259_466_752, "convolutions": 1_235_784_630_272},
    }
