"""ONNX Runtime's providers that come as plugins, and WebGPU built into its wheel.

A plugin is a library in a Python package of its own: ONNX Runtime registers it, lists its devices, and a session gets
exactly one of them. Nodes may not fall back to the CPU.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from moebius_runtime.backends.base import Array
from moebius_runtime.backends.ort import OrtBackend, import_onnxruntime
from moebius_runtime.backends.ort_gpu import PROBE
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.errors import InputError, RuntimeUnavailableError

# An ONNX file, IR 8, opset 13: y = Mul(x, x), float16 [1]. As bytes, so that a device needs no onnx package.
PROBE_F16 = bytes.fromhex(
    "08083a390a0e0a01780a017812017922034d756c120570726f62655a0f0a0178120a0a08080a12040a020801620f0a0179120a0a08080a"
    "12040a02080142040a00100d"
)
_LEAST_ORT = (1, 24)  # the plugins are built against its interface


@dataclass(frozen=True)
class Plugin:
    """A provider: its name in ONNX Runtime, the package of its library, and our extra that installs it.

    `library` imports the package and returns the path of its library; `needs` says what a device needs.
    """

    provider: str
    package: str
    extra: str
    needs: str
    library: Callable[[], str]


@dataclass(frozen=True)
class PluginDevice:
    """A device of a provider. `handle` is ONNX Runtime's, None where the provider is built in and chooses itself."""

    name: str
    kind: str
    handle: Any = field(default=None, compare=False, repr=False)


def _webgpu_library() -> str:
    import onnxruntime_ep_webgpu

    return str(onnxruntime_ep_webgpu.get_library_path())


def _openvino_library() -> str:
    import onnxruntime_ep_openvino

    return str(onnxruntime_ep_openvino.get_library_path())


PLUGINS: Mapping[str, Plugin] = {
    "ort-webgpu": Plugin(
        "WebGpuExecutionProvider",
        "onnxruntime-ep-webgpu",
        "webgpu",
        "a GPU with a Vulkan, Direct3D 12 or Metal driver",
        _webgpu_library,
    ),
    "ort-openvino": Plugin(
        "OpenVINOExecutionProvider",
        "onnxruntime-ep-openvino",
        "ort-openvino",
        "an Intel CPU, GPU or NPU with its driver",
        _openvino_library,
    ),
}

_registering = threading.Lock()


def plugin_devices(ort: Any, plugin: Plugin, runtime: str) -> list[PluginDevice]:
    """The devices of a provider; registers its library first where it is a plugin.

    A provider that is built into the installed ONNX Runtime is used as it is. It may list no device and still find
    one, so it counts as one device of the kind `built in`.

    Raises:
        RuntimeUnavailableError: neither is installed, ONNX Runtime is too old, or the library cannot be loaded.
    """
    if plugin.provider in ort.get_available_providers():
        listed = _listed(ort, plugin) if hasattr(ort, "get_ep_devices") else []
        return listed or [PluginDevice("the device that the provider chooses", "built in")]
    if not hasattr(ort, "register_execution_provider_library") or _version(ort.__version__) < _LEAST_ORT:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r} needs ONNX Runtime {_LEAST_ORT[0]}.{_LEAST_ORT[1]} or later, which loads plugins; "
            f"here is {ort.__version__}. Run `pip install --upgrade onnxruntime`."
        )
    try:
        library = plugin.library()
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r} needs the package {plugin.package}, which cannot be imported ({error}). Install it "
            f'with `pip install "moebius-edge[{plugin.extra}]"`.'
        ) from error
    with _registering:  # a second registration of one library is an error
        if not _listed(ort, plugin) and plugin.package not in _registered(ort):
            try:
                ort.register_execution_provider_library(plugin.package, library)
            except Exception as error:  # its exceptions share no base class of their own
                raise RuntimeUnavailableError(
                    f"runtime {runtime!r}: ONNX Runtime {ort.__version__} cannot load {plugin.package} "
                    f"({_one_line(error)}). Update both: `pip install --upgrade onnxruntime {plugin.package}`."
                ) from error
            _registered(ort).add(plugin.package)
    return _listed(ort, plugin)


def choose_device(found: Sequence[PluginDevice], wanted: str | None, plugin: Plugin, runtime: str) -> PluginDevice:
    """The device that `--device` names: by its number in the list, or by a part of its name. None takes the first.

    Raises:
        RuntimeUnavailableError: there is no device.
        InputError: none or several have that name.
    """
    if not found:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}: {plugin.package} is installed and lists no device; it needs {plugin.needs}"
        )
    if wanted is None:
        return found[0]
    listed = "; ".join(f"{index}: {device.name}" for index, device in enumerate(found))
    if wanted.isdecimal() and int(wanted) < len(found):
        return found[int(wanted)]
    fitting = [device for device in found if not wanted.isdecimal() and wanted.lower() in device.name.lower()]
    if len(fitting) != 1:
        raise InputError(
            f"--device {wanted!r}: expected a number or a part of one name of the devices of {runtime}: {listed}"
        )
    return fitting[0]


def check_device(ort: Any, plugin: Plugin, device: PluginDevice, runtime: str) -> None:
    """Runs one value on a device, because its driver is opened only by a session.

    Raises:
        RuntimeUnavailableError: the device cannot run it, or the session would run it on the CPU.
    """
    try:
        _run_probe(ort, plugin, device, PROBE, np.array([3.0], np.float32))
    except Exception as error:  # its exceptions share no base class of their own
        raise RuntimeUnavailableError(
            f"runtime {runtime!r}: ONNX Runtime {ort.__version__} cannot use {device.name} ({_one_line(error)}); it "
            f"needs {plugin.needs}"
        ) from error


