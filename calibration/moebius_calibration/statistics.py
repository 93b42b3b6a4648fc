"""What is remembered of a calibration: statistics of each activation, and a few inputs to judge plans by."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moebius_calibration.observers import BINS, Histogram, Seen
from moebius_export.errors import ExportError
from moebius_runtime.files import atomic_write, open_plain

Array = np.ndarray
_MAX_BYTES = 4 << 30
_VERSION = 2  # of a saved state; 1 had the largest magnitude of each channel alone


@dataclass
class Channels:
    """Of each channel of an activation that meets a weight: lowest and highest value, and sum over runs of the mean."""

    low: Array  # float32 [channels]
    high: Array  # float32 [channels]
    total: Array  # float64 [channels]
    runs: int = 0

    @property
    def largest(self) -> Array:
        """The largest magnitude of each channel, float32 [channels]."""
        return np.maximum(-self.low, self.high)

    @property
    def mean(self) -> Array:
        """float64 [channels]."""
        return self.total / max(1, self.runs)


@dataclass
class Statistics:
    """Of one graph: `seen` by activation, `channels` by the value that a product reads, `inputs` of some runs."""

    seen: dict[str, Seen] = field(default_factory=dict)
    channels: dict[str, Channels] = field(default_factory=dict)
    inputs: list[dict[str, Array]] = field(default_factory=list)
    runs: int = 0

    def add(self, step: int, outputs: Mapping[str, Array]) -> None:
        """Takes the outputs of one run of a graph of `observe.observed`, at one timestep.

        Raises:
            ExportError: a value is infinite or NaN in float32.
        """
        self.runs += 1
        for key, found in outputs.items():
            kind, _, name = key.partition(":")
            if kind == "range":
                if not np.isfinite(found).all():
                    raise ExportError(
                        f"{name} is not finite in float32 (timestep {step}), so nothing can be calibrated; check the "
                        "weights with `moebius-export verify`"
                    )
                seen = self.seen.setdefault(name, Seen())
                low, high = float(found[0]), float(found[1])
                before = seen.steps.get(step, (low, high))
                seen.steps[step] = (min(low, before[0]), max(high, before[1]))
                seen.histogram.add(outputs[f"sample:{name}"], max(abs(low), abs(high)))
            elif kind == "channels":
                self._channels(name, np.asarray(found, np.float64))

    def _channels(self, name: str, found: Array) -> None:
        low, high, mean = found
        low, high = low.astype(np.float32), high.astype(np.float32)
        if name not in self.channels:
            self.channels[name] = Channels(low, high, np.zeros(len(mean)))
        known = self.channels[name]
        known.low, known.high = np.minimum(known.low, low), np.maximum(known.high, high)
        known.total = known.total + mean
        known.runs += 1

    def samples(self, count: int) -> list[dict[str, Array]]:
        """At most `count` of the inputs that were kept, evenly over them."""
        places = {round(place) for place in np.linspace(0, len(self.inputs) - 1, num=min(count, len(self.inputs)))}
        return [self.inputs[place] for place in sorted(places)]


def save(path: Path, identity: str, done: int, statistics: Mapping[str, Statistics]) -> None:
    """Writes the statistics after `done` pictures, so that a stopped calibration can go on; whole or not at all.

    `identity` says what was calibrated, and how.
    """
    content: dict[str, object] = {"schema_version": _VERSION, "identity": identity, "done": done, "graphs": {}}
    arrays: dict[str, Array] = {}

    def keep(array: Array) -> str:
        arrays[f"a{len(arrays)}"] = array
        return f"a{len(arrays) - 1}"

    graphs = {}
    for graph, one in statistics.items():
        graphs[graph] = {
            "runs": one.runs,
            "seen": {
                name: [seen.histogram.reach, keep(seen.histogram.counts), sorted(seen.steps.items())]
                for name, seen in one.seen.items()
            },
            "channels": {name: [keep(c.low), keep(c.high), keep(c.total), c.runs] for name, c in one.channels.items()},
            "inputs": [{name: keep(array) for name, array in run.items()} for run in one.inputs],
        }
    content["graphs"] = graphs
    arrays["content"] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    with atomic_write(path) as stream:
        stream.write(buffer.getbuffer())


def load(path: Path, identity: str) -> tuple[int, dict[str, Statistics]]:
    """How many pictures were done, and the statistics of each graph.

    Raises:
        ExportError: the file is no such state, or one of another calibration.
    """
    try:
        with open_plain(path) as stream:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"over {_MAX_BYTES >> 30} GiB")
            with np.load(stream, allow_pickle=False) as arrays:
                content = json.loads(bytes(arrays["content"]))
                if content["schema_version"] != _VERSION:
                    raise ValueError(f"schema version {content['schema_version']}, this version reads {_VERSION}")
                if content["identity"] != identity:
                    raise ExportError(
                        f"{path}: it is the state of another calibration (other graphs, pictures, steps or seed); give "
                        "another --state, or remove the file to begin anew"
                    )
                found = {graph: _read(entry, arrays) for graph, entry in content["graphs"].items()}
                return int(content["done"]), found
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise ExportError(
            f"{path}: not the state of a calibration ({reason}); give another --state, or remove the file"
        ) from error


def _read(entry: dict[str, Any], arrays: Mapping[str, Array]) -> Statistics:
    one = Statistics(runs=int(entry["runs"]))
    for name, (reach, counts, steps) in entry["seen"].items():
        table = arrays[counts]
        if table.shape != (BINS,) or table.dtype != np.int64 or not reach > 0:
            raise ValueError(f"the histogram of {name} is damaged")
        ends = {int(step): (float(low), float(high)) for step, (low, high) in steps}
        one.seen[name] = Seen(Histogram(float(reach), table), ends)
    for name, (low, high, total, runs) in entry["channels"].items():
        one.channels[name] = Channels(arrays[low], arrays[high], arrays[total], int(runs))
    one.inputs = [{name: arrays[key] for name, key in run.items()} for run in entry["inputs"]]
    return one
