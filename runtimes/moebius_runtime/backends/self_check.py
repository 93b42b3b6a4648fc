"""Checks a device before it is trusted: one run per graph against the values that PyTorch gave at export.

A provider can give wrong values without an error: ONNX Runtime's WebGPU provider does for dense 3x3 convolutions over
6 or 9 channels. The verdict is kept in the user's cache folder, by device, driver, versions and the graph's file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.check_values import (
    TOLERANCE,
    Array,
    check_inputs,
    differing_elements,
    inputs_digest,
    relative_error,
)
from moebius_runtime.bundle.manifest import GraphCheck, GraphName, Precision
from moebius_runtime.errors import DeviceError, InputError
from moebius_runtime.files.cache import Store, cache_folder

_LIMIT = 1 << 20  # bytes in the user's cache folder: some thousand verdicts


@dataclass(frozen=True)
class Computes:
    """What computes a graph.

    Attributes:
        device: its name.
        versions: of driver and libraries, and everything else that decides which code runs.
        precision: of the file.
        sha256: of the file or engine that is run; None where it is unknown, and the verdict is not kept.
    """

    device: str
    versions: str
    precision: Precision
    sha256: str | None


def check_graph(
    bundle: Bundle, graph: GraphName, runtime: str, computes: Computes, run: Callable[[Mapping[str, Array]], Array]
) -> str | None:
    """Runs a graph once on its stored inputs, unless the verdict is kept, and returns a note for the user, or None.

    Args:
        bundle: with the check values.
        graph: a graph of the bundle that the device has loaded.
        runtime: its name in `--runtime`.
        computes: the device.
        run: runs the graph.

    Raises:
        DeviceError: the output is not PyTorch's.
    """
    check = bundle.manifest.checks.get(graph)
    if check is None:
        return (
            f"this bundle holds no values to check {computes.device} by, so its results are not checked; export it "
            "again to get them"
        )
    if computes.precision not in TOLERANCE:
        return (
            f"{computes.precision} results of {computes.device} are not checked: the rounding of such a file can be as "
            "large as a fault"
        )
    place = _place(runtime, graph, check, computes)
    if place is not None and (known := _read(*place)) is not None:
        error, words = known
    else:
        inputs = check_inputs(bundle.graph(graph), check.drawn)
        if inputs_digest(inputs) != check.inputs_sha256:
            return f"NumPy draws other inputs for {graph} here than at export, so {computes.device} was not checked"
        output = run(inputs)
        error = relative_error(check, output)
        words = differing_elements(check, output)
        if place is not None:
            store, name = place
            store.write(name, json.dumps({"error": repr(error), "words": words, **asdict(computes)}).encode())
    if not error <= TOLERANCE[computes.precision]:  # also catches NaN
        raise DeviceError(_failed(graph, runtime, computes, error, words, place))
    return None


def known_failure(bundle: Bundle, runtime: str, computes: Mapping[GraphName, Computes]) -> str | None:
    """The message of a kept verdict that refuses the device; None if there is none."""
    for graph, one in computes.items():
        check = bundle.manifest.checks.get(graph)
        if check is None or one.precision not in TOLERANCE:
            continue
        place = _place(runtime, graph, check, one)
        known = None if place is None else _read(*place)
        if known is not None and not known[0] <= TOLERANCE[one.precision]:
            return _failed(graph, runtime, one, *known, place)
    return None


def _failed(
    graph: GraphName, runtime: str, computes: Computes, error: float, words: str, place: tuple[Store, str] | None
) -> str:
    kept = ""
    if place is not None:
        kept = f" It is checked again after an update of driver or library; to force it, remove {_path(place)}."
    return (
        f"{computes.device} computes {graph} wrongly with runtime {runtime!r} ({computes.versions}): relative error "
        f"{error:.1e}, at most {TOLERANCE[computes.precision]:.0e} is expected in {computes.precision}; {words}. "
        "Nothing was painted. Use another --runtime or --device, and please report this line with the output of "
        f"`moebius-export doctor`.{kept}"
    )


def _path(place: tuple[Store, str]) -> Path:
    return place[0].folder / place[1]


def _place(runtime: str, graph: GraphName, check: GraphCheck, computes: Computes) -> tuple[Store, str] | None:
    """Where the verdict is kept: by everything that decides it."""
    if computes.sha256 is None:
        return None
    try:
        store = Store(cache_folder() / "device-checks", _LIMIT)
    except InputError:  # no home folder: the check is run each time
        return None
    key = {"runtime": runtime, "graph": graph, "check": check.model_dump(), **asdict(computes)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return store, f"{graph}-{digest[:32]}.json"


def _read(store: Store, name: str) -> tuple[float, str] | None:
    """A kept verdict: relative error, and the element that differs most; None for a missing or damaged one."""
    data = store.read(name)
    if data is None:
        return None
    try:
        content: Any = json.loads(data)
        return float(content["error"]), str(content["words"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
