"""Values in the manifest by which a device is checked: a graph's seeded inputs, and a sketch of PyTorch's output.

The sketch of an output y with n elements holds its norm |y|, m projections <s_i, y> / sqrt(n) on vectors s_i of random
signs, and a few elements. By the lemma of Johnson and Lindenstrauss (with signs: Achlioptas, 2003) the mean of
<s_i, d>^2 over i is |d|^2 in expectation for any difference d, with a relative standard deviation of sqrt(2 / m). So
m numbers give the relative L2 error of an output of any size, wherever in it the error is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from moebius_runtime.bundle.manifest import GraphCheck, GraphInfo, Precision

PROJECTIONS = 16
"""m: the measured relative error has a standard deviation of 18 %; one of ten times the limit passes never."""

ELEMENTS = 8

TOLERANCE: Mapping[Precision, float] = {
    "fp32": 3e-4,  # ten times the export's budget on the CPU: GPUs approximate exp and 1/sqrt to some ulp
    "fp16": 3e-2,  # four times the budget of emulated fp16 (`moebius_export.verify.budgets`), as for bf16
    "bf16": 0.24,
}
"""Largest relative L2 error of a graph's output on a device, by the precision of the file.

Quantized files have none: on random test weights the rounding of a right one reaches 0.85 of the output (FP8).
"""

_INPUT_SEED, _SIGN_SEED = 7, 8
Array = npt.NDArray[Any]


def check_inputs(info: GraphInfo, drawn: int) -> dict[str, Array]:
    """Inputs of a graph with the statistics that the pipeline gives it, from a fixed seed.

    `RandomState` keeps its stream for all versions of NumPy (NEP 19). The export draws the same ones.

    Args:
        info: the graph; an open first axis gets one picture.
        drawn: number of pictures to draw.
    """
    rng = np.random.RandomState(_INPUT_SEED)
    sizes = {tensor.name: tensor.shape for tensor in info.inputs}
    if "inside" in sizes:
        return window_inputs(rng, [int(size) for size in sizes["overview"]])
    inputs: dict[str, Array] = {}
    for tensor in info.inputs:
        kept = 1 if isinstance(tensor.shape[0], str) else drawn
        shape = (drawn, *(int(size) for size in tensor.shape[1:]))
        if tensor.name == "timestep":
            inputs[tensor.name] = np.array([500], np.int64)
        elif tensor.name == "guidance_scale":
            inputs[tensor.name] = np.array([2.5], np.float32)
        elif tensor.name == "image":
            inputs[tensor.name] = rng.uniform(-1, 1, shape).astype(np.float32)[:kept]
        elif tensor.name == "sample":  # [B, 2C + 1, s, s]: latents, mask, latents of the masked picture
            part = (drawn, (shape[1] - 1) // 2, *shape[2:])
            latents = rng.standard_normal(part)
            mask = rng.uniform(size=(drawn, 1, *shape[2:])) < 0.3
            masked = rng.standard_normal(part)
            inputs[tensor.name] = np.concatenate([latents, mask, masked], axis=1).astype(np.float32)[:kept]
        else:
            inputs[tensor.name] = rng.standard_normal(shape).astype(np.float32)[:kept]
    return inputs


def window_inputs(rng: np.random.RandomState, overview: list[int]) -> dict[str, Array]:
    """Inputs of the decoder's upper part, whose window is open: about a quarter of the square, in the top left corner.

    Args:
        rng: the values are drawn from it.
        overview: shape [1, C, s, s]; a cell of it stands for 4 x 4 of the features.
    """
    _, channels, side, _ = overview
    rows, columns = side // 2, side // 2 + 1
    inside = np.zeros((1, 1, side, side), np.float32)
    inside[:, :, :rows, :columns] = 1
    features = rng.standard_normal((1, channels, 4 * rows, 4 * columns)).astype(np.float32)
    return {
        "features": features,
        "overview": rng.standard_normal((1, channels, side, side)).astype(np.float32),
        "inside": inside,
    }


def make_check(inputs: Mapping[str, Array], output: Array, drawn: int) -> GraphCheck:
    """The check values of a graph.

    Args:
        inputs: by name, as `check_inputs` returns them.
        output: float32, of these inputs; finite and not zero.
        drawn: see `check_inputs`.
    """
    flat = output.astype(np.float64).ravel()
    return GraphCheck(
        drawn=drawn,
        inputs_sha256=inputs_digest(inputs),
        norm=float(np.linalg.norm(flat)),
        projections=list(_projected(flat, PROJECTIONS)),
        values=_elements(flat, ELEMENTS),
    )


def relative_error(check: GraphCheck, output: Array) -> float:
    """An estimate of |output - expected| / |expected| from the sketch; infinite if a value is not finite."""
    flat = output.astype(np.float64).ravel()
    if not np.isfinite(flat).all():
        return float("inf")
    got = np.array(list(_projected(flat, len(check.projections))))
    difference = got - np.array(check.projections)
    # <s, d> / sqrt(n) has the variance |d|^2 / n.
    return float(sqrt(float((difference**2).mean()) * flat.size) / check.norm)


def differing_elements(check: GraphCheck, output: Array) -> str:
    """The stored element that differs most, as text."""
    got = _elements(output.astype(np.float64).ravel(), len(check.values))
    index = int(np.argmax(np.abs(np.nan_to_num(np.array(got) - np.array(check.values), nan=np.inf))))
    return f"element {_places(output.size, len(got))[index]} is {got[index]:.6g}, expected {check.values[index]:.6g}"


def inputs_digest(inputs: Mapping[str, Array]) -> str:
    """SHA-256 of the inputs' names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, array in sorted(inputs.items()):
        digest.update(f"{name} {array.dtype.name} {list(array.shape)}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _projected(flat: Array, count: int) -> Iterator[float]:
    rng = np.random.RandomState(_SIGN_SEED)
    for _ in range(count):
        signs = rng.randint(0, 2, flat.size, dtype=np.int8).astype(np.float64) * 2 - 1
        yield float(signs @ flat / sqrt(flat.size))


def _places(size: int, count: int) -> list[int]:
    return [int(place) for place in np.linspace(0, size - 1, count)]


def _elements(flat: Array, count: int) -> list[float]:
    return [float(flat[place]) for place in _places(flat.size, count)]
