"""The run-time half of `tensorrt` and `tensorrt_rtx`, version by version, over a `FakeCuda`.

An engine's bytes are `FAKE` and JSON: the ONNX file that it was built from, the version that built it, its GPUs. A
context runs that file in ONNX Runtime on the fake device's memory. What a version lacks is not there; what the real
library would leave undefined fails.
"""

from __future__ import annotations

import enum
import json
import sys
import types
from typing import Any

import numpy as np
import onnxruntime

MAGIC = b"FAKE"
ACTIVATIONS = {"unet": 3000, "unet_conditional": 2000, "vae_encoder": 1000, "vae_decoder": 5000}
_WEIGHTS = 4096  # bytes on the device for a loaded engine
_TYPES = {"tensor(float)": ("FLOAT", np.float32), "tensor(int64)": ("INT64", np.int64)}


def engine_bytes(onnx: str, version: str, **more: Any) -> bytes:
    """A fake engine. `more`: what a test wants it to do, see where `content` is read."""
    return MAGIC + json.dumps({"onnx": str(onnx), "version": version, "sm": [89], **more}).encode()


class ErrorCode(enum.Enum):
    UNSPECIFIED_ERROR = 1


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class DataType(enum.Enum):
    FLOAT = 0
    INT64 = 1
    HALF = 2


class Strategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1
    USER_MANAGED = 2


class Validity(enum.Enum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class Diagnostics(enum.IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


class GraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Specialization(enum.Enum):
    LAZY = 0
    EAGER = 1
    NONE = 2


class _PyBase:
    """pybind11 refuses a subclass whose __init__ did not call the base's."""

    _made = False

    def __init__(self) -> None:
        self._made = True


class ILogger(_PyBase):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class IErrorRecorder(_PyBase):
    pass


def _whole(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or not value._made:
        raise TypeError(f"{kind.__name__}.__init__() must be called when overriding __init__")
    return value


class _Fallible:
    """Reports errors to the logger and the recorder, as both are told in the real library."""

    def __init__(self, logger: Any, recorder: Any) -> None:
        self._logger, self._recorder = logger, recorder

    def complain(self, text: str) -> None:
        self._logger.log(ILogger.ERROR, text)
        if self._recorder is not None:
            self._recorder.report_error(ErrorCode.UNSPECIFIED_ERROR, text)
            assert self._recorder.get_num_errors() >= 1
            assert self._recorder.get_error_desc(0)


class IRuntimeCache:
    def __init__(self, module: Any) -> None:
        self._module = module
        self.content = b""

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"JIT " + self._module.__version__.encode()):
            return False
        self.content = bytes(blob)
        return True


class IRuntimeConfig:
    def __init__(self, module: Any) -> None:
        self._module = module
        self.allocation = Strategy.STATIC
        self.cuda_graph_strategy = GraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = Specialization.LAZY
        self.cache: IRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Strategy) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache(self._module)

    def set_runtime_cache(self, cache: IRuntimeCache) -> bool:
        self.cache = cache
        return True


class ICudaEngine(_Fallible):
    def __init__(self, module: Any, content: dict[str, Any], logger: Any, recorder: Any) -> None:
        super().__init__(logger, recorder)
        self.module, self.content, self.cuda = module, content, module.cuda
        code, self._weights = self.cuda.cudaMalloc(_WEIGHTS)
        if code:
            raise MemoryError("no room for the weights")
        module.alive.append(content["onnx"])
        module.most_alive = max(module.most_alive, len(module.alive))
        self.refitted = not content.get("stripped")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(content["onnx"], options, providers=["CPUExecutionProvider"])
        self.tensors = {one.name: (TensorIOMode.INPUT, one) for one in self.session.get_inputs()}
        self.tensors |= {one.name: (TensorIOMode.OUTPUT, one) for one in self.session.get_outputs()}
        name = content["onnx"].rpartition("/")[2].removesuffix(".onnx")
        size = content.get("activations", ACTIVATIONS.get(name, 1000))
        if module.has_size_v2:
            self.device_memory_size_v2 = size
        if module.has_size_v1:
            self.device_memory_size = size
        self._size = size
        if module.rtx:
            self.create_runtime_config = lambda: IRuntimeConfig(module)

    def __del__(self) -> None:
        if getattr(self, "_weights", None) is not None:
            self.cuda.cudaFree(self._weights)
            self.module.alive.remove(self.content["onnx"])

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return self.tensors[name][0]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.content.get("types", {}).get(name) or _TYPES[self.tensors[name][1].type][0]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.content.get("on_host", ()) else TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(size, str) else size for size in self.tensors[name][1].shape)

    def create_execution_context(self, how: Any = Strategy.STATIC) -> IExecutionContext:
        if isinstance(how, IRuntimeConfig):
            if not self.module.rtx:
                raise TypeError("incompatible function arguments")
            return IExecutionContext(self, how.allocation, how)
        return IExecutionContext(self, how, None)


