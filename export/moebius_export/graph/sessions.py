"""ONNX Runtime sessions of `ort-cpu` for measurements: with a profile, more outputs, or a graph changed in memory."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from moebius_runtime.backends.base import Array, Backend
from moebius_runtime.backends.ort import OrtBackend, add_kernels, import_onnxruntime
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.errors import BundleError
from moebius_runtime.hardware.processors import physical_cores

Watch = Callable[[GraphName, Mapping[str, Array], Mapping[str, Array]], None]


@dataclass
class Profiled:
    """A session with its profile: `events` holds one entry per executed node once the `with` block has ended.

    `kernels` names what ran the model's functions, see `moebius_runtime.backends.ort.add_kernels`.
    """

    session: Any
    kernels: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def profiled_session(model: Path, changed: bytes | None = None, *, kernels: bool = True) -> Iterator[Profiled]:
    """Yields a session that profiles what it runs.

    Args:
        model: the ONNX file.
        changed: a changed model to run instead; its weights stay in the files beside `model`.
        kernels: use the compiled kernels; without them the bodies of the model's functions run.

    Raises:
        BundleError: ONNX Runtime cannot load the file.
    """
    with tempfile.TemporaryDirectory(prefix="moebius-profile-") as folder:
        options = _options(None if changed is None else model.parent)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        ran_by = add_kernels(options, model) if kernels else None
        profiled = Profiled(_session(changed or str(model), options, str(model)), ran_by)
        path = None
        try:
            yield profiled
        finally:
            path = profiled.session.end_profiling()
        profiled.events.extend(
            entry for entry in json.loads(Path(path).read_bytes()) if entry.get("cat") == "Node" and "args" in entry
        )


def session_of_functions(model: Path) -> Any:
    """Returns a session without compiled kernels: the bodies of the model's functions run; errors as `session_of`."""
    return _session(str(model), _options(), str(model))


def session_of_bytes(model: bytes, path: Path, kernels: bool) -> Any:
    """Returns a session of a changed model without ONNX Runtime's graph optimizations.

    A difference is then a fault of the file, or of the compiled kernels where `kernels` asks for them.

    Args:
        model: the changed model; its weights stay in the files beside `path`.
        path: the original model.
        kernels: use the compiled kernels.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    options = _options(path.parent)
    options.graph_optimization_level = import_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # the arena would double the memory of one run with many outputs
    if kernels:
        add_kernels(options, path)
    return _session(model, options, f"a graph of {path.parent}")


def session_of(model: onnx.ModelProto, folder: Path, threads: int | None = None) -> Any:
    """Returns a session of a model in memory, without compiled kernels.

    Args:
        model: its weights lie in the files of `folder`.
        folder: of the bundle's files.
        threads: of ONNX Runtime; one per physical core by default.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    return _session(model.SerializeToString(), _options(folder, threads), f"a graph of {folder}")


class ChangedBackend(Backend):
    """`ort-cpu` with some graphs exchanged for changed ones; the other graphs run unchanged.

    Args:
        bundle: the bundle.
        sessions: graph -> a function that makes its session when it is loaded.
        watch: called after every run with the graph, its inputs, and all outputs of its session by name; the first
            output is the graph's own.
    """

    name = "ort-cpu"

    def __init__(
        self, bundle: Bundle, sessions: Mapping[GraphName, Callable[[], Any]], watch: Watch | None = None
    ) -> None:
        super().__init__(bundle)
        self._sessions, self._watch = sessions, watch

    @cached_property
    def _others(self) -> OrtBackend:
        """Runs the unchanged graphs. Made on demand: a bundle without float32 files may have none."""
        others = OrtBackend(self.bundle)
        others.self_check = False  # measurements run wrong files too
        return others

    def verify(self, graph: GraphName) -> None:
        """Checks the bundle's file of an unchanged graph."""
        if graph not in self._sessions:
            self._others.verify(graph)

    def _load(self, graph: GraphName) -> Any:
        if graph in self._sessions:
            return graph, self._sessions[graph]()
        self._others.load(graph)
        return graph, None

    def _run(self, handle: Any, inputs: Mapping[str, Array]) -> Array:
        graph, session = handle
        if session is None:
            output = self._others.run(graph, inputs)
            outputs = {self.bundle.graph(graph).outputs[0].name: output}
        else:
            try:
                values = session.run(None, dict(inputs))
            except Exception as error:  # its exceptions share no base class of their own
                raise BundleError(
                    f"ONNX Runtime cannot run {graph} of {self.bundle.path}: {_one_line(error)}"
                ) from error
            outputs = dict(zip((one.name for one in session.get_outputs()), values, strict=True))
            output = values[0]
        if self._watch is not None:
            self._watch(graph, inputs, outputs)
        return output

    def _unload(self, handle: Any) -> None:
        graph, session = handle
        if session is None:
            self._others.release(graph)

    def describe(self) -> dict[str, str]:
        """The description of `ort-cpu`, where it runs any graph, and the names of the changed graphs."""
        others = set(self.bundle.manifest.graphs) - set(self._sessions)
        described = self._others.describe() if others else {"runtime": self.name}
        return described | {"changed": ", ".join(self._sessions)}


def _options(weights: Path | None = None, threads: int | None = None) -> Any:
    """Options as `ort-cpu` has them; `weights` is the folder of the weights of a model that is given in memory."""
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.log_severity_level = 4
    options.enable_mem_reuse = options.enable_mem_pattern = False  # see `moebius_runtime.backends.ort`
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights.resolve()))
    return options


def _session(model: str | bytes, options: Any, name: str) -> Any:
    try:
        return import_onnxruntime().InferenceSession(model, options, providers=list(OrtBackend.providers))
    except Exception as error:  # its exceptions share no base class of their own
        raise BundleError(f"{name}: ONNX Runtime cannot load it: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
