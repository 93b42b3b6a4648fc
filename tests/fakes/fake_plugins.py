"""ONNX Runtime with plugin providers that are not there: sessions run on the CPU and report the plugin's provider.

A session must name exactly one device or provider, and must refuse the fallback to the CPU.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import onnxruntime as real

CPU = "CPUExecutionProvider"


def device(provider: str, kind: str = "GPU", description: str = "", discrete: str | None = None) -> Any:
    """An `OrtEpDevice`."""
    metadata = {} if discrete is None else {"Discrete": discrete}
    hardware = types.SimpleNamespace(
        type=types.SimpleNamespace(name=kind),
        vendor="Intel",
        vendor_id=0x8086,
        device_id=0x56A0,
        metadata=metadata | ({"Description": description} if description else {}),
    )
    return types.SimpleNamespace(ep_name=provider, device=hardware)


class _Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.devices: list[Any] = []
        self.log_severity_level = 2

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def add_provider_for_devices(self, devices: list[Any], options: dict[str, str]) -> None:
        assert len({one.ep_name for one in devices}) == 1
        self.devices += devices

    def register_custom_ops_library(self, path: str) -> None:
        raise AssertionError("kernels for the CPU in a session for another device")


def install(
    monkeypatch: Any,
    devices: list[Any],
    *,
    built_in: tuple[str, ...] = (),
    package: str | None = "onnxruntime_ep_webgpu",
    version: str = "1.32.0",
    f16: bool = True,
    broken: str | None = None,
    silent: bool = False,
    change: Any = None,
) -> types.ModuleType:
    """Installs an ONNX Runtime and the package of a plugin.

    Args:
        monkeypatch: of the test.
        devices: that are listed once the plugin's library is registered, or at once where the provider is built in.
        built_in: providers of the wheel itself.
        package: module of the plugin; None where there is none.
        version: of ONNX Runtime.
        f16: whether the device multiplies float16.
        broken: what registering the library raises.
        silent: whether sessions go on with the CPU, as ONNX Runtime does unless it is told not to.
        change: changes an output, as a wrong kernel would: called with the model and the array.
    """
    module = types.ModuleType("onnxruntime")
    module.__version__ = version
    module.registered, module.sessions = [], []

    class InferenceSession:
        def __init__(self, model: Any, options: _Options, providers: list[Any], enable_fallback: int = 1) -> None:
            assert enable_fallback == 0
            assert options.entries == {"session.disable_cpu_ep_fallback": "1"}
            names = [one.ep_name for one in options.devices] + [name for name, _ in providers]
            assert len(names) == 1
            self._names = [CPU] if silent else [*names, CPU]
            self._model = model
            self._session = real.InferenceSession(model, providers=[CPU])
            module.sessions.append(options.devices)

        def get_providers(self) -> list[str]:
            return self._names

        def get_inputs(self) -> list[Any]:
            return self._session.get_inputs()

        def get_outputs(self) -> list[Any]:
            return self._session.get_outputs()

        def run(self, names: Any, inputs: dict[str, Any]) -> list[Any]:
            if not f16 and self._session.get_inputs()[0].type == "tensor(float16)":
                raise RuntimeError("Program Mul requires f16 but the device does not support it.")
            results = self._session.run(names, inputs)
            return results if change is None else [change(self._model, result) for result in results]

    def register(name: str, path: str) -> None:
        if broken:
            raise RuntimeError(broken)
        assert name not in module.registered
        module.registered.append(name)

    module.SessionOptions, module.InferenceSession = _Options, InferenceSession
    module.get_available_providers = lambda: [*built_in, CPU]
    module.register_execution_provider_library = register
    module.get_ep_devices = lambda: [device(CPU, "CPU"), *(devices if module.registered or built_in else [])]
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
    for name in ("onnxruntime_ep_webgpu", "onnxruntime_ep_openvino"):
        plugin = types.ModuleType(name) if name == package else None
        if plugin is not None:
            plugin.get_library_path = lambda: "libplugin.so"
        monkeypatch.setitem(sys.modules, name, plugin)
    return module
