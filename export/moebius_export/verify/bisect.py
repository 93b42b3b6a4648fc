"""Finds the first tensor of an ONNX file that differs from PyTorch.

Tensors are matched by value, not by name: a tensor of the file is correct if PyTorch computes one with the same values
in the same order. So rewritten graphs need no table of names. A node is cleared if its output, or anything computed
from it, is correct. The first node in file order that is not cleared is the culprit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import onnx
from onnx import shape_inference
from polygraphy.backend.onnx import modify_outputs
from polygraphy.logger import G_LOGGER
from torch import nn

from moebius_export.graph.sessions import session_of_bytes
from moebius_export.trajectories.scenes import Inputs
from moebius_export.verify.results import Check
from moebius_export.verify.trace import Trace, sample, trace_module
from moebius_runtime.errors import BundleError

_BYTES_AT_ONCE = 512 << 20  # of marked outputs in one run
_UNKNOWN_BYTES = 64 << 20
_CLOSER_LOOK = 8  # candidates by cosine in float32, which are then measured in float64
_SAME_ORDER = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})


@dataclass(frozen=True)
class _Nearest:
    """The PyTorch tensor closest to one of the file: relative L2 error, and the best scale factor."""

    name: str
    error: float
    factor: float
    rest: float  # relative L2 error after scaling by the factor


@dataclass(frozen=True)
class _Known:
    """PyTorch's tensors of one size: names, samples float32 [k, n] and their norms [k]."""

    names: list[str]
    samples: np.ndarray
    norms: np.ndarray


def bisect(
    subject: str, path: Path, module: nn.Module, inputs: Inputs, tolerance: float, kernels: bool = False
) -> Check:
    """Returns a note that names the first wrong tensor of a file.

    Runs the module once and the file unoptimized, several times if its tensors do not fit in memory together.

    Args:
        subject: of the note.
        path: the ONNX file; its weights are beside it.
        module: the PyTorch module of the graph.
        inputs: on which the two disagree.
        tolerance: relative L2 error up to which two tensors count as equal.
        kernels: run the file's functions by compiled kernels.

    Raises:
        BundleError: the file cannot be run with its intermediate tensors as outputs.
    """
    model = onnx.load(str(path), load_external_data=False)
    known = _stacked(trace_module(module, inputs))
    nearest: dict[str, _Nearest | None] = {}
    broken: set[str] = set()
    for names in _batches(model):
        for name, values in _run(model, path, names, inputs, kernels).items():
            if values.dtype == np.float32:
                nearest[name] = _nearest(values, known)
                if not np.isfinite(values).all():
                    broken.add(name)
    same = {name for name, found in nearest.items() if found and found.error <= tolerance and name not in broken}
    culprit = _culprit(model, same)
    if culprit is None:
        words = (
            f"every tensor of the file is within {tolerance:.0e} of PyTorch's when it is an output; the fault is in a "
            "fusion of ONNX Runtime, or smaller than that"
        )
        return Check("bisect", subject, "first wrong tensor", "note", detail=words)
    output = culprit.output[0]
    found = nearest.get(output)
    words = f"{output} of node {culprit.name or '(no name)'} ({culprit.op_type})"
    if output in broken:
        words += " is the first that is not finite or not PyTorch's"
    elif found is None:
        words += " has no counterpart in PyTorch"
    else:
        words += f"; closest to PyTorch's {found.name}, relative error {found.error:.2e}"
        if found.rest < 0.01 * found.error and abs(found.factor - 1) > tolerance:
            words += f": {found.factor:.6g} times it"
    fine = [name for name in culprit.input if name in same]
    words += f". Its inputs agree: {', '.join(fine)}" if fine else ""
    stored = {tensor.name for tensor in model.graph.initializer}
    if weights := [name for name in culprit.input if name in stored]:
        words += f". It reads the stored {', '.join(weights)}"
    return Check("bisect", subject, "first wrong tensor", "note", found.error if found else None, tolerance, words)


def _culprit(model: onnx.ModelProto, same: set[str]) -> onnx.NodeProto | None:
    """The first node of the file that is not cleared."""
    cleared: set[str] = set()  # correct values, and values from which a correct one is computed
    suspects: list[onnx.NodeProto] = []
    for node in reversed(model.graph.node):
        if any(name in same or name in cleared for name in node.output):
            cleared.update(node.input)
        else:
            suspects.append(node)
    # Integers such as shapes are not compared, so a node that computes only those is no culprit.
    return next((node for node in reversed(suspects) if _computes(node)), None)


def _computes(node: onnx.NodeProto) -> bool:
    return node.op_type not in ("Constant", "Shape", "Cast", "Expand", *_SAME_ORDER)


def _stacked(trace: Trace) -> dict[int, _Known]:
    known = {}
    for size, rows in trace.samples.items():
        samples = np.stack(rows)  # [k, n]
        norms = np.linalg.norm(samples.astype(np.float64), axis=1)
        known[size] = _Known(trace.names[size], samples, np.maximum(norms, 1e-30))
    return known


def _nearest(values: np.ndarray, tensors: Mapping[int, _Known]) -> _Nearest | None:
    """The closest tensor by cosine, because a tensor with a wrong scale still has the right direction."""
    known = tensors.get(values.size)
    if known is None:
        return None
    found = np.nan_to_num(sample(values), nan=0.0, posinf=0.0, neginf=0.0)  # [n]
    cosines = (known.samples @ found) / (known.norms * max(float(np.linalg.norm(found)), 1e-30))  # [k]
    likely = np.argsort(-np.abs(cosines))[:_CLOSER_LOOK]
    rows, norms = known.samples[likely].astype(np.float64), known.norms[likely]
    errors = np.linalg.norm(rows - found, axis=1) / norms
    factors = rows @ found / norms**2
    best = int(errors.argmin()) if errors.min() < 0.01 else 0
    rest = np.linalg.norm(factors[best] * rows[best] - found) / norms[best]
    return _Nearest(known.names[likely[best]], float(errors[best]), float(factors[best]), float(rest))


def _batches(model: onnx.ModelProto) -> list[list[str]]:
    """The float values of the graph in file order, in groups that fit in memory together."""
    inferred = shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    values = {value.name: value.type.tensor_type for value in (*inferred.graph.value_info, *inferred.graph.output)}
    batches: list[list[str]] = [[]]
    room = _BYTES_AT_ONCE
    for node in model.graph.node:
        for name in node.output:
            kind = values.get(name)
            if not name or (kind is not None and kind.elem_type not in (0, onnx.TensorProto.FLOAT)):
                continue
            size = _UNKNOWN_BYTES
            if kind is not None and kind.HasField("shape"):
                size = 4 * prod(dimension.dim_value or 1 for dimension in kind.shape.dim)
            if size > room and batches[-1]:
                batches.append([])
                room = _BYTES_AT_ONCE
            room -= size
            batches[-1].append(name)
    return batches


def _run(
    model: onnx.ModelProto, path: Path, names: Sequence[str], inputs: Inputs, kernels: bool
) -> Mapping[str, np.ndarray]:
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        marked = modify_outputs(model, outputs=list(names), copy=True)
    session = session_of_bytes(marked.SerializeToString(), path, kernels)
    try:
        return dict(zip(names, session.run(list(names), inputs), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        raise BundleError(f"{path}: cannot be run tensor by tensor: {' '.join(str(error).split())[:300]}") from error