def _computes_f16(ort: Any, plugin: Plugin, device: PluginDevice) -> bool:
    """Whether a device computes in float16, found by one multiplication: a session loads without it too."""
    try:
        return bool(_run_probe(ort, plugin, device, PROBE_F16, np.array([3.0], np.float16))[0] == 9)
    except Exception:  # an error is the answer
        return False


def _run_probe(ort: Any, plugin: Plugin, device: PluginDevice, model: bytes, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    _pin(options, device)
    session = ort.InferenceSession(model, options, providers=_providers(plugin, device), enable_fallback=0)
    if (got := session.get_providers())[:1] != [plugin.provider]:
        raise RuntimeUnavailableError(f"asked for {plugin.provider}, got {', '.join(got)}")
    output: Array = session.run(None, {"x": x})[0]
    return output


def _pin(options: Any, device: PluginDevice) -> None:
    """Makes a device the only place where nodes of a session may run."""
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    if device.handle is not None:
        options.add_provider_for_devices([device.handle], {})


def _providers(plugin: Plugin, device: PluginDevice) -> list[Any]:
    """The session's list of providers, which is empty where its options name the device."""
    return [] if device.handle is not None else [(plugin.provider, {})]


class OrtPluginBackend(OrtBackend):
    """ONNX Runtime with one device of a plugin's provider. Nothing of a graph may fall back to the CPU."""

    reference = False
    plugin: ClassVar[Plugin]
    preferred: tuple[Precision, ...] = ("fp32",)

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        precision: Precision | None = None,
        device: str | None = None,
    ) -> None:
        if threads is not None:
            raise InputError(f"runtime {self.name!r} runs on another device than the CPU; leave --threads out")
        ort = import_onnxruntime(self.name, self.plugin.extra)
        self._asked_device = device
        self.device = choose_device(plugin_devices(ort, self.plugin, self.name), device, self.plugin, self.name)
        check_device(ort, self.plugin, self.device, self.name)
        if _computes_f16(ort, self.plugin, self.device):
            self.preferred = ("fp16", "fp32")
        super().__init__(bundle, precision=precision)
        if precision == "fp16" and "fp16" not in self.preferred:
            raise RuntimeUnavailableError(
                f"runtime {self.name!r}: {self.device.name} does not compute in fp16 (WebGPU's shader-f16); leave "
                "--precision out"
            )

    @property
    def providers(self) -> tuple[str, ...]:  # type: ignore[override]
        """See `OrtBackend`."""
        return (self.plugin.provider,)

    def arguments(self) -> dict[str, Any]:
        """See `Backend`."""
        return {"precision": self._precision, "device": self._asked_device}

    def has(self, graph: GraphName) -> bool:
        """See `Backend`. The decoder's upper part has an open size, computed by nodes that only the CPU runs."""
        return graph != "vae_decoder_upper" and super().has(graph)

    def _provider_options(self) -> list[Any]:
        return _providers(self.plugin, self.device)

    def _prepare(self, options: Any, graph: GraphName, path: Path) -> None:
        """Registers no compiled kernels, which are for the CPU; functions are inlined."""
        _pin(options, self.device)

    def _device_and_driver(self) -> tuple[str, str | None]:
        # No driver of every vendor states its version: most are part of the system's kernel and packages.
        package = _package_version(self.plugin.package)
        return self.device.name, f"{package}system {platform.release()} {platform.version()}"

    def describe(self) -> dict[str, str]:
        """See `OrtBackend`; with the device, without the threads, which do not matter here."""
        described = super().describe()
        del described["threads"]
        return described | {"device": self.device.name}


class OrtWebGpuBackend(OrtPluginBackend):
    """ONNX Runtime's WebGPU provider: any GPU with a Vulkan, Direct3D 12 or Metal driver."""

    name = "ort-webgpu"
    plugin = PLUGINS["ort-webgpu"]


class OrtOpenVinoBackend(OrtPluginBackend):
    """OpenVINO as a provider of ONNX Runtime, which also reads bundles with functions."""

    name = "ort-openvino"
    plugin = PLUGINS["ort-openvino"]


def _listed(ort: Any, plugin: Plugin) -> list[PluginDevice]:
    """The provider's devices in ONNX Runtime's list, GPUs that are no part of the CPU first."""
    found = []
    for entry in ort.get_ep_devices():
        if entry.ep_name != plugin.provider:
            continue
        device = entry.device
        kind = getattr(device.type, "name", str(device.type))
        facts = {str(key): str(value) for key, value in dict(device.metadata).items()}
        number = f"{device.vendor or 'vendor'} {device.vendor_id:#06x}:{device.device_id:#06x}"
        words = facts.get("Description") or number
        found.append((facts.get("Discrete") != "1", PluginDevice(f"{kind} {words}", kind, entry)))
    return [device for _, device in sorted(found, key=lambda pair: pair[0])]


def _registered(ort: Any) -> set[str]:
    """Names of the libraries that this process has registered with this module."""
    if not hasattr(ort, "_moebius_registered"):
        ort._moebius_registered = set()
    found: set[str] = ort._moebius_registered
    return found


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2] if part.isdecimal())


def _package_version(package: str) -> str:
    try:
        return f"{package} {metadata.version(package)}, "
    except metadata.PackageNotFoundError:  # built in
        return ""


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:80]} ... {text[-200:]}"  # the reason is often at the end