class IExecutionContext(_Fallible):
    def __init__(self, engine: ICudaEngine, allocation: Strategy, config: IRuntimeConfig | None) -> None:
        super().__init__(engine._logger, engine._recorder)
        self._engine, self._cuda, self._config = engine, engine.cuda, config
        self._managed = allocation == Strategy.USER_MANAGED
        self._memory: tuple[int, int] | None = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self.runs = 0

    def __getattr__(self, name: str) -> Any:
        """What not every version has."""
        module = self.__dict__["_engine"].module
        if name == "set_device_memory" and module.has_set_device_memory:
            return self._set_device_memory
        if name == "is_stream_capturable" and module.rtx:
            return lambda _stream: bool(self._engine.content.get("capturable", True))
        raise AttributeError(name)

    def _set_device_memory(self, address: int, size: int) -> None:
        if size < self._engine._size or address % 256:
            self.complain(f"{size} bytes of device memory, {self._engine._size} are needed")
        self._memory = address, self._engine._size
        self.runs = 0  # what was prepared for the old place is void

    @property
    def device_memory(self) -> int:
        raise AttributeError("it can only be set")

    @device_memory.setter
    def device_memory(self, address: int) -> None:
        if self._engine.module.has_set_device_memory:
            raise AssertionError("this version knows the size as well; use set_device_memory")
        self._memory = address, self._engine._size
        self.runs = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        stated = self._engine.get_tensor_shape(name)
        limit = self._engine.content.get("max_batch", 1)
        if len(shape) != len(stated) or any(
            have != want and not (want == -1 and have <= limit) for have, want in zip(shape, stated, strict=True)
        ):
            self.complain(f"shape {shape} of {name} is outside of the profile")
            return False
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [
            name
            for name, (mode, _) in self._engine.tensors.items()
            if mode == TensorIOMode.INPUT and name not in self._shapes
        ]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self._shapes:
            return self._shapes[name]
        batch = next(iter(self._shapes.values()))[0]
        return tuple(batch if size == -1 else size for size in self._engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name not in self._engine.tensors or address % 256:
            self.complain(f"no address {address:#x} for {name}")
            return False
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        missing = [name for name in engine.tensors if name not in self._addresses]
        if missing or self.infer_shapes() or not engine.refitted:
            self.complain(f"not ready: {missing or 'shapes or weights'}")
            return False
        if not self._managed or self._memory is None:
            self.complain("no device memory was given")
            return False
        if self._cuda.streams.get(stream) is None or self._cuda.streams[stream].flags != 1:
            self.complain("not a non-blocking stream")
            return False
        capturing = self._cuda.capturing()
        if capturing and (self.runs == 0 or engine.module.rtx):
            self._cuda.cudaMalloc(1)  # a first run allocates, which breaks the capture
            self.complain("cannot be captured")
            return False
        if capturing and engine.content.get("allocates"):
            self._cuda.cudaMalloc(1)
        if engine.content.get("error"):
            self.complain(engine.content["error"])
            return bool(engine.content.get("asynchronous"))
        if not capturing:
            self.runs += 1
        if self._config is not None and self._config.cache is not None:
            self._config.cache.content = b"JIT " + engine.module.__version__.encode() + engine.content["onnx"].encode()
        shapes, addresses, memory = dict(self._shapes), dict(self._addresses), self._memory
        outputs = {
            name: self.get_tensor_shape(name)
            for name, (mode, _) in engine.tensors.items()
            if mode == TensorIOMode.OUTPUT
        }
        engine.module.runs.append((engine.content["onnx"], capturing))

        def work() -> None:
            scratch = self._cuda.span(*memory)
            scratch[:] = np.random.default_rng(len(engine.module.runs)).integers(0, 256, scratch.size, np.uint8)
            given = {}
            for name, shape in shapes.items():
                kind = np.dtype(_TYPES[engine.tensors[name][1].type][1])
                size = int(np.prod(shape)) * kind.itemsize
                given[name] = self._cuda.span(addresses[name], size).view(kind).reshape(shape).copy()
            results = engine.session.run(list(outputs), given)
            for (name, shape), result in zip(outputs.items(), results, strict=True):
                assert result.shape == shape
                self._cuda.span(addresses[name], result.nbytes)[:] = np.ascontiguousarray(result).view(np.uint8).ravel()

        self._cuda.put(stream, work)
        return True


class Runtime(_Fallible):
    module: Any

    def __init__(self, logger: Any) -> None:
        super().__init__(_whole(logger, ILogger), None)
        self.engine_host_code_allowed = False

    def __getattr__(self, name: str) -> Any:
        if name == "get_engine_validity" and self.module.rtx:
            return self._get_engine_validity
        raise AttributeError(name)

    @property
    def error_recorder(self) -> Any:
        return self._recorder

    @error_recorder.setter
    def error_recorder(self, recorder: Any) -> None:
        self._recorder = _whole(recorder, IErrorRecorder)

    def _parsed(self, data: bytes) -> dict[str, Any] | None:
        if bytes(data[:4]) != MAGIC:
            return None
        content = json.loads(bytes(data[4:]))
        return content if content["version"] == self.module.__version__ else None

    def _get_engine_validity(self, data: bytes) -> tuple[Validity, int]:
        self._logger.log(ILogger.INFO, "asked for validity")
        content = self._parsed(data)
        if content is None:
            return Validity.INVALID, int(Diagnostics.MALFORMED_ENGINE)
        return Validity[content.get("validity", "VALID")], int(content.get("diagnostics", 0))

    def deserialize_cuda_engine(self, data: bytes) -> ICudaEngine | None:
        content = self._parsed(data)
        if content is None:
            self.complain("Serialization assertion magicTag failed: not an engine of this version")
            return None
        if content.get("host_code") and not self.engine_host_code_allowed:
            self.complain("host code is not allowed for this runtime")
            return None
        return ICudaEngine(self.module, content, self._logger, self._recorder)


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: Any) -> None:
        self.engine, self.model = engine, None

    def refit_cuda_engine(self) -> bool:
        self.engine.refitted = self.model == self.engine.content["onnx"]
        return self.engine.refitted


