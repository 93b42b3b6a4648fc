"""Limits of the difference from PyTorch, by precision."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType

from moebius_export.errors import ExportError
from moebius_export.onnx_export.parity import RELATIVE_BUDGET
from moebius_runtime.bundle.manifest import Precision

MEANING = MappingProxyType(
    {
        "relative": "a graph's output: largest relative L2 error",
        "worst": "a graph's output: largest error of one element, in root mean squares of PyTorch's output",
        "drift": "latents after any step: largest relative L2 distance",
        "psnr": "the masked region: smallest PSNR in dB",
        "ssim": "the masked region: smallest SSIM",
        "lpips": "the picture: largest LPIPS, if its weights are on this machine",
        "saturated": "the masked region: largest share of values at 0 or 255 beyond PyTorch's share",
        "found": "smallest share of the graph's MACs that the runtime's profile accounts for",
    }
)

# Mixed-precision files, emulated. They must catch an overflow, and a layer that is rounded by mistake. A precision plan
# has its own, tighter budget on its trajectories (`precision.planning.ERROR`).
_FP16 = {
    "relative": 8e-3,
    "worst": 0.05,
    "drift": 1e-2,
    "psnr": 38.0,
    "ssim": 0.995,
    "lpips": 1e-2,
    "saturated": 0.005,
    "found": 0.999,
}
_BF16 = {**_FP16, "relative": 6e-2, "worst": 0.4, "drift": 6e-2, "ssim": 0.99}  # 3 bits less

# First figure: measured on the full-size graphs with random test weights. Second figure: on the small preset with its
# weights rounded to float16, the mildest loss of precision that must be found. The checks of a precision without
# budgets are not run.
BUDGETS: Mapping[Precision, Mapping[str, float]] = MappingProxyType(
    {
        "fp32": MappingProxyType(
            {
                "relative": RELATIVE_BUDGET,  # 4e-6 to 1.6e-5; 7e-4 to 1e-2
                "worst": 3e-4,  # 2e-5 to 9e-5; 5e-3 to 5e-2
                "drift": 5e-4,  # 1.2e-4 (4 steps; on the small preset 20 steps drift no further than 4); 2e-2
                "psnr": 60.0,  # 69.7, one level in 2 % of the pixels; 42.5
                "ssim": 0.9999,  # 0.999997; 0.9993
                "lpips": 1e-3,  # not measured: no weights at hand
                "saturated": 0.005,  # 7e-6 below PyTorch's share; guards against burnt-out pictures, not rounding
                "found": 0.999,  # 1
            }
        ),
        "fp16": MappingProxyType(_FP16),
        "bf16": MappingProxyType(_BF16),
    }
)


def budgets_for(precision: Precision, changes: Mapping[str, float]) -> dict[str, float] | None:
    """The budgets of a precision with the user's changes; None if any budget has no value."""
    table = {**BUDGETS.get(precision, {}), **changes}
    return table if set(table) == set(MEANING) else None


def parse_changes(texts: Iterable[str]) -> dict[str, float]:
    """Parses `NAME=VALUE` strings into budgets.

    Raises:
        ExportError: an unknown name, or a value that is not a finite number of at least 0.
    """
    changes = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in MEANING:
            raise ExportError(f"--budget {text}: expected NAME=VALUE, NAME one of {', '.join(MEANING)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number >= 0):
            raise ExportError(f"--budget {text}: {value!r} is not a finite number of at least 0")
        changes[name] = number
    return changes
