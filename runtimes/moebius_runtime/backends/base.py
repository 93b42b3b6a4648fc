"""The base class of all runtimes: runs graphs by name on arrays, and checks inputs and outputs."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from moebius_runtime.backends.self_check import Computes, check_graph, known_failure
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, TensorInfo
from moebius_runtime.errors import BundleError, DeviceError, InputError

Array = NDArray[Any]
_MAX_THREADS = 1024


class Backend(ABC):
    """Runs the graphs of a bundle. A backend overrides `_load`, `_run` and `_unload`; the checks are here.

    Threads can share a backend: it loads, runs and releases one graph at a time. `lock` reserves it for several calls.
    """

    name: str
    reference: ClassVar[bool] = False
    """Whether the export compared its files with PyTorch on this runtime, so that a missing check needs no note."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        if threads is not None and not 1 <= threads <= _MAX_THREADS:
            raise InputError(f"threads is {threads}; expected 1 to {_MAX_THREADS}, or none for the physical cores")
        self.bundle = bundle
        self.threads = threads
        self.lock = threading.RLock()
        self._place = bundle.path.absolute()  # the current folder may change before it is pickled
        self._loaded: dict[GraphName, Any] = {}
        self._notes: list[str] = []
        self.self_check = True  # False runs a graph that is known to be wrong, to find the fault
        self._trusted: set[GraphName] = set()
        self._noted: set[str] = set()

    def has(self, graph: GraphName) -> bool:
        """Whether the graph can be run: it is in the bundle, and this runtime has all that it needs for it."""
        return graph in self.bundle.manifest.every_graph

    def note(self, *messages: str) -> None:
        """Adds notes for the user."""
        with self.lock:
            self._notes += messages

    def take_notes(self) -> list[str]:
        """Returns the notes that were not returned yet."""
        with self.lock:
            notes, self._notes = self._notes, []
        return notes

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> Array:
        """Runs a graph, loading it first where needed, and returns its one output.

        Args:
            graph: a name of the manifest's graphs.
            inputs: arrays of exactly the names, types and shapes of the manifest.

        Raises:
            BundleError: the graph's files are missing or damaged, it cannot be run, or its output is not that of
                the manifest.
            DeviceError: the device computes the graph wrongly.
            ValueError: an input differs from the manifest (a bug of the caller, not of the user).
        """
        info = self.bundle.graph(graph)
        if set(inputs) != {tensor.name for tensor in info.inputs}:
            raise ValueError(f"{graph} takes {[t.name for t in info.inputs]}, got {sorted(inputs)}")
        for tensor in info.inputs:
            if problem := _mismatch(inputs[tensor.name], tensor):
                raise ValueError(f"{graph}: input {problem}")
        arrays = {tensor.name: np.ascontiguousarray(inputs[tensor.name]) for tensor in info.inputs}
        with self.lock:
            self.load(graph)
            output = self._run(self._loaded[graph], arrays)
        if problem := _mismatch(output, info.outputs[0]):
            raise BundleError(
                f"{graph}: output {problem}; the file is not the graph that the manifest describes. Export it again."
            )
        return output

    def verify(self, graph: GraphName) -> None:
        """Refuses damaged files of a graph before it is loaded; errors as `run`."""
        self.bundle.model_file(graph)

    def fetch(self) -> None:
        """Fetches all that this runtime reads of a bundle in a hub, so that later calls need no network.

        Raises:
            BundleError: as `Bundle.model_file`.
        """
        self.note(*self.bundle.take_notes())
        if self.bundle.remote is not None:
            for graph in self.bundle.manifest.graphs:
                if self.has(graph):
                    self.verify(graph)

    def is_loaded(self, graph: GraphName) -> bool:
        """Whether the graph is in memory."""
        return graph in self._loaded

    def load(self, graph: GraphName) -> None:
        """Loads a graph before its first run."""
        with self.lock:
            if graph not in self._loaded:
                handle = self._load(graph)
                try:
                    self._check_device(graph, handle)
                except BaseException:
                    self._unload(handle)
                    raise
                self._loaded[graph] = handle

    def release(self, graph: GraphName | None = None) -> None:
        """Frees a graph's memory, or that of all graphs; the next run loads it again."""
        with self.lock:
            for name in [graph] if graph else list(self._loaded):
                if name in self._loaded:
                    self._unload(self._loaded.pop(name))

    def computes(self, graph: GraphName) -> Computes | None:
        """The device and versions that compute a graph, by which verdicts of the device's check are kept.

        None, the default, means that the runtime is not checked.
        """
        del graph
        return None

    def _check_device(self, graph: GraphName, handle: Any) -> None:
        """Compares a graph's result on stored inputs with PyTorch's, once per device, driver and version.

        Raises:
            DeviceError: they differ.
        """
        if not self.self_check or graph in self._trusted or (computes := self.computes(graph)) is None:
            return
        note = check_graph(self.bundle, graph, self.name, computes, lambda inputs: self._run(handle, inputs))
        self._trusted.add(graph)
        if note and not self.reference and note not in self._noted:
            self._noted.add(note)
            self.note(note)

    def refuse_known_failure(self) -> None:
        """Raises `DeviceError` if an earlier check found that this device computes a graph wrongly."""
        found = {
            graph: one for graph in self.bundle.manifest.graphs if self.has(graph) and (one := self.computes(graph))
        }
        if problem := known_failure(self.bundle, self.name, found):
            raise DeviceError(problem)

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments except the bundle, from which another process can create the same backend.

        Raises:
            TypeError: this backend cannot be pickled.
        """
        raise TypeError(
            f"runtime {self.name!r} cannot be pickled; open the bundle in the new process with "
            "InpaintPipeline.from_bundle"
        )

    def __reduce__(self) -> tuple[Callable[..., Backend], tuple[type[Backend], Path, dict[str, Any]]]:
        return _reopened, (type(self), self._place, self.arguments())

    @abstractmethod
    def _load(self, graph: GraphName) -> Any:
        """Loads a graph and returns a handle for `_run`."""

    @abstractmethod
    def _run(self, handle: Any, inputs: Mapping[str, Array]) -> Array:
        """Runs a loaded graph on checked, contiguous inputs."""

    def _unload(self, handle: Any) -> None:
        """Frees resources that Python's reference counting does not."""
        del handle

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """Library version, providers or device, and threads, as the runtime itself reports them."""


def _reopened(kind: type[Backend], path: Path, arguments: dict[str, Any]) -> Backend:
    """Restores a pickled backend in another process: the bundle is opened and checked again."""
    return kind(Bundle.open(path), **arguments)


def in_words(precisions: Mapping[GraphName, str]) -> str:
    """The U-Net's precision, and in brackets the graphs of another precision, such as `fp16 (vae_decoder fp32)`."""
    unet = precisions["unet"]
    others = ", ".join(f"{graph} {precision}" for graph, precision in precisions.items() if precision != unet)
    return f"{unet} ({others})" if others else unet


def _mismatch(array: Array, expected: TensorInfo) -> str | None:
    """Describes what differs from the manifest, or None. Dynamic dimensions match any size."""
    fits = len(array.shape) == len(expected.shape) and all(
        isinstance(want, str) or have == want for have, want in zip(array.shape, expected.shape, strict=True)
    )
    if fits and array.dtype == np.dtype(expected.dtype):
        return None
    return f"{expected.name}: expected {expected.dtype} {expected.shape}, got {array.dtype} {list(array.shape)}"
