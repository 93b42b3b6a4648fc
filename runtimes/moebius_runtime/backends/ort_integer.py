"""Whether ONNX Runtime's own INT8 operators are exact on this CPU, and what that means for INT8 there."""

from __future__ import annotations

import numpy as np

from moebius_runtime.backends.ort import import_onnxruntime

SIDE = 64
MODEL = bytes.fromhex(
    "08083a5f0a180a01610a0162120163220d4d61744d756c496e74656765721204696e74385a130a0161120e0a0c080212"
    "080a0208400a0208405a130a0162120e0a0c080312080a0208400a02084062130a0163120e0a0c080612080a0208400a"
    "02084042040a00100d"
)
"""An ONNX file, IR 8, opset 13: `MatMulInteger` of a uint8 [64, 64] and b int8 [64, 64] gives c int32 [64, 64]."""

EXACT_WEIGHT = 64
"""The largest magnitude of a weight that cannot saturate: 255 * 64 * 2 = 32640 fits into 16 bits with sign."""

SATURATES = (
    "ONNX Runtime's own INT8 operators (uint8 activations, int8 weights) saturate at 16 bits on this CPU, which has no "
    "VNNI: they are exact only for weights of 7 bits (-64 to 64), or slower with session.x64quantprecision=1. The "
    "compiled kernels of this project do not use them and are exact"
)


def saturates(threads: int = 1) -> bool:
    """Whether products of uint8 by int8 matrices in ONNX Runtime are wrong here, found by one such product.

    Without VNNI, x86-64 adds two products of bytes in 16 bits that saturate (`vpmaddubsw`): 255 * 127 * 2 = 64770
    becomes 32767. With VNNI, and on Arm, the sums have 32 bits.

    Raises:
        RuntimeUnavailableError: ONNX Runtime is not installed.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(MODEL, options, providers=["CPUExecutionProvider"])
    a, b = np.full((SIDE, SIDE), 255, np.uint8), np.full((SIDE, SIDE), 127, np.int8)
    (found,) = session.run(None, {"a": a, "b": b})
    return bool((found != SIDE * 255 * 127).any())
