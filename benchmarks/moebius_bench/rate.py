"""The machine's own rate of matrix products, of fp32 numbers and of bytes: what a graph's speed is held against."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from moebius_bench.jobs import Job
from moebius_bench.results import Rate, RateKind
from moebius_bench.stats import summary
from moebius_bench.variants import TORCH
from moebius_runtime.backends import ort_integer
from moebius_runtime.backends.ort import import_onnxruntime, physical_cores
from moebius_runtime.backends.ort_integer import EXACT_WEIGHT
from moebius_runtime.errors import InputError

SIZE = 2048
_RUNS = 7

# An ONNX file, IR 8, opset 13: a float32 [2048, 2048] times b float32 [2048, 2048] gives c. As bytes, so that a device
# needs no onnx package; a test reads it with one.
MATMUL = bytes.fromhex(
    "080812003a600a110a01610a016212016322064d61744d756c12066d61746d756c5a150a016112100a0e0801120a0a03"
    "0880100a030880105a150a016212100a0e0801120a0a030880100a0308801062150a016312100a0e0801120a0a030880"
    "100a0308801042040a00100d"
)

# The same with `MatMulInteger`: a uint8 times b int8 gives c int32.
MATMUL_OF_BYTES = bytes.fromhex(
    "08083a670a180a01610a0162120163220d4d61744d756c496e746567657212066d61746d756c5a150a016112100a0e08"
    "02120a0a030880100a030880105a150a016212100a0e0803120a0a030880100a0308801062150a016312100a0e080612"
    "0a0a030880100a0308801042040a00100d"
)


def measure_rate(job: Job) -> Rate:
    """MAC per second of square products in the runtime's own library, with its number of threads.

    Of bytes where the job's precision is `int8_cpu`, else of fp32 numbers. Weights are -64 to 64, so that the products
    are right on every CPU; `saturates` of the result states whether they would be for all of int8.

    Raises:
        InputError: the runtime has no such product here.
    """
    threads = job.threads or physical_cores()
    kind: RateKind = "bytes" if job.precision == "int8_cpu" else "fp32"
    if job.runtime == TORCH and kind == "fp32":
        library, multiply = _torch_product(threads)
    elif job.runtime in _PROVIDERS:
        library, multiply = _ort_product(job.runtime, threads, kind)
    else:
        raise InputError(f"runtime {job.runtime!r}: its matrix-product rate is not measured in this version")
    multiply()
    multiply()
    rates = []
    for _ in range(_RUNS):
        started = time.perf_counter()
        multiply()
        rates.append(SIZE**3 / (time.perf_counter() - started))
    found = summary(rates)
    return Rate(
        runtime=job.runtime,
        library=library,
        threads=threads,
        size=SIZE,
        macs_per_second=found,
        kind=kind,
        saturates=kind == "bytes" and ort_integer.saturates(),
    )


_PROVIDERS = {"ort-cpu": "CPUExecutionProvider"}


def _ort_product(runtime: str, threads: int, kind: RateKind = "fp32") -> tuple[str, Callable[[], object]]:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model, name = (MATMUL_OF_BYTES, "MatMulInteger") if kind == "bytes" else (MATMUL, "MatMul")
    session = ort.InferenceSession(model, options, providers=[_PROVIDERS[runtime]])
    a, b = _matrices(kind)
    return f"onnxruntime {ort.__version__} {name}", lambda: session.run(None, {"a": a, "b": b})


def _torch_product(threads: int) -> tuple[str, Callable[[], object]]:
    from moebius_export.torch_runtime import import_torch

    torch = import_torch()
    torch.set_num_threads(threads)
    a, b = (torch.from_numpy(matrix) for matrix in _matrices())
    return f"torch {torch.__version__} mm", lambda: torch.mm(a, b)


def _matrices(kind: RateKind = "fp32") -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    if kind == "bytes":
        weights = rng.integers(-EXACT_WEIGHT, EXACT_WEIGHT + 1, (SIZE, SIZE), np.int8)
        return rng.integers(0, 256, (SIZE, SIZE), np.uint8), weights
    a, b = (rng.standard_normal((SIZE, SIZE), dtype=np.float32) for _ in range(2))
    return a, b
