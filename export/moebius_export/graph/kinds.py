"""Float types of a precision plan, and their limits. bfloat16 arrays are their 16 bits, as NumPy has no such type."""

from __future__ import annotations

from typing import Literal

import numpy as np
from onnx import TensorProto

FloatType = Literal["fp32", "fp16", "bf16"]
LowType = Literal["fp16", "bf16"]

ELEMENT: dict[FloatType, int] = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
NAME: dict[int, FloatType] = {number: name for name, number in ELEMENT.items()}
LARGEST: dict[FloatType, float] = {"fp32": 3.4028235e38, "fp16": 65504.0, "bf16": 3.3895314e38}
SMALLEST: dict[FloatType, float] = {"fp32": 1.4e-45, "fp16": 2.0**-24, "bf16": 9.2e-41}
"""The smallest number above 0; values below half of it become 0."""


def tensor_of(values: np.ndarray, name: str, kind: FloatType) -> TensorProto:
    """A float32 array rounded to nearest, ties to even, as a tensor; values that overflow become infinite."""
    tensor = TensorProto(name=name, data_type=ELEMENT[kind], dims=values.shape)
    tensor.raw_data = _rounded(np.ascontiguousarray(values, np.float32), kind).tobytes()
    return tensor


def round_trip(values: np.ndarray, kind: FloatType) -> np.ndarray:
    """float32 -> that type -> float32."""
    rounded = _rounded(np.ascontiguousarray(values, np.float32), kind)
    wide = (rounded.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else rounded.astype(np.float32)
    return wide.reshape(values.shape)  # NumPy makes a scalar contiguous by giving it an axis


def _rounded(values: np.ndarray, kind: FloatType) -> np.ndarray:
    if kind == "fp32":
        return values.astype("<f4")
    if kind == "fp16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype("<u2")
    rounded[np.isnan(values)] = 0x7FC0  # adding to its bits could make it infinite
    return rounded
