"""Times each kind of INT8 layer against its fp32 form on this machine, so that INT8 is chosen only where it wins.

How fast INT8 is depends on the processor's instructions: four times fp32 with dot products of INT8 values (AVX512-VNNI,
AVX-VNNI, Arm's), less than half as much more with AVX2, and perhaps slower than fp32 with neither.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_calibration.files.ort_cpu import as_int8
from moebius_calibration.graph.cpu_candidates import Candidate, candidates
from moebius_export.graph.sessions import session_of_bytes
from moebius_export.trajectories.scenes import seeded_inputs
from moebius_runtime import kernels
from moebius_runtime.backends.ort import import_onnxruntime
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.hardware.processors import physical_cores

_ROUNDS = 9

Shapes = Mapping[str, tuple[int, ...]]
"""Value of a graph -> its shape."""


@dataclass(frozen=True)
class Timed:
    """One layer in both forms, alone: seconds of the fastest of some runs each."""

    operator: str
    float32: float
    int8: float

    @property
    def ratio(self) -> float:
        """How many times as fast INT8 is."""
        return self.float32 / self.int8


def time_graph(bundle: Bundle, name: GraphName, rounds: int = _ROUNDS) -> dict[str, Timed]:
    """Times every layer of a graph that an INT8 operator can replace, by node; see `time_layers`.

    The graph runs once, to find the shapes of its activations.

    Raises:
        BundleError: ONNX Runtime cannot load the graph's fp32 file.
        RuntimeUnavailableError: ONNX Runtime is not installed, or the kernel library cannot be loaded.
    """
    path = bundle.model_file(name)
    model = onnx.load(str(path), load_external_data=False)
    stored = {tensor.name for tensor in model.graph.initializer}
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in (*model.graph.input, *model.graph.output)}
    inputs = seeded_inputs(name, bundle.manifest, 0)
    wanted = {
        value
        for node in model.graph.node
        for value in node.input
        if value and value not in stored and value not in known
    }
    reached = _of_candidates(model) & wanted
    watched.graph.output.extend(helper.make_tensor_value_info(one, TensorProto.FLOAT, None) for one in sorted(reached))
    session = session_of_bytes(watched.SerializeToString(), path, kernels=True)
    names = [value.name for value in session.get_outputs()]
    shapes = dict(zip(names, (array.shape for array in session.run(None, inputs)), strict=True))
    return time_layers(model, shapes | {value: array.shape for value, array in inputs.items()}, rounds)


def _of_candidates(model: onnx.ModelProto) -> set[str]:
    """The values that layers in `candidates` and the nodes that they absorb read, or the transposition before them."""
    found, _ = candidates(model)
    inside = {name for candidate in found.values() for name in (candidate.node, *candidate.absorbed)}
    read = {name for node in model.graph.node if node.name in inside for name in node.input}
    return read | {name for candidate in found.values() for name in candidate.activations}


def time_layers(model: onnx.ModelProto, shapes: Shapes, rounds: int = _ROUNDS) -> dict[str, Timed]:
    """Times every layer that an INT8 operator can replace in both forms, by node; equal layers are timed once.

    The two forms run alternately, with the threads of the runtime's default, after one warm-up run of each, on random
    values.

    Args:
        model: a fused float32 graph, as for `candidates`; weights need not be loaded.
        shapes: of the activations that these layers read.
        rounds: runs of each form.

    Raises:
        RuntimeUnavailableError: ONNX Runtime is not installed, or the kernel library cannot be loaded.
    """
    dims = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    known: dict[object, Timed] = {}
    found = {}
    for candidate in candidates(model)[0].values():
        alone = _layer_alone(model, candidate)
        reads = tuple(shapes[value.name] for value in alone.graph.input)
        key = (candidate.operator, tuple(dims[name] for name in candidate.weights), reads)
        if key not in known:
            known[key] = _timed(alone, candidate, reads, rounds)
        found[candidate.node] = known[key]
    return found


def slower(timed: Mapping[str, Timed]) -> dict[str, str]:
    """The nodes that are not faster in INT8 on this machine -> why they stay in float."""
    return {
        node: f"no gain: INT8 takes {1 / one.ratio:.2f} times as long as fp32 on this machine"
        for node, one in timed.items()
        if one.ratio <= 1
    }


def decision(timed: Mapping[str, Timed]) -> str:
    """What was measured and decided, as a sentence."""
    lines = []
    for operator in sorted({one.operator for one in timed.values()}):
        ratios = sorted(one.ratio for one in timed.values() if one.operator == operator)
        wins = sum(ratio > 1 for ratio in ratios)
        lines.append(f"{operator} {ratios[0]:.2g} to {ratios[-1]:.2g} ({wins} of {len(ratios)} layers win)")
    wins = sum(one.ratio > 1 for one in timed.values())
    words = f"this machine's kernels: {kernels.in_words()}. Speed of INT8 over fp32, layer by layer: {', '.join(lines)}"
    if not wins:
        return f"{words}. INT8 wins nowhere: all layers stay in float"
    return f"{words}. {wins} of {len(timed)} layers can become INT8; the others stay in float"


def _timed(single: onnx.ModelProto, candidate: Candidate, reads: tuple[tuple[int, ...], ...], rounds: int) -> Timed:
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in single.graph.initializer}
    chosen = candidates(single)[0][candidate.node]
    ranges = dict.fromkeys(candidate.activations, (-3.0, 3.0))
    int8 = as_int8(single, lambda name: arrays[name], {candidate.node: chosen}, ranges)
    random = np.random.RandomState(1)
    inputs = {
        value.name: random.standard_normal(shape).astype(np.float32)
        for value, shape in zip(single.graph.input, reads, strict=True)
    }
    forms = [_session(form) for form in (single, int8)]
    fastest = [float("inf")] * len(forms)
    for session in forms:
        session.run(None, inputs)
    for _ in range(rounds):
        for place, session in enumerate(forms):
            started = time.perf_counter()
            session.run(None, inputs)
            fastest[place] = min(fastest[place], time.perf_counter() - started)
    return Timed(candidate.operator, *fastest)


def _layer_alone(model: onnx.ModelProto, candidate: Candidate) -> onnx.ModelProto:
    """The nodes that an INT8 operator replaces as a graph of their own, with random numbers for weights that are not
    loaded."""
    names = {candidate.node, *candidate.absorbed}
    nodes = [node for node in model.graph.node if node.name in names]
    if candidate.operator in (
        "Int8LinearToPicture",
        "Int8LinearAddedToPicture",
    ):  # its transposition may have other consumers, and is not absorbed
        made = {output for node in nodes for output in node.output}
        wanted = {name for node in nodes for name in node.input} - made
        turns = [n for n in model.graph.node if n.op_type == "Transpose" and n.output[0] in wanted]
        nodes = [*turns, *nodes]
    used = {name for node in nodes for name in node.input if name}
    random = np.random.RandomState(0)
    stored = [
        numpy_helper.from_array(random.standard_normal(tuple(tensor.dims)).astype(np.float32) * 0.1, tensor.name)
        for tensor in model.graph.initializer
        if tensor.name in used and tensor.external_data
    ]
    stored += [tensor for tensor in model.graph.initializer if tensor.name in used and not tensor.external_data]
    produced = {output for node in nodes for output in node.output} | {tensor.name for tensor in stored}
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        for name in dict.fromkeys(name for node in nodes for name in node.input if name)
        if name not in produced
    ]
    output = helper.make_tensor_value_info(candidate.output, TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, candidate.node, inputs, [output], stored)
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    called = {node.op_type for node in nodes}
    alone.functions.extend(function for function in model.functions if function.name in called)
    return alone


def _session(model: onnx.ModelProto) -> Any:
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.log_severity_level = 4
    library = kernels.library_path()
    if library is not None:
        options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
