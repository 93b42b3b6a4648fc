"""Statistics on real trajectories: every timestep of the schedule, both branches of the guidance, and the VAE.

The graph that runs has extra outputs: reductions of each activation, and an evenly spread part of its values for a
histogram. One run observes all activations, none leaves the session, and memory does not grow with the number of runs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd, prod
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from moebius_calibration.graph.linear_ops import LinearOp, shapes_of
from moebius_calibration.ranges.statistics import Statistics, load, save
from moebius_export.errors import ExportError
from moebius_export.graph.opened import Opened
from moebius_export.graph.sessions import ChangedBackend, session_of
from moebius_export.trajectories.measure import Say
from moebius_export.trajectories.scenes import Scene, guided_scale
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.errors import InputError
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline

SAMPLE = 1 << 16
"""Largest number of values of an activation that go into its histogram in each run."""

_KEPT_PICTURES = 2  # whose inputs are kept to evaluate plans on


def observed(graph: Opened, ops: Mapping[str, LinearOp]) -> onnx.ModelProto:
    """The graph with extra outputs: statistics of what its linear operators read.

    `range:NAME` float [3]: lowest and highest value, mean square. `sample:NAME` float [<= `SAMPLE`]. `channels:NAME`
    float [3, channels], for values that multiply a weight: lowest value, highest value and mean of each channel.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    add = _Adder(model, shapes_of(graph.model))
    sources = dict.fromkeys(name for op in ops.values() for name in op.watched)
    axes = {
        operand.value: operand.axis for op in ops.values() for operand in op.activations if operand.axis is not None
    }
    # Last value first, so that ONNX Runtime reduces each as soon as it is computed, see `precision.ranges.observed`.
    positions = {name: position for position, name in enumerate(graph.producers)}
    for name in sorted(dict.fromkeys((*sources, *axes)), key=lambda name: -positions.get(name, -1)):
        if name in sources:
            add.range(name)
        if name in axes:
            add.channels(name, axes[name])
    return model


