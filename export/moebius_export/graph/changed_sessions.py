"""ONNX Runtime sessions of graphs that were changed in memory, and pipelines that run them in place of a bundle's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from moebius_runtime.backends.base import Array, Backend
from moebius_runtime.backends.ort import OrtBackend, import_onnxruntime
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName
from moebius_runtime.errors import BundleError
from moebius_runtime.hardware.processors import physical_cores

Watch = Callable[[GraphName, Mapping[str, Array], Mapping[str, Array]], None]

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


def session_of(model: onnx.ModelProto, folder: Path, threads: int | None = None) -> Any:
    """A session of a model in memory whose weights lie in the files of `folder`, without compiled kernels.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.log_severity_level = 4
    options.enable_mem_reuse = options.enable_mem_pattern = False  # see `moebius_runtime.backends.ort`
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(folder.resolve()))
    try:
        return ort.InferenceSession(model.SerializeToString(), options, providers=list(OrtBackend.providers))
    except Exception as error:  # its exceptions share no base class of their own
        reason = " ".join(str(error).split())[:300]
        raise BundleError(f"{folder}: ONNX Runtime cannot load a graph made from its files: {reason}") from error


class ChangedBackend(Backend):
    """`ort-cpu` with some graphs in another form; the others run as the bundle has them.

    `sessions` makes the session of each changed graph when its turn comes. `watch` is told every run: the graph, its
    inputs, and all outputs of its session by name, of which the first is the graph's own.
    """

    name = "ort-cpu"

    def __init__(
        self, bundle: Bundle, sessions: Mapping[GraphName, Callable[[], Any]], watch: Watch | None = None
    ) -> None:
        super().__init__(bundle)
        self._sessions, self._watch = sessions, watch

    @cached_property
    def _others(self) -> OrtBackend:
        """What runs the graphs that are not changed; a bundle without float32 files may have none of these."""
        return OrtBackend(self.bundle)

    def verify(self, graph: GraphName) -> None:
        """Checks the bundle's own file only where that is what runs."""
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
                reason = " ".join(str(error).split())[:300]
                raise BundleError(f"ONNX Runtime cannot run {graph} of {self.bundle.path}: {reason}") from error
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
        """What `ort-cpu` says where it runs any graph, and which graphs are others than the bundle's."""
        others = set(self.bundle.manifest.graphs) - set(self._sessions)
        said = self._others.describe() if others else {"runtime": self.name}
        return said | {"changed": ", ".join(self._sessions)}
