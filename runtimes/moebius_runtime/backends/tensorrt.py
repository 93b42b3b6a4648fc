"""The runtimes `tensorrt` and `tensorrt-rtx`, over one implementation."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping

from moebius_runtime.backends.base import Array, Backend, in_words
from moebius_runtime.backends.cuda import Stream, load_cuda
from moebius_runtime.backends.engine_runner import ActivationMemory, EngineRunner, graphs_wanted
from moebius_runtime.backends.engines import Candidate, choose_engines
from moebius_runtime.backends.self_check import Computes
from moebius_runtime.backends.trt_library import Library
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.bundle.passport import EngineBackend, engine_file, engine_path, trusted_engine
from moebius_runtime.errors import EngineError, InputError, RuntimeUnavailableError
from moebius_runtime.files import MappedFile
from moebius_runtime.files.cache import CachedBlob, Store, cache_folder
from moebius_runtime.hardware.devices import current_device

_KERNELS_LIMIT = 512 << 20  # bytes in the user's cache folder for the kernels that RTX compiles


class TensorRTBackend(Backend):
    """TensorRT 10.0 to 11, from the device's own packages."""

    name = "tensorrt"
    library: EngineBackend = "tensorrt"

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        precision: Precision | None = None,
        trust: bool = False,
    ) -> None:
        super().__init__(bundle, threads=threads)
        self._arguments = {"precision": precision, "trust": trust}
        if threads is not None:
            raise InputError(f"runtime {self.name!r} runs on the GPU, which takes no number of threads; leave it out")
        graphs_wanted()  # reports a wrong value of the variable now
        self._library = Library(self.library)
        device = current_device()
        if device is None:
            raise RuntimeUnavailableError(
                f"runtime {self.name!r} needs an NVIDIA GPU, and no GPU driver was found. Install the driver, or "
                "give the container its GPU (docker run --gpus all); `--runtime ort-cpu` needs none."
            )
        self._device = device
        self._cuda = load_cuda()
        chosen = choose_engines(bundle, self.library, self._library.version, device, precision, trust)
        self._engines = chosen.by_graph
        self.note(*chosen.notes)
        self._verified: dict[GraphName, tuple[int, ...]] = {}
        self._store = Store(cache_folder() / self.library, _KERNELS_LIMIT)
        self._unkept: str | None = None
        self._stream = Stream(self._cuda)
        self._memory = ActivationMemory(self._cuda, self._library)
        # Unlike `__del__`, this also runs at the interpreter's exit, while the modules that it needs are loaded.
        self._end = weakref.finalize(self, _close_all, self._loaded, self._stream)

    def arguments(self) -> dict[str, object]:
        """See `Backend`."""
        return dict(self._arguments)

    def has(self, graph: GraphName) -> bool:
        """See `Backend`."""
        return graph in self._engines

    def computes(self, graph: GraphName) -> Computes:
        """See `Backend`."""
        chosen, device = self._chosen(graph), self._device
        info = None if chosen.trusted else chosen.info(graph)
        versions = f"{self.library} {self._library.version}, driver {device.driver}"
        digest = None if info is None else info.sha256
        return Computes(f"{device.name} (SM {device.sm})", versions, chosen.precision, digest)

    def verify(self, graph: GraphName) -> None:
        """Raises `EngineError` for an engine that is missing, not its passport's, or invalid here according to RTX."""
        with self._read(graph) as engine:
            self._library.check_validity(engine.view, self._chosen(graph).folder / engine_file(graph))

    def close(self) -> None:
        """Frees everything on the device; the backend cannot be used afterwards. Also runs with its last reference."""
        self._end()

    def _load(self, graph: GraphName) -> EngineRunner:
        chosen = self._chosen(graph)
        source = chosen.folder / engine_file(graph)
        with self._read(graph) as data:
            engine, note = self._library.deserialise(data.view, source, chosen.flag("version_compatible"))
            kernels = self._kept(chosen, graph, data)
        if note:
            self.note(note)
        if chosen.flag("strip_weights"):
            self._library.refit(engine, self.bundle.model_file(graph, chosen.precision))
        info = self.bundle.graph(graph)
        runner = EngineRunner(self._library, self._cuda, self._stream, self._memory, engine, info)
        try:
            runner.start(kernels)
        except BaseException:
            runner.close()
            raise
        return runner

    def _run(self, handle: EngineRunner, inputs: Mapping[str, Array]) -> Array:
        return handle.run(inputs)

    def _unload(self, handle: EngineRunner) -> None:
        try:
            self._unkept = handle.keep_kernels()
        finally:
            handle.close()

    def _chosen(self, graph: GraphName) -> Candidate:
        if graph not in self._engines:
            raise EngineError(
                f"{self.bundle.name}: no engine of {graph} fits this device, only of {', '.join(self._engines)}. "
                f"Build it: moebius-export trt {self.bundle.name} --fp16 --backend {self.library}"
            )
        return self._engines[graph]

    def _read(self, graph: GraphName) -> MappedFile:
        """Maps an engine's file; hashes it at the first read and after a change."""
        chosen = self._chosen(graph)
        path = engine_path(chosen.folder, graph)
        status = path.stat()
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)  # taken before hashing
        if self._verified.get(graph) == stamp:
            return trusted_engine(chosen.folder, graph)
        data = chosen.read(graph)
        self._verified[graph] = stamp
        return data

    def _kept(self, chosen: Candidate, graph: GraphName, data: MappedFile) -> CachedBlob | None:
        """The cache of an engine's RTX kernels. They depend on the GPU and the driver too."""
        if self.library != "tensorrt-rtx":
            return None
        info = None if chosen.trusted else chosen.info(graph)
        digest = data.sha256() if info is None else info.sha256
        device = self._device
        name = f"{digest} {self._library.version} {device.name} {device.sm} {device.driver}"
        return CachedBlob(self._store, hashlib.sha256(name.encode()).hexdigest())

    def describe(self) -> dict[str, str]:
        """Versions, device, precision and folder of the engines, memory, and what replays the steps."""
        device = self._device
        precisions = {graph: chosen.precision for graph, chosen in self._engines.items()}
        folders = sorted({chosen.folder.name for chosen in self._engines.values()})
        runners: dict[GraphName, EngineRunner] = self._loaded
        graphs = ", ".join(f"{graph} {runner.graph_in_words()}" for graph, runner in runners.items())
        described = {
            "runtime": self.name,
            self.library: self._library.version,
            "cuda": self._cuda.version(),
            "device": f"{device.name} (SM {device.sm}, driver {device.driver})",
            "precision": in_words(precisions),
            "engines": ", ".join(folders),
            "cuda graphs": graphs or "none loaded yet",
            "activation memory": f"{self._memory.size / (1 << 20):.1f} MiB",
        }
        return described | ({"compiled kernels": f"not kept: {self._unkept}"} if self._unkept else {})


class TensorRTRTXBackend(TensorRTBackend):
    """TensorRT-RTX from its wheel, for RTX GPUs. It compiles kernels for the GPU when an engine first runs."""

    name = "tensorrt-rtx"
    library: EngineBackend = "tensorrt-rtx"


def _close_all(loaded: dict[GraphName, EngineRunner], stream: Stream) -> None:
    while loaded:
        _, runner = loaded.popitem()
        try:
            runner.keep_kernels()
        finally:
            runner.close()
    stream.close()
