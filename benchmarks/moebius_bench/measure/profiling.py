"""Where the time goes inside a graph, by ONNX Runtime's own profile. Taken in a run of its own: profiling slows."""

from __future__ import annotations

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius_bench.measure.network_parts import part_of
from moebius_bench.measure.results import GraphProfile, OpShare
from moebius_bench.measure.worker_job import Job
from moebius_runtime.errors import InputError, OutputError

_SUFFIX = "_kernel_time"
_PICTURES = 3  # the VAE's graphs run once or twice a picture; the first run is not counted


@dataclass(frozen=True)
class NodeEvent:
    """One run of one node."""

    name: str
    op_type: str
    provider: str
    seconds: float


def profile_bundle(job: Job) -> list[GraphProfile]:
    """Profiles the graphs of one short picture: a step graph, encoder and decoder.

    Raises:
        InputError: the runtime has no profile that is read here.
    """
    if not job.runtime.startswith("ort-"):
        raise InputError(f"--profile reads ONNX Runtime's profile; runtime {job.runtime!r} has none")
    from moebius_bench.measure.measuring import make_backend, picture_and_mask
    from moebius_runtime.pipeline import InpaintPipeline, make_options

    backend: Any = make_backend(job)
    with tempfile.TemporaryDirectory(prefix="moebius-profile-") as folder:
        backend._ort = _Profiling(backend._ort, folder)
        pipeline = InpaintPipeline(backend, memory="fast")
        options = make_options(
            mode=job.mode,
            steps=1 + job.warmup_steps,
            strength=1.0,
            guidance_scale=job.guidance_scale,
            seed=job.seed,
        )
        picture, mask = picture_and_mask(job, pipeline.manifest.geometry.image_size)
        for _ in range(_PICTURES):
            pipeline.inpaint(picture, mask, options)
        profiles = []
        for graph in backend._loaded:
            path = Path(backend._loaded[graph].end_profiling())
            uncounted = job.warmup_steps if graph.startswith("unet") else 1
            profiles.append(summarise(graph, read_profile(path), uncounted))
        return profiles


class _Profiling:
    """The module `onnxruntime`, whose session options write a profile. Everything else stays as the runtime sets it."""

    def __init__(self, module: Any, folder: str) -> None:
        self._module, self._folder = module, folder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def SessionOptions(self) -> Any:  # noqa: N802 - onnxruntime's name
        options = self._module.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self._folder) / "ort")
        return options


def read_profile(path: Path) -> list[list[NodeEvent]]:
    """The node events of each run of a session, in order.

    Raises:
        OutputError: the file is not a profile of a session that ran.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(_SUFFIX)]
        bounds = sorted(
            (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") == "Session" and e["name"] == "model_run"
        )
        runs: list[list[NodeEvent]] = [[] for _ in bounds]
        for event in nodes:
            for run, (begin, end) in zip(runs, bounds, strict=True):
                if begin <= event["ts"] <= end:
                    run.append(_node_event(event))
                    break
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path}: not a profile of ONNX Runtime as this version writes it ({error})") from error
    if not any(runs):
        raise OutputError(f"{path}: the profile holds no node that ran; update ONNX Runtime")
    return runs


def _node_event(event: Mapping[str, Any]) -> NodeEvent:
    args = event["args"]
    name = event["name"].removesuffix(_SUFFIX)
    return NodeEvent(name, args["op_name"], args["provider"], float(event["dur"]) * 1e-6)


def summarise(graph: str, runs: list[list[NodeEvent]], uncounted: int) -> GraphProfile:
    """Sums per run by type, node, part and provider, each sorted by time; the first `uncounted` runs are left out."""
    counted = runs[uncounted:]
    if not counted:
        raise OutputError(f"{graph}: {len(runs)} profiled runs, all of them warm-up")
    events = [event for run in counted for event in run]
    return GraphProfile(
        graph=graph,
        runs=len(counted),
        by_type=_shares(events, len(counted), lambda e: e.op_type),
        by_node=_shares(events, len(counted), lambda e: e.name),
        by_part=_shares(events, len(counted), lambda e: part_of(_plain(e.name), e.op_type)),
        by_provider=_shares(events, len(counted), lambda e: e.provider),
    )


def _plain(name: str) -> str:
    """The name as it is in the file: the runtime's own marks on nodes that it fused or moved are taken off."""
    return re.sub(r"_nchwc$|/\w+Fusion/$", "", name)


def _shares(events: Iterable[NodeEvent], runs: int, key: Callable[[NodeEvent], str]) -> list[OpShare]:
    seconds: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for event in events:
        seconds[key(event)] += event.seconds
        counts[key(event)] += 1
    whole = sum(seconds.values()) or 1.0
    return [
        OpShare(name=name, seconds=value / runs, share=value / whole, count=counts[name] // runs)
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
    ]
