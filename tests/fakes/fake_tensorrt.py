"""A builder side of TensorRT without TensorRT: the Python API of one version, as that version documents it.

`make_module("10.3.0")` is what `import tensorrt` gives on JetPack 6, `make_module("11.4.1")` what it gives today, and
`make_module("1.7.1", rtx=True)` what `import tensorrt_rtx` gives. Names that the version lacks are missing, and the
classes take no attribute that the real ones do not have, so code that relies on another version fails here as it would
there. Members were taken from the documentation of 10.3, 10.9 and 11.4 and from the wheel of RTX 1.7.1.

Every call is noted in `module.calls` as (name, arguments). What a test may set on the module:
    no_gpu      no builder can be made, with the message of the real one
    build_error text that the builder logs before it returns nothing
    build_steps steps of the build's inner phase (20), `step_seconds` the time of each (0)
    on_step     called with (phase, step) before the monitor hears of a step
    plugin      `tensorrt.plugin`, see tests/export/fake_trt_plugin.py: nodes of what is registered there become layers,
                and their kernels are compiled when an engine is built
Engines are b"FAKE" + JSON: {"onnx": path of the parsed file, "version": ..., "sm": [...], "stripped": ...}, and with
plugins {"plugins": {node: [names of the kernels]}}.
"""

from __future__ import annotations

import enum
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

