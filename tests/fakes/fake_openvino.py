"""OpenVINO that is not there: every model really runs, in ONNX Runtime. What the backend must not do fails."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import onnxruntime

_SHORT = {"tensor(float)": "f32", "tensor(int64)": "i64"}
DEVICES = {"CPU": "AMD EPYC", "GPU": "Intel Arc Graphics (iGPU)", "NPU": "Intel AI Boost"}


class _Port:
    def __init__(self, tensor: Any) -> None:
        self._tensor = tensor

    def get_any_name(self) -> str:
        return str(self._tensor.name)

    def get_element_type(self) -> Any:
        return types.SimpleNamespace(get_type_name=lambda: _SHORT[self._tensor.type])


class _Request:
    def __init__(self, session: Any) -> None:
        self._session = session
        self._output = types.SimpleNamespace(data=None)

    def infer(self, inputs: dict[str, np.ndarray]) -> None:
        (result,) = self._session.run(None, inputs)
        if self._output.data is None:
            self._output.data = result
        else:
            self._output.data[...] = result  # a request writes to one place again and again

    def get_output_tensor(self, index: int) -> Any:
        assert index == 0
        return self._output


def fake_openvino(devices: dict[str, str] | None = None, broken: str | None = None) -> types.ModuleType:
    """The module. `broken`: what loading a model raises."""
    module = types.ModuleType("openvino")
    module.__version__ = "2026.4.1"
    module.compiled = []

    class Core:
        def __init__(self) -> None:
            self.available_devices = list(devices or DEVICES)

        def get_property(self, device: str, name: str) -> str:
            assert name == "FULL_DEVICE_NAME"
            return (devices or DEVICES)[device]

        def read_model(self, path: str) -> Any:
            if broken:
                raise RuntimeError(f"Exception from src/core.cpp:84:\n{broken}\n")
            return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def compile_model(self, session: Any, device: str, config: dict[str, str]) -> Any:
            assert config["EXECUTION_MODE_HINT"] == "ACCURACY"
            assert ("INFERENCE_NUM_THREADS" in config) == (device == "CPU")
            module.compiled.append((device, config))
            return types.SimpleNamespace(
                inputs=[_Port(tensor) for tensor in session.get_inputs()],
                outputs=[_Port(tensor) for tensor in session.get_outputs()],
                create_infer_request=lambda: _Request(session),
            )

    module.Core = Core
    return module
