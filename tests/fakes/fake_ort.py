"""ONNX Runtime with GPU providers that are not there: every session really runs, on the CPU, and says otherwise.

Arrays are on the "device" only through OrtValue and IO binding; a session that is run in any other way fails.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import onnxruntime as real

GPU = ["TensorrtExecutionProvider", "CUDAExecutionProvider"]


class OrtValue:
    def __init__(self, module: Any, array: np.ndarray, device: str) -> None:
        assert device == "cuda"
        self._module, self._array = module, array

    def update_inplace(self, array: np.ndarray) -> None:
        assert array.shape == self._array.shape
        assert array.dtype == self._array.dtype
        self._module.copies.append(array.nbytes)
        self._array[...] = array

    def numpy(self) -> np.ndarray:
        return self._array.copy()


class IOBinding:
    def __init__(self) -> None:
        self.inputs: dict[str, OrtValue] = {}
        self.outputs: dict[str, OrtValue] = {}

    def bind_ortvalue_input(self, name: str, value: OrtValue) -> None:
        self.inputs[name] = value

    def bind_ortvalue_output(self, name: str, value: OrtValue) -> None:
        self.outputs[name] = value

    def bind_output(self, name: str, device: str, number: int) -> None:
        """An output that the session allocates when it runs."""
        assert device == "cuda"
        self.outputs[name] = None

    def copy_outputs_to_cpu(self) -> list[np.ndarray]:
        return [value if isinstance(value, np.ndarray) else value.numpy() for value in self.outputs.values()]

    def clear_binding_inputs(self) -> None:
        self.inputs.clear()

    def clear_binding_outputs(self) -> None:
        self.outputs.clear()


class _Options:
    def __init__(self) -> None:
        self.entries: dict[str, str] = {}
        self.log_severity_level = 2

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key] = value

    def register_custom_ops_library(self, path: str) -> None:
        raise AssertionError("kernels for the CPU in a session for the GPU")


def fake_ort(providers: list[str], broken: str | None = None, silent: bool = False) -> types.ModuleType:
    """A module of one installed ONNX Runtime.

    Args:
        providers: of the GPU, that it was built with.
        broken: what loading their libraries says.
        silent: whether it then goes on with the CPU, as ONNX Runtime does unless it is told not to.
    """
    module = types.ModuleType("onnxruntime")
    module.__version__ = "1.23.2"
    module.copies, module.sessions, module.loaded = [], [], []
    available = [*providers, "CPUExecutionProvider"]

    class InferenceSession:
        def __init__(self, model: Any, options: _Options, providers: list[Any], enable_fallback: int = 1) -> None:
            names = [one if isinstance(one, str) else one[0] for one in providers]
            assert enable_fallback == 0
            assert set(names) <= set(available)
            if isinstance(model, str):
                assert options.entries == {"session.disable_cpu_ep_fallback": "1"}
            if broken and not silent:
                raise RuntimeError(broken)
            self._names = ["CPUExecutionProvider"] if broken else [*names, "CPUExecutionProvider"]
            self._session = real.InferenceSession(model, providers=["CPUExecutionProvider"])
            module.sessions.append((model, dict(one for one in providers if not isinstance(one, str))))

        def get_providers(self) -> list[str]:
            return self._names

        def get_inputs(self) -> list[Any]:
            return self._session.get_inputs()

        def get_outputs(self) -> list[Any]:
            return self._session.get_outputs()

        def io_binding(self) -> IOBinding:
            return IOBinding()

        def run_with_iobinding(self, binding: IOBinding) -> None:
            given = {name: value._array for name, value in binding.inputs.items()}
            for (name, value), result in zip(
                list(binding.outputs.items()), self._session.run(list(binding.outputs), given), strict=True
            ):
                if value is None or isinstance(value, np.ndarray):
                    binding.outputs[name] = result
                    continue
                assert value._array.shape == result.shape
                value._array[...] = result

    class Values:
        @staticmethod
        def ortvalue_from_numpy(array: np.ndarray, device: str, number: int) -> OrtValue:
            return OrtValue(module, array.copy(), device)

        @staticmethod
        def ortvalue_from_shape_and_type(shape: list[int], kind: Any, device: str, number: int) -> OrtValue:
            return OrtValue(module, np.full(shape, np.nan, kind), device)

    def preload_dlls(directory: str) -> None:
        print("Failed to load libcudnn.so.9")
        module.loaded.append(directory)

    module.SessionOptions, module.InferenceSession, module.OrtValue = _Options, InferenceSession, Values
    module.get_available_providers = lambda: available
    module.get_device = lambda: "GPU"
    module.preload_dlls = preload_dlls
    return module


def install(module: types.ModuleType, monkeypatch: Any) -> None:
    """Makes it what `import onnxruntime` gives."""
    monkeypatch.setitem(sys.modules, "onnxruntime", module)