DEFAULT_SM = 87  # what is at hand where no SM is named: an Orin
_SIZES = {"FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "INT8": 1, "BOOL": 1, "UINT8": 1}
_WEAK = ["FP16", "INT8", "BF16", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"]
_ALWAYS = [
    *("DEBUG", "GPU_FALLBACK", "REFIT", "DISABLE_TIMING_CACHE", "TF32", "SPARSE_WEIGHTS", "SAFETY_SCOPE"),
    *("VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "ERROR_ON_TIMING_CACHE_MISS", "DISABLE_COMPILATION_CACHE"),
    *("STRIP_PLAN", "REFIT_IDENTICAL", "WEIGHT_STREAMING"),
]
_RTX_SM = (75, 80, 86, 89, 120, 121)


def make_module(version: str, rtx: bool = False) -> ModuleType:
    """A module as `import tensorrt` (or `tensorrt_rtx`) would give in that version."""
    numbers = tuple(int(part) for part in version.split("."))
    later = rtx or numbers >= (10, 9)
    strong_only = rtx or numbers >= (11,)
    module: Any = ModuleType("tensorrt_rtx" if rtx else "tensorrt")
    module.__version__ = version
    module.calls = []
    module.no_gpu, module.build_error, module.build_steps, module.step_seconds = False, None, 20, 0.0
    module.on_step = None

    flags = list(_ALWAYS)
    flags += [] if strong_only else [*_WEAK, "REJECT_EMPTY_ALGORITHMS", "DIRECT_IO"]
    flags += ["REFIT_INDIVIDUAL", "STRICT_NANS", "MONITOR_MEMORY", "EDITABLE_TIMING_CACHE"] if later else []
    module.BuilderFlag = _enum("BuilderFlag", flags)
    creation = ["STRONGLY_TYPED"] if strong_only else ["EXPLICIT_BATCH", "STRONGLY_TYPED"]
    module.NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", creation)
    module.MemoryPoolType = _enum(
        "MemoryPoolType",
        ["WORKSPACE", "DLA_MANAGED_SRAM", "DLA_LOCAL_DRAM", "DLA_GLOBAL_DRAM", "TACTIC_DRAM", "TACTIC_SHARED_MEMORY"],
    )
    levels = ["NONE", "AMPERE_PLUS"] + (["SAME_COMPUTE_CAPABILITY"] if later else [])
    module.HardwareCompatibilityLevel = _enum("HardwareCompatibilityLevel", levels)
    module.DataType = _enum("DataType", list(_SIZES))
    module.LayerType = _enum("LayerType", ["CONSTANT", "CONVOLUTION", "SHUFFLE", "ELEMENTWISE", "UNARY"])
    if rtx:
        module.ComputeCapability = _enum("ComputeCapability", ["NONE", "CURRENT", *(f"SM{sm}" for sm in _RTX_SM)])

    module.ILogger, module.Logger = ILogger, Logger
    module.IProgressMonitor = IProgressMonitor
    module.Builder = lambda logger: Builder(module, logger, rtx)
    module.OnnxParser = lambda network, logger: OnnxParser(module, network, logger)
    return module  # type: ignore[no-any-return]


def _enum(name: str, members: list[str]) -> Any:
    return enum.IntEnum(name, {member: index for index, member in enumerate(members)})


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger):
    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        self.min_severity = min_severity

    def log(self, severity: Severity, msg: str) -> None:
        pass


class IProgressMonitor:
    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise NotImplementedError

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise NotImplementedError

    def phase_finish(self, phase_name: str) -> None:
        raise NotImplementedError


class _Bound:
    """As a class bound with pybind11: attributes that it was not given cannot be set, nor methods called otherwise."""

    _fields: frozenset[str] = frozenset()

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self._fields:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        object.__setattr__(self, name, value)


class Builder(_Bound):
    _fields = frozenset({"max_threads", "error_recorder", "gpu_allocator"})

    def __init__(self, module: Any, logger: ILogger, rtx: bool) -> None:
        if module.no_gpu:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._module, self._logger, self._rtx = module, logger, rtx
        module.calls.append(("Builder", ()))

    def create_network(self, flags: int = 0) -> Network:
        self._module.calls.append(("create_network", (flags,)))
        return Network(self._module, flags)

    def create_builder_config(self) -> Config:
        return Config(self._module, self._rtx)

    def create_optimization_profile(self) -> Profile:
        return Profile(self._module)

    def build_serialized_network(self, network: Network, config: Config) -> HostMemory | None:
        module = self._module
        module.calls.append(("build_serialized_network", (network._path,)))
        open_shapes = any(-1 in network.get_input(i).shape for i in range(network.num_inputs))
        if open_shapes and not config._profiles:
            self._logger.log(Severity.ERROR, "Error Code 4: Network has dynamic inputs, but no optimization profile")
            return None
        if config.get_flag(module.BuilderFlag.VERSION_COMPATIBLE) and self._rtx:
            self._logger.log(Severity.ERROR, "Error Code 6: Unable to load library: libnvinfer_lean.so.1")
            return None
        if not _phases(module, config.progress_monitor):
            self._logger.log(Severity.ERROR, "Error Code 7: BuildCanceled (Build canceled by user)")
            return None
        if module.build_error:
            self._logger.log(Severity.ERROR, module.build_error)
            return None
        self._logger.log(Severity.INFO, "Total Activation Memory: 4096 bytes")
        content = {
            "onnx": network._path,
            "version": module.__version__,
            "sm": config._targets() or [DEFAULT_SM],
            "stripped": config.get_flag(module.BuilderFlag.STRIP_PLAN),
        }
        if network._plugins:
            content["plugins"] = {node: module.plugin.compiled(*rest) for node, *rest in network._plugins}
        return HostMemory(b"FAKE" + json.dumps(content).encode())


def _phases(module: Any, monitor: IProgressMonitor | None) -> bool:
    """The build's phases: one inside the other, the inner one's steps reported by a thread of the builder's."""
    if monitor is None:
        for _ in range(module.build_steps):
            time.sleep(module.step_seconds)
        return True
    going = True
    broken: list[BaseException] = []

    def inner() -> None:
        nonlocal going
        try:
            monitor.phase_start("Timing tactics", "Building engine", module.build_steps)
            for step in range(module.build_steps):
                time.sleep(module.step_seconds)
                if module.on_step is not None:
                    module.on_step("Timing tactics", step)
                going = monitor.step_complete("Timing tactics", step)
                if not going:
                    break
            monitor.phase_finish("Timing tactics")
        except BaseException as error:  # the real builder would have ended the process here
            broken.append(error)

    monitor.phase_start("Building engine", None, 2)
    thread = threading.Thread(target=inner)
    thread.start()
    thread.join()
    if going and not broken:
        going = monitor.step_complete("Building engine", 0)
    monitor.phase_finish("Building engine")
    if broken:
        raise SystemError("a progress monitor must not raise") from broken[0]
    return going


class HostMemory(bytes):
    """A buffer, as IHostMemory is."""

    @property
    def nbytes(self) -> int:
        return len(self)


class Config(_Bound):
    _common = frozenset(
        {
            *("builder_optimization_level", "hardware_compatibility_level", "progress_monitor", "profiling_verbosity"),
            *("max_aux_streams", "avg_timing_iterations", "flags", "runtime_platform", "engine_capability"),
        }
    )

    def __init__(self, module: Any, rtx: bool) -> None:
        numbers = tuple(int(part) for part in module.__version__.split("."))
        names = set(self._common)
        names |= {"num_compute_capabilities"} if rtx else set()
        names |= {"tiling_optimization_level", "l2_limit_for_tiling"} if rtx or numbers >= (10, 9) else set()
        names |= set() if rtx or numbers >= (11,) else {"int8_calibrator", "quantization_flags", "algorithm_selector"}
        self._fields, self._module, self._rtx = frozenset(names), module, rtx
        self._set = {module.BuilderFlag.TF32}
        self._pools: dict[Any, int] = {}
        self._profiles: list[Profile] = []
        self._cache: TimingCache | None = None
        self._capabilities: dict[int, Any] = {}
        self.builder_optimization_level = 3
        self.hardware_compatibility_level = module.HardwareCompatibilityLevel.NONE
        self.progress_monitor = None

    def __getattr__(self, name: str) -> Any:
        if name == "set_compute_capability" and self._rtx:
            return self._set_compute_capability
        if name == "num_compute_capabilities" and self._rtx:
            return 0
        raise AttributeError(f"'IBuilderConfig' object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_"):
            super().__setattr__(name, value)
            if name != "progress_monitor":
                self._module.calls.append((name, (value,)))
            return
        object.__setattr__(self, name, value)

    def set_flag(self, flag: Any) -> None:
        self._check_flag(flag)
        self._set.add(flag)
        self._module.calls.append(("set_flag", (flag.name,)))

    def clear_flag(self, flag: Any) -> None:
        self._check_flag(flag)
        self._set.discard(flag)
        self._module.calls.append(("clear_flag", (flag.name,)))

    def get_flag(self, flag: Any) -> bool:
        self._check_flag(flag)
        return flag in self._set

    def _check_flag(self, flag: Any) -> None:
        if not isinstance(flag, self._module.BuilderFlag):
            raise TypeError("incompatible function arguments: expected a BuilderFlag of this module")

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._pools[pool] = pool_size
        self._module.calls.append(("set_memory_pool_limit", (pool.name, pool_size)))

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._pools.get(pool, 8 << 30)

    def add_optimization_profile(self, profile: Profile) -> int:
        self._profiles.append(profile)
        return len(self._profiles) - 1

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache(self._module, bytes(serialized_timing_cache))

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self._module.calls.append(("set_timing_cache", (cache._content, ignore_mismatch)))
        if cache._content.startswith(b"OTHER") and not ignore_mismatch:
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self._cache

    def _set_compute_capability(self, compute_capability: Any, index: int) -> bool:
        self._module.calls.append(("set_compute_capability", (compute_capability.name, index)))
        if not 0 <= index < self.num_compute_capabilities:
            return False
        self._capabilities[index] = compute_capability
        return True

    def _targets(self) -> list[int]:
        return [int(self._capabilities[i].name[2:]) for i in sorted(self._capabilities)]


class TimingCache(_Bound):
    def __init__(self, module: Any, content: bytes) -> None:
        self._module, self._content = module, content

    def serialize(self) -> HostMemory:
        return HostMemory(self._content + b"timed ")

    def combine(self, input_cache: TimingCache, ignore_mismatch: bool) -> bool:
        self._content += input_cache._content
        return True


class Profile(_Bound):
    def __init__(self, module: Any) -> None:
        self._module = module

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._module.calls.append(("set_shape", (input, tuple(min), tuple(opt), tuple(max))))


class Tensor(_Bound):
    _fields = frozenset({"name", "shape", "dtype", "is_shape_tensor"})

    def __init__(self, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        self.name, self.shape, self.dtype, self.is_shape_tensor = name, shape, dtype, False


class Layer(_Bound):
    _fields = frozenset({"name", "type", "num_inputs", "num_outputs"})

    def __init__(self, name: str, kind: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        self.name, self.type, self._in, self._out = name, kind, inputs, outputs
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)

    def get_input(self, index: int) -> Tensor:
        return self._in[index]

    def get_output(self, index: int) -> Tensor:
        return self._out[index]


class Network(_Bound):
    _fields = frozenset({"name", "error_recorder"})

    def __init__(self, module: Any, flags: int) -> None:
        self._module, self._flags, self._path = module, flags, ""
        self._inputs: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._layers: list[Layer] = []
        self._plugins: list[tuple[str, str, list[Tensor], dict[str, Any]]] = []

    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index: int) -> Tensor:
        return self._inputs[index]

    def get_output(self, index: int) -> Tensor:
        return self._outputs[index]

    def get_layer(self, index: int) -> Layer:
        return self._layers[index]


class ParserError(_Bound):
    """Errors are read through methods, as the real one's."""

    def __init__(self, desc: str, node: int, name: str, operator: str) -> None:
        self._desc, self._node, self._name, self._operator = desc, node, name, operator

    def desc(self) -> str:
        return self._desc

    def node(self) -> int:
        return self._node

    def node_name(self) -> str:
        return self._name

    def node_operator(self) -> str:
        return self._operator

    def code(self) -> str:
        return "ErrorCode.UNSUPPORTED_NODE"

    def __str__(self) -> str:
        return f"In node {self._node} with name: {self._name} and operator: {self._operator}: {self._desc}"


def _plugin_id(module: Any, node: Any) -> str | None:
    """The plugin that takes a node: registered under the namespace that the node names, which must be its domain."""
    spaces = [attribute.s.decode() for attribute in node.attribute if attribute.name == "plugin_namespace"]
    name = f"{spaces[0]}::{node.op_type}" if spaces == [node.domain] else None
    return name if name in getattr(getattr(module, "plugin", None), "plugins", {}) else None


class OnnxParser(_Bound):
    _fields = frozenset({"flags"})

    def __init__(self, module: Any, network: Network, logger: ILogger) -> None:
        self._module, self._network, self._logger = module, network, logger
        self._errors: list[ParserError] = []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index: int) -> ParserError:
        return self._errors[index]

    def parse_from_file(self, path: str) -> bool:
        self._module.calls.append(("parse_from_file", (path,)))
        return self._parse(Path(path).read_bytes(), path)

    def parse(self, model: bytes, path: str | None = None) -> bool:
        """`path` is where the model's external weights lie, so it is a must for a model that has some."""
        self._module.calls.append(("parse", (path,)))
        return self._parse(model, path)

    def _parse(self, content: bytes, path: str | None) -> bool:
        self._network._path = str(Path(path).resolve()) if path else ""
        try:
            self._errors = _read(self._module, self._network, content, path)
        except Exception as error:
            self._errors = [ParserError(f"Failed to parse the ONNX model: {error}", -1, "", "")]
        for error in self._errors:
            self._logger.log(Severity.ERROR, str(error))
        return not self._errors


def _read(module: Any, network: Network, content: bytes, path: str | None) -> list[ParserError]:
    """Fills the network from an ONNX model, functions inlined; one error for each operator that nobody knows."""
    import onnx
    from onnx import inliner, shape_inference

    model = inliner.inline_local_functions(onnx.load_model_from_string(content))
    if path is None and any(tensor.external_data for tensor in model.graph.initializer):
        return [ParserError("Failed to open the file of external weights", -1, "", "")]
    known = ("", "ai.onnx")
    errors = [
        ParserError(f"Plugin not found for {node.op_type}", index, node.name, node.op_type)
        for index, node in enumerate(model.graph.node)
        if node.domain not in known and _plugin_id(module, node) is None
    ]
    if errors:
        return errors
    kinds = {"FLOAT16": "HALF", "BFLOAT16": "BF16"}

    def tensor(name: str, shape: tuple[int, ...], element: int) -> Tensor:
        kind = onnx.TensorProto.DataType.Name(element)
        return Tensor(name, shape, getattr(module.DataType, kinds.get(kind, kind), module.DataType.FLOAT))

    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    tensors = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        kind = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
        tensors[value.name] = tensor(value.name, shape, kind.elem_type)
    weights = {item.name: item for item in graph.initializer}
    for name, item in weights.items():
        tensors[name] = tensor(name, tuple(item.dims), item.data_type)
        network._layers.append(Layer(name, module.LayerType.CONSTANT, [], [tensors[name]]))
    network._inputs = [tensors[value.name] for value in graph.input if value.name not in weights]
    network._outputs = [tensors[value.name] for value in graph.output]
    types: dict[str, Any] = {"Conv": module.LayerType.CONVOLUTION, "Constant": module.LayerType.CONSTANT}
    lost: Callable[[str], Tensor] = lambda name: tensor(name, (), onnx.TensorProto.FLOAT)  # noqa: E731
    for node in graph.node:
        if (plugin := _plugin_id(module, node)) is not None:
            fields = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            network._plugins.append((node.name, plugin, [tensors[name] for name in node.input], fields))
        network._layers.append(
            Layer(
                node.name,
                types.get(node.op_type, module.LayerType.UNARY),
                [tensors.get(name) or lost(name) for name in node.input if name],
                [tensors.get(name) or lost(name) for name in node.output if name],
            )
        )
    return []