class OnnxParserRefitter:
    def __init__(self, refitter: Refitter, logger: Any) -> None:
        self._refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        self._refitter.model = path
        return True


def fake_runtime(cuda: Any, version: str, rtx: bool = False) -> types.ModuleType:
    """A module of a version: 10.0 (no sizes with v2), 10.3, 10.9, 11.x, or RTX."""
    major, minor = (int(part) for part in version.split(".")[:2])
    module = types.ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    module.__version__ = version
    module.cuda, module.rtx = cuda, rtx
    module.has_size_v1 = not rtx and major == 10
    module.has_size_v2 = module.has_set_device_memory = rtx or major > 10 or minor >= 1
    module.alive, module.most_alive, module.runs = [], 0, []
    module.ILogger, module.IErrorRecorder = ILogger, IErrorRecorder
    module.TensorIOMode, module.TensorLocation, module.DataType = TensorIOMode, TensorLocation, DataType
    module.ExecutionContextAllocationStrategy = Strategy
    module.Runtime = type("Runtime", (Runtime,), {"module": module})
    if rtx or (major, minor) >= (10, 1):
        module.Refitter, module.OnnxParserRefitter = Refitter, OnnxParserRefitter
    if rtx:
        module.EngineValidity, module.EngineInvalidityDiagnostics = Validity, Diagnostics
        module.CudaGraphStrategy = GraphStrategy
        module.DynamicShapesKernelSpecializationStrategy = Specialization
    return module


def install(module: types.ModuleType, monkeypatch: Any) -> None:
    """Makes it what `import tensorrt` or `import tensorrt_rtx` gives."""
    monkeypatch.setitem(sys.modules, module.__name__, module)
