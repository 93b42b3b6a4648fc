"""The cost model: an estimate of the time that INT8 saves on a device, to guide the search."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moebius_calibration.graph.linear_ops import LinearOp
from moebius_calibration.plan import Target


@dataclass(frozen=True)
class Rates:
    """Microseconds: saved per GMAC, spent per million activations quantized, saved per million weights read."""

    per_gmac: float
    per_activation: float
    per_weight: float


# A small RTX card, as in `moebius_export.precision.choose`: 25 TMAC/s in fp16, twice of that in INT8 and FP8, 100 GB/s.
# Quantizing in the kernel that writes an activation saves traffic; in a kernel of its own it costs more than that.
# CPU: ONNX Runtime with compiled kernels on two cores with AVX512-VNNI, which quantize values in the cache.
RATES: Mapping[Target, Rates] = MappingProxyType(
    {
        "tensorrt": Rates(20.0, 5.0, 10.0),
        "tensorrt-fp8": Rates(20.0, 5.0, 10.0),
        "ort-cpu": Rates(7000.0, 300.0, 100.0),
    }
)


def gain_of(ops: Iterable[LinearOp], rates: Rates) -> float:
    """Microseconds that INT8 saves over all of these operators; negative where it is slower."""
    return sum(
        rates.per_gmac * op.gmac - rates.per_activation * op.elements / 1e6 + rates.per_weight * op.weights / 1e6
        for op in ops
    )