class _Adder:
    """Adds nodes and outputs to a model."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._graph, self._shapes, self._numbers = model.graph, shapes, set[str]()

    def range(self, name: str) -> None:
        mark, one = f"range:{name}", self._number([1])
        self._node("Mul", [name, name], f"{mark}/squares")
        rows = []
        for operator, source in (("ReduceMin", name), ("ReduceMax", name), ("ReduceMean", f"{mark}/squares")):
            self._node(operator, [source], f"{mark}/{operator}", keepdims=0)
            self._node("Reshape", [f"{mark}/{operator}", one], f"{mark}/{operator}/row")
            rows.append(f"{mark}/{operator}/row")
        self._node("Concat", rows, mark, axis=0)
        size = prod(self._shapes[name])
        self._node("Reshape", [name, self._number([-1])], f"{mark}/flat")
        ends = [self._number([0]), self._number([size]), self._number([0]), self._number([_stride(size)])]
        self._node("Slice", [f"{mark}/flat", *ends], f"sample:{name}")
        self._output(mark)
        self._output(f"sample:{name}")

    def channels(self, name: str, axis: int) -> None:
        mark, shape = f"channels:{name}", self._shapes[name]
        others = self._number([index for index in range(len(shape)) if index != axis])
        row = self._number([1, shape[axis]])
        rows = []
        for operator in ("ReduceMin", "ReduceMax", "ReduceMean"):
            self._node(operator, [name, others], f"{mark}/{operator}", keepdims=0)
            self._node("Reshape", [f"{mark}/{operator}", row], f"{mark}/{operator}/row")
            rows.append(f"{mark}/{operator}/row")
        self._node("Concat", rows, mark, axis=0)
        self._output(mark)

    def _node(self, operator: str, inputs: list[str], output: str, **attributes: int) -> None:
        self._graph.node.append(helper.make_node(operator, inputs, [output], name=output, **attributes))

    def _output(self, name: str) -> None:
        self._graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def _number(self, values: list[int]) -> str:
        name = f"observe/{values}"
        if name not in self._numbers:
            self._numbers.add(name)
            self._graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name


def _stride(size: int) -> int:
    """Stride between the sampled values: it shares no factor with the size, so that samples come from all channels."""
    stride = max(1, -(-size // SAMPLE))
    while gcd(stride, size) > 1:
        stride += 1
    return stride


def check_scenes(scenes: Sequence[Scene], wanted: int, data: Path | None) -> None:
    """Checks that pictures can be calibrated on.

    Raises:
        InputError: there are fewer than wanted, one has a single colour, or several are all the same.
    """
    where = "the drawn pictures" if data is None else f"--data {data}"
    if len(scenes) < wanted:
        raise InputError(
            f"{where}: {len(scenes)} pictures are too small a set, --pictures expects {wanted}; add pictures, or "
            "lower --pictures"
        )
    for index, scene in enumerate(scenes, 1):
        if scene.picture.min() == scene.picture.max():
            raise InputError(f"{where}: picture {index} has a single colour, which gives no range; remove it")
    if len(scenes) > 1 and len({scene.picture.tobytes() for scene in scenes}) == 1:
        raise InputError(f"{where}: all {len(scenes)} pictures are the same; expected different ones")


def collect(
    bundle: Bundle,
    graphs: Mapping[GraphName, tuple[Opened, Mapping[str, LinearOp]]],
    scenes: Sequence[Scene],
    progress: Say,
    *,
    guided: bool = True,
    state: Path | None = None,
) -> dict[GraphName, Statistics]:
    """Inpaints the scenes with a bundle in float32, and observes what the linear operators read.

    Args:
        bundle: whose float32 files run.
        graphs: those to observe, with their operators.
        scenes: pictures and masks; see `check_scenes`.
        progress: called with each step.
        guided: with guidance (see `guided_scale`), or by `unet_conditional` alone.
        state: file for the statistics after each picture, from which a stopped calibration resumes; None for none.

    Raises:
        BundleError, InputError, OutputError: as `InpaintPipeline.inpaint`.
        ExportError: a value is not finite, or `state` belongs to another calibration.
    """
    found: dict[GraphName, Statistics] = {name: Statistics() for name in graphs}
    done = 0
    identity = _identity(bundle, graphs, scenes, guided)
    if state is not None and state.exists():
        done, before = load(state, identity)
        if set(before) != set(graphs):
            raise ExportError(f"{state}: it holds other graphs than this calibration; remove the file to start again")
        found = {name: before[name] for name in graphs}
    at = done

    def watch(graph: GraphName, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        if graph not in found:
            return
        step = int(inputs["timestep"][0]) if "timestep" in inputs else 0
        found[graph].add(step, outputs)
        if at < _KEPT_PICTURES:
            found[graph].inputs.append({name: array.copy() for name, array in inputs.items()})

    sessions = {
        name: lambda name=name, graph=graph, ops=ops: session_of(observed(graph, ops), bundle.model_file(name).parent)
        for name, (graph, ops) in graphs.items()
    }
    pipeline = InpaintPipeline(
        ChangedBackend(bundle, sessions, watch), memory="low"
    )  # one graph at a time: at full size all take 11 GB
    try:
        for at in range(done, len(scenes)):
            scene = scenes[at]
            options = replace(scene.options, guidance_scale=guided_scale(bundle.manifest) if guided else 1.0)
            what = f"calibrate: picture {at + 1} of {len(scenes)}" + ("" if guided else ", without guidance")
            progress(what, 0, 0)
            pipeline.inpaint(
                Picture(scene.picture, "RGB"),
                scene.mask,
                options,
                lambda step, total, what=what: progress(what, step, total),  # type: ignore[misc]
            )
            if state is not None:
                save(state, identity, at + 1, {str(name): one for name, one in found.items()})
    finally:
        pipeline.backend.release()
    return found


def _identity(
    bundle: Bundle,
    graphs: Mapping[GraphName, tuple[Opened, Mapping[str, LinearOp]]],
    scenes: Sequence[Scene],
    guided: bool,
) -> str:
    """A hash of everything that a state depends on: files of the bundle, scenes, noise, steps and guidance."""
    digest = hashlib.sha256()
    files = bundle.manifest.files
    for name in graphs:
        file = bundle.graph(name).files["fp32"]
        digest.update(json.dumps([name, *(files[path].sha256 for path in file.paths)]).encode())
    for scene in scenes:
        digest.update(scene.picture.tobytes() + scene.mask.tobytes())
        if scene.options.noise is not None:
            digest.update(scene.options.noise.tobytes())
        digest.update(json.dumps([scene.options.steps, guided]).encode())
    return digest.hexdigest()
