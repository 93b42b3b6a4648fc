"""Statistics on real trajectories: every timestep of the schedule, both branches of the guidance, and the VAE.

The graph that runs has reductions of each activation as outputs more, and a part of its values, evenly spread, for the
histogram. So one run sees them all, activations never leave it, and what it needs does not grow with their number.
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

from moebius_calibration.products import Product, shapes_of
from moebius_calibration.statistics import Statistics, load, save
from moebius_export.errors import ExportError
from moebius_export.precision.graph import Opened
from moebius_export.precision.measure import Say
from moebius_export.precision.sessions import ChangedBackend, session_of
from moebius_export.scenes import Scene, guided_scale
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import InputError
from moebius_runtime.manifest import GraphName
from moebius_runtime.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline

SAMPLE = 1 << 16
"""At most so many values of an activation go into the histogram, in each run."""

_KEPT_PICTURES = 2  # whose inputs are kept to judge plans by


def observed(graph: Opened, products: Mapping[str, Product]) -> onnx.ModelProto:
    """The graph with statistics of what its products read as further outputs.

    `range:NAME` float [3]: lowest and highest value, mean square. `sample:NAME` float [<= `SAMPLE`]. `channels:NAME`
    float [3, channels], for values that meet a weight: lowest value, highest value and mean of each channel.
    """
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    add = _Adder(model, shapes_of(graph.model))
    for source in dict.fromkeys(name for product in products.values() for name in product.watched):
        add.range(source)
    axes = {
        operand.value: operand.axis
        for product in products.values()
        for operand in product.activations
        if operand.axis is not None
    }
    for value, axis in axes.items():
        add.channels(value, axis)
    return model


class _Adder:
    """Adds nodes and outputs to a model."""

    def __init__(self, model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._graph, self._shapes, self._numbers = model.graph, shapes, set[str]()

    def range(self, name: str) -> None:
        mark, one = f"range:{name}", self._number([1])
        self._node("Mul", [name, name], f"{mark}/squares")
        parts = []
        for operator, source in (("ReduceMin", name), ("ReduceMax", name), ("ReduceMean", f"{mark}/squares")):
            self._node(operator, [source], f"{mark}/{operator}", keepdims=0)
            self._node("Reshape", [f"{mark}/{operator}", one], f"{mark}/{operator}/row")
            parts.append(f"{mark}/{operator}/row")
        self._node("Concat", parts, mark, axis=0)
        size = prod(self._shapes[name])
        self._node("Reshape", [name, self._number([-1])], f"{mark}/flat")
        ends = [self._number([0]), self._number([size]), self._number([0]), self._number([_step(size)])]
        self._node("Slice", [f"{mark}/flat", *ends], f"sample:{name}")
        self._output(mark)
        self._output(f"sample:{name}")

    def channels(self, name: str, axis: int) -> None:
        mark, shape = f"channels:{name}", self._shapes[name]
        others = self._number([index for index in range(len(shape)) if index != axis])
        row = self._number([1, shape[axis]])
        parts = []
        for operator in ("ReduceMin", "ReduceMax", "ReduceMean"):
            self._node(operator, [name, others], f"{mark}/{operator}", keepdims=0)
            self._node("Reshape", [f"{mark}/{operator}", row], f"{mark}/{operator}/row")
            parts.append(f"{mark}/{operator}/row")
        self._node("Concat", parts, mark, axis=0)
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


def _step(size: int) -> int:
    """Every how manieth value is taken: a number that shares no factor with the size, so that all channels are met."""
    step = max(1, -(-size // SAMPLE))
    while gcd(step, size) > 1:
        step += 1
    return step


def check_scenes(scenes: Sequence[Scene], wanted: int, data: Path | None) -> None:
    """Refuses pictures that prove nothing.

    Raises:
        InputError: there are fewer than asked for, one is of one colour, or all of several are the same.
    """
    where = "the drawn pictures" if data is None else f"--data {data}"
    if len(scenes) < wanted:
        raise InputError(
            f"{where}: {len(scenes)} pictures are too small a set, --pictures asks for {wanted}; add pictures, or ask "
            "for fewer"
        )
    for index, scene in enumerate(scenes, 1):
        if scene.picture.min() == scene.picture.max():
            raise InputError(f"{where}: picture {index} is of one colour, which no range can be had from; take it out")
    if len(scenes) > 1 and len({scene.picture.tobytes() for scene in scenes}) == 1:
        raise InputError(f"{where}: all {len(scenes)} pictures are the same; give different ones")


def collect(
    bundle: Bundle,
    graphs: Mapping[GraphName, tuple[Opened, Mapping[str, Product]]],
    scenes: Sequence[Scene],
    say: Say,
    *,
    guided: bool = True,
    one_timestep: bool = False,
    state: Path | None = None,
) -> dict[GraphName, Statistics]:
    """Fills the scenes with a bundle in float32, and watches what the products read.

    Args:
        bundle: whose float32 files run.
        graphs: those to watch, with their products.
        scenes: what to fill; see `check_scenes`.
        say: told each step.
        guided: with guidance (see `guided_scale`), or by `unet_conditional` alone.
        one_timestep: watch only each picture's first run of a graph: what calibration without trajectories is.
        state: where the statistics are kept after each picture, and taken up again. None keeps none.

    Raises:
        BundleError, InputError, OutputError: as `InpaintPipeline.inpaint`.
        ExportError: a value is not finite; `state` is another calibration's.
    """
    found: dict[GraphName, Statistics] = {name: Statistics() for name in graphs}
    done = 0
    identity = _identity(bundle, graphs, scenes, guided, one_timestep)
    if state is not None and state.exists():
        done, before = load(state, identity)
        if set(before) != set(graphs):
            raise ExportError(f"{state}: it holds other graphs than are calibrated; remove the file to begin anew")
        found = {name: before[name] for name in graphs}
    runs: dict[GraphName, int] = {}
    at = done

    def watch(graph: GraphName, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        if graph not in found:
            return
        runs[graph] = runs.get(graph, 0) + 1
        if one_timestep and runs[graph] > 1:
            return
        step = int(inputs["timestep"][0]) if "timestep" in inputs else 0
        found[graph].add(step, outputs)
        if at < _KEPT_PICTURES:
            found[graph].inputs.append({name: array.copy() for name, array in inputs.items()})

    sessions = {
        name: lambda name=name, graph=graph, products=products: session_of(
            observed(graph, products), bundle.model_file(name).parent
        )
        for name, (graph, products) in graphs.items()
    }
    pipeline = InpaintPipeline(ChangedBackend(bundle, sessions, watch), memory="fast" if len(scenes) > 1 else "low")
    try:
        for at in range(done, len(scenes)):
            scene = scenes[at]
            options = replace(scene.options, guidance_scale=guided_scale(bundle.manifest) if guided else 1.0)
            what = f"calibrate: picture {at + 1} of {len(scenes)}" + ("" if guided else ", without guidance")
            runs.clear()
            pipeline.inpaint(
                Picture(scene.picture, "RGB"),
                scene.mask,
                options,
                lambda step, total, what=what: say(what, step, total),  # type: ignore[misc]
            )
            if state is not None:
                save(state, identity, at + 1, {str(name): one for name, one in found.items()})
    finally:
        pipeline.backend.release()
    return found


def _identity(
    bundle: Bundle,
    graphs: Mapping[GraphName, tuple[Opened, Mapping[str, Product]]],
    scenes: Sequence[Scene],
    guided: bool,
    one_timestep: bool,
) -> str:
    """What a state must have in common with a calibration to be one of it."""
    digest = hashlib.sha256()
    files = bundle.manifest.files
    for name in graphs:
        file = bundle.graph(name).files["fp32"]
        digest.update(json.dumps([name, *(files[path].sha256 for path in file.paths)]).encode())
    for scene in scenes:
        digest.update(scene.picture.tobytes() + scene.mask.tobytes())
        if scene.options.noise is not None:
            digest.update(scene.options.noise.tobytes())
        digest.update(json.dumps([scene.options.steps, guided, one_timestep]).encode())
    return digest.hexdigest()
