"""TensorRT or TensorRT-RTX as it is installed: its errors as exceptions, and what differs between its versions.

Both have one API. It changed in places from 10.0 to 11 and in RTX; everything that asks for a version's own name is
in this file.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moebius_runtime.errors import EngineError, RuntimeUnavailableError
from moebius_runtime.passport import EngineBackend

_KEPT = 20  # messages; what failed last is what matters


def import_tensorrt(backend: EngineBackend) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`.

    Raises:
        RuntimeUnavailableError: it is not installed, its libraries cannot be loaded, or it is older than 10.
    """
    try:
        if backend == "tensorrt":
            import tensorrt as module
        else:
            import tensorrt_rtx as module
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its libraries are not there
        install = (
            "On Jetson it comes with JetPack (make the environment with --system-site-packages); elsewhere install "
            "TensorRT 10 or newer from NVIDIA"
            if backend == "tensorrt"
            else 'Install it with `pip install "moebius-edge[trt-rtx]"` (x86-64, RTX GPUs)'
        )
        reason = " ".join(str(error).split())[:200]
        raise RuntimeUnavailableError(
            f"runtime {backend!r} needs the Python package {backend.replace('-', '_')}, which cannot be imported "
            f"({reason}). {install}."
        ) from error
    version = str(getattr(module, "__version__", ""))
    if not hasattr(module, "Runtime"):
        raise RuntimeUnavailableError(
            f"the module {module.__name__} is an empty shell: install {backend} again, with its libraries."
        )
    if backend == "tensorrt" and not (version.split(".")[0].isdigit() and int(version.split(".")[0]) >= 10):
        raise RuntimeUnavailableError(f"runtime 'tensorrt' needs TensorRT 10 or newer, here is {version or 'unknown'}.")
    return module


