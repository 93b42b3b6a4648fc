"""What INT8 saves, by a model of the device: a guide for the search, not a measurement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moebius_calibration.graph.linear_ops import LinearOp
from moebius_calibration.plan import Target


@dataclass(frozen=True)
class Rates:
    """Microseconds: saved per GMAC, spent per million numbers that become bytes, saved per million weights read."""

    per_gmac: float
    per_activation: float
    per_weight: float


# A small RTX card, as in `moebius_export.precision.choose`: 25 TMAC/s in fp16, twice of that in INT8 and FP8, 100 GB/s.
# Bytes that an activation's maker writes save traffic, bytes that a kernel of their own makes cost it; the latter weigh
# more.
# CPU: ONNX Runtime with compiled kernels on two cores with AVX512-VNNI; bytes are made while values are in the cache.
RATES: Mapping[Target, Rates] = MappingProxyType(
    {
        "tensorrt": Rates(20.0, 5.0, 10.0),
        "tensorrt-fp8": Rates(20.0, 5.0, 10.0),
        "ort-cpu": Rates(7000.0, 300.0, 100.0),
    }
)


def gain_of(ops: Iterable[LinearOp], rates: Rates) -> float:
    """Microseconds that INT8 saves over all of them; below 0 where it costs more than it saves."""
    return sum(
        rates.per_gmac * op.gmac - rates.per_activation * op.elements / 1e6 + rates.per_weight * op.weights / 1e6
        for op in ops
    )
