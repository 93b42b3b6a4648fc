"""Runs pictures through a bundle and records ranges of every value and inputs of every graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np

from moebius_export.graph.opened import Opened
from moebius_export.graph.sessions import ChangedBackend, session_of
from moebius_export.trajectories.ranges import Ranges, observed
from moebius_export.trajectories.scenes import Scene, guided_scale
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps done and the steps in all; both 0 where the number is unknown."""

Say = Progress  # its name in version 0.1


@dataclass
class Trajectories:
    """Recorded: `ranges` of the observed graphs, `inputs` and `outputs` of every run of every graph."""

    ranges: dict[GraphName, Ranges] = field(default_factory=dict)
    inputs: dict[GraphName, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    outputs: dict[GraphName, list[np.ndarray]] = field(default_factory=dict)

    def samples(self, graph: GraphName, count: int) -> list[dict[str, np.ndarray]]:
        """Inputs of at most `count` runs, evenly over all that were seen, the last among them."""
        seen = self.inputs.get(graph, [])
        places = {round(place) for place in np.linspace(0, len(seen) - 1, num=min(count, len(seen)))}
        return [seen[place] for place in sorted(places)]


class _StepsDone(Exception):  # noqa: N818  # no error: it ends a pipeline before the decoder
    pass


def follow(
    bundle: Bundle,
    graphs: Mapping[GraphName, Opened],
    scenes: Sequence[Scene],
    guided: bool,
    progress: Progress,
    *,
    decode: bool = True,
) -> Trajectories:
    """Inpaints the scenes with a bundle in float32 and records ranges, inputs and outputs.

    Args:
        bundle: whose float32 files run.
        graphs: those to observe value by value; the others run unchanged.
        scenes: the pictures and masks.
        guided: with guidance (see `guided_scale`), or without any, by the graph `unet_conditional` alone.
        progress: called with each step.
        decode: also run the decoder; False ends each picture after its last step.

    Raises:
        BundleError, OutputError: as `InpaintPipeline.inpaint`.
        ExportError: a value is not finite in float32.
    """
    found = Trajectories({name: Ranges() for name in graphs})

    def watch(graph: GraphName, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        found.inputs.setdefault(graph, []).append({name: array.copy() for name, array in inputs.items()})
        found.outputs.setdefault(graph, []).append(outputs[bundle.graph(graph).outputs[0].name].copy())
        if graph in graphs:
            found.ranges[graph].add(outputs)

    sessions = {
        name: lambda name=name, graph=graph: session_of(observed(graph), bundle.model_file(name).parent)
        for name, graph in graphs.items()
    }
    pipeline = InpaintPipeline(
        ChangedBackend(bundle, sessions, watch), memory="low"
    )  # one graph at a time: all take 11 GB
    try:
        for index, scene in enumerate(scenes, 1):
            options = replace(scene.options, guidance_scale=guided_scale(bundle.manifest) if guided else 1.0)
            what = f"picture {index} of {len(scenes)}" + ("" if guided else ", without guidance")

            def step(done: int, total: int, what: str = what) -> None:
                progress(what, done, total)
                if done == total and not decode:
                    raise _StepsDone

            progress(f"{what}, encode", 0, 0)
            with suppress(_StepsDone):
                pipeline.inpaint(Picture(scene.picture, "RGB"), scene.mask, options, step)
    finally:
        pipeline.backend.release()
    return found