class Library:
    """The library with a runtime of its own, whose complaints are kept until something fails.

    Attributes:
        version: of the library, as its engines' passports state it.
    """

    def __init__(self, backend: EngineBackend) -> None:
        self.backend = backend
        self.module = import_tensorrt(backend)
        self.version = str(self.module.__version__)
        self._messages: deque[str] = deque(maxlen=_KEPT)
        self._logger = _logger(self.module, self._messages)
        self._recorder = _recorder(self.module, self._messages)
        self.runtime = self.made(lambda: self.module.Runtime(self._logger), "its runtime cannot be created")
        self.runtime.error_recorder = self._recorder  # engines and contexts inherit it

    def check(self, fine: object, what: str) -> None:
        """Raises `EngineError` with what the library said where `fine` is false, or it recorded an error at all."""
        failed = not fine or bool(self._recorder.errors)
        said = "; ".join(dict.fromkeys(self._messages)) or "it gave no reason"
        self.forget_errors()
        if not failed:
            return
        raise EngineError(f"{self.backend} {self.version}: {what}: {said[:600]}")

    def forget_errors(self) -> None:
        """Drops what was said of a refusal that does no harm."""
        self._messages.clear()
        self._recorder.clear()

    def deserialise(self, data: memoryview, source: Path, host_code: bool = False) -> tuple[Any, str | None]:
        """An engine from its file's content, and what the library thinks of running it here; None where it is content.

        Args:
            data: the engine; it is not needed afterwards.
            source: its file, for messages.
            host_code: whether it may bring code for the host, as version-compatible engines do.

        Raises:
            EngineError: it is not valid on this system, or cannot be loaded; with the library's own reason.
        """
        note = self.check_validity(data, source)
        if hasattr(self.runtime, "engine_host_code_allowed"):
            self.runtime.engine_host_code_allowed = host_code
        engine = self.made(lambda: self.runtime.deserialize_cuda_engine(data), f"{source} cannot be loaded")
        return engine, note

    def check_validity(self, data: memoryview, source: Path) -> str | None:
        """Asks RTX whether an engine is valid here; returns its note where it is but could be faster, or None.

        TensorRT has no such question: its answer comes with `deserialise`.

        Raises:
            EngineError: it is not valid on this system, with the library's reason.
        """
        ask = getattr(self.runtime, "get_engine_validity", None)  # RTX
        if ask is None:
            return None
        validity, diagnostics = ask(data)
        said = "; ".join(dict.fromkeys(self._messages))[:300]
        self.forget_errors()
        kinds = self.module.EngineValidity
        if validity == kinds.VALID:
            return None
        members = self.module.EngineInvalidityDiagnostics.__members__
        found = [name.lower() for name, flag in members.items() if int(diagnostics) & int(flag)]
        reasons = ", ".join(found) or said or "no reason given"
        if validity == kinds.SUBOPTIMAL:
            return f"{source} runs slower here than it could ({reasons}); build it again for this device"
        raise EngineError(
            f"{source}: {self.backend} {self.version} says that it is not valid on this system ({reasons}). Build it "
            f"again: moebius-export trt BUNDLE --fp16 --backend {self.backend}"
        )

    def refit(self, engine: Any, model: Path) -> None:
        """Gives an engine that was built without weights those of its ONNX file.

        Raises:
            EngineError: the library cannot, or they do not fit.
        """
        trt = self.module
        if not hasattr(trt, "OnnxParserRefitter"):
            raise EngineError(
                f"the engine of {model} was built without its weights, and {self.backend} {self.version} cannot put "
                "them in from ONNX. Build it again without --strip-weights."
            )
        refitter = trt.Refitter(engine, self._logger)
        parser = trt.OnnxParserRefitter(refitter, self._logger)
        self.check(parser.refit_from_file(str(model)), f"the weights of {model} do not fit its engine")
        self.check(refitter.refit_cuda_engine(), f"the weights of {model} could not be put into its engine")

    def runtime_config(self, engine: Any) -> Any:
        """How contexts of an engine are to be made, where the library has such a thing (RTX); else None."""
        trt = self.module
        if self.backend != "tensorrt-rtx" or not hasattr(engine, "create_runtime_config"):
            return None
        config = self.made(engine.create_runtime_config, "no runtime configuration for an engine")
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
            # Lazily, kernels are exchanged some runs after the first: two pictures of one seed could then differ.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        return config

    def let_it_capture(self, config: Any) -> bool:
        """Asks RTX to capture CUDA graphs itself, which knows when its kernels are final. False where it cannot."""
        if config is None or not hasattr(self.module, "CudaGraphStrategy"):
            return False
        config.cuda_graph_strategy = self.module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        return True

    def context(self, engine: Any, config: Any) -> Any:
        """A context whose activation memory is the caller's."""
        how = self.module.ExecutionContextAllocationStrategy.USER_MANAGED if config is None else config
        return self.made(lambda: engine.create_execution_context(how), "no context for an engine")

    def memory_needed(self, engine: Any) -> int:
        """Bytes of activation memory. The name without `_v2` is 10.0's; newer ones have dropped it."""
        name = "device_memory_size_v2" if hasattr(engine, "device_memory_size_v2") else "device_memory_size"
        return int(getattr(engine, name))

    def give_memory(self, context: Any, address: int, size: int) -> None:
        """Names a context's activation memory."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, size)
        else:
            context.device_memory = address  # 10.0
        self.check(True, "the activation memory was refused")

    def capturable(self, context: Any, stream: int) -> bool:
        """Whether a run can be captured into a CUDA graph. Only RTX can tell; any other engine is tried."""
        ask = getattr(context, "is_stream_capturable", None)
        return True if ask is None else bool(ask(stream))

    def made(self, make: Callable[[], Any], what: str) -> Any:
        """What `make` gives; `EngineError` where it is None or raises, with what the library said."""
        try:
            made = make()
        except Exception as error:  # pybind11's, of several kinds
            self._messages.append(" ".join(str(error).split()))
            made = None
        self.check(made is not None, what)
        return made


def _logger(trt: Any, messages: deque[str]) -> Any:
    """Keeps errors; the library's own logger would write everything to the error stream."""
    serious = (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR)

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in serious:
                messages.append(" ".join(message.split()))

    return Logger()


def _recorder(trt: Any, messages: deque[str]) -> Any:
    """Counts errors, also those of work that the library reports as done; it is called from any thread."""

    class Recorder(trt.IErrorRecorder):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IErrorRecorder.__init__(self)
            self.errors: list[tuple[Any, str]] = []

        def get_num_errors(self) -> int:
            return len(self.errors)

        def get_error_code(self, index: int) -> Any:
            return self.errors[index][0]

        def get_error_desc(self, index: int) -> str:
            return self.errors[index][1]

        def has_overflowed(self) -> bool:
            return False

        def clear(self) -> None:
            self.errors.clear()

        def report_error(self, code: Any, description: str) -> bool:
            self.errors.append((code, description))
            messages.append(" ".join(description.split()))
            return False  # not fatal to the process: the call that failed says so

    return Recorder()
