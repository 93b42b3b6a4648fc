"""Checks the inference libraries, and whether their versions fit each other and the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moebius_export.doctor import facts
from moebius_export.doctor.gpu import Gpu
from moebius_export.doctor.questions import QUESTIONS
from moebius_export.doctor.rows import Row, Verdict
from moebius_export.doctor.sources import Answer, Sources
from moebius_runtime.hardware.jetson import is_jetson, l4t_release

LIBRARIES = tuple(name for name in QUESTIONS if name != "device")

_INSTALL = {
    "onnxruntime": 'pip install "moebius-edge[ort]", or "moebius-edge[ort-gpu]" for NVIDIA GPUs',
    "ort-webgpu": 'pip install "moebius-edge[webgpu]"',
    "ort-openvino": 'pip install "moebius-edge[ort-openvino]"',
    "openvino": 'pip install "moebius-edge[openvino]"',
    "tensorrt": "install NVIDIA's packages for this system (python3-libnvinfer): docs/tensorrt.md",
    "tensorrt_rtx": 'pip install "moebius-edge[trt-rtx]"',
    "cuda": 'pip install "moebius-edge[trt]"',
    "torch": 'pip install "moebius-edge[export]"',
    "triton": "comes with PyTorch for CUDA on Linux; else pip install triton",
}
_COMPILE = "faster on a processor with them: install moebius-edge where there is a C++ compiler (docs/kernels.md)"
_PURPOSE = {
    "onnxruntime": "for --runtime ort-*",
    "ort-webgpu": "for --runtime ort-webgpu, on GPUs of every vendor",
    "ort-openvino": "for --runtime ort-openvino, on Intel's CPUs, GPUs and NPUs",
    "openvino": "for --runtime openvino, on CPUs, and on Intel's GPUs and NPUs",
    "tensorrt": "for --runtime tensorrt",
    "tensorrt_rtx": "for --runtime tensorrt-rtx",
    "cuda": "for --runtime tensorrt and tensorrt-rtx",
    "torch": "for exporting, verifying and --runtime torch",
    "triton": "for the Triton kernel of --runtime torch",
}
_SHOWN = {"cuda": "CUDA bindings", "tensorrt_rtx": "tensorrt-rtx", "kernels": "compiled kernels"}
_SHOWN |= {"ort-webgpu": "WebGPU provider", "ort-openvino": "OpenVINO provider", "openvino": "OpenVINO"}


@dataclass(frozen=True)
class Found:
    """A library's answer, and why it does not fit this device although it is installed."""

    answer: Answer
    misfit: str | None = None
    fix: str | None = None

    @property
    def usable(self) -> bool:
        """Whether it is installed, works and fits."""
        return self.answer.problem is None and self.misfit is None


def check_libraries(sources: Sources, gpu: Gpu) -> dict[str, Found]:
    """Asks every library about itself, and checks its version against the device."""
    answers = {name: sources.ask(name) for name in LIBRARIES}
    return {name: Found(answer, *_misfit(name, answer, sources, gpu)) for name, answer in answers.items()}


def library_rows(sources: Sources, found: Mapping[str, Found]) -> list[Row]:
    """One row per library."""
    return [_row(name, library, sources) for name, library in found.items()]


def device_tensorrt(sources: Sources) -> Path | None:
    """The folder of the system's TensorRT module, which a virtual environment may not see."""
    major, minor = sources.python
    for folder in (f"usr/lib/python{major}.{minor}/dist-packages", "usr/lib/python3/dist-packages"):
        if (sources.root / folder / "tensorrt").is_dir():
            return sources.root / folder / "tensorrt"
    return None


def _row(name: str, library: Found, sources: Sources) -> Row:
    shown, answer = _SHOWN.get(name, name), library.answer
    if answer.problem is None:
        if library.misfit is not None:
            return Row(shown, f"{_facts(name, answer)}: {library.misfit}", Verdict.wrong, library.fix)
        text = _facts(name, answer)
        return Row(shown, text, fix=_COMPILE if "not built" in text else None)
    if name == "kernels":
        return Row(shown, answer.problem, Verdict.wrong)
    install = _INSTALL[name]
    if name == "tensorrt":
        system = device_tensorrt(sources)
        if system is not None:
            install = f"python{'.'.join(map(str, sources.python))} -m venv --system-site-packages .venv"
            text = f"the system's, in {system}, is not visible in this environment"
            return Row(shown, text if answer.missing else f"{text}: {answer.problem}", Verdict.wrong, install)
        if is_jetson(sources.root):
            install = "sudo apt-get install nvidia-jetpack, or python3-libnvinfer alone"
    if name == "tensorrt_rtx" and sources.machine not in facts.RTX_MACHINES:
        return Row(shown, f"not installed; there is none for {sources.machine}", Verdict.missing)
    if answer.missing and answer.problem.startswith("No module named"):
        return Row(shown, f"not installed; {_PURPOSE[name]}", Verdict.missing, install)
    return Row(shown, answer.problem, Verdict.missing if answer.missing else Verdict.wrong, install)


def _facts(name: str, answer: Answer) -> str:
    value = answer.value
    if name == "kernels":
        return str(value["words"])
    text = str(value["version"]) or "of unknown version"
    if name == "onnxruntime":
        return f"{text}, {', '.join(provider.removesuffix('ExecutionProvider') for provider in value['providers'])}"
    if "devices" in value:
        return f"{text}, {'; '.join(value['devices']) or 'no device'}"
    if name == "torch":
        return f"{text}, " + ("CPU only" if not value["cuda"] else f"CUDA {value['cuda']}")
    return text


def _misfit(name: str, answer: Answer, sources: Sources, gpu: Gpu) -> tuple[str | None, str | None]:
    """Why a library that works does not fit the device, and how to fix that."""
    if answer.problem is not None:
        return None, None
    value = answer.value
    if name == "tensorrt":
        jetpack = facts.jetpack_of(l4t_release(sources.root)) if is_jetson(sources.root) else None
        if why := facts.tensorrt_problem(value["version"], gpu.sm, gpu.driver, jetpack):
            return why, "use the TensorRT that JetPack ships" if jetpack else "install a TensorRT that fits"
        return _driver("TensorRT", value.get("cuda"), gpu)
    if name == "tensorrt_rtx":
        if why := facts.rtx_problem(sources.machine, gpu.sm):
            return why, "use --runtime tensorrt"
        return _driver("this TensorRT-RTX", value.get("cuda"), gpu)
    if name == "cuda":
        major = (facts.version_of(value["version"]) or (None,))[0]
        why, fix = _driver("these bindings", major, gpu)
        return why, fix and f'pip install "cuda-bindings<13", or {fix}'
    return None, None


def _driver(what: str, cuda: int | None, gpu: Gpu) -> tuple[str | None, str | None]:
    why = facts.driver_problem(gpu.driver, cuda, what)
    return why, why and f"install driver {facts.LEAST_DRIVER[cuda or 0]} or later"
