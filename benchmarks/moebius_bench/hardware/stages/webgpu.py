"""Stage `ort-webgpu`: ONNX Runtime's WebGPU provider on Vulkan, against PyTorch on the CPU, then timed.

It needs the wheel onnxruntime-webgpu or the plugin, and a Vulkan driver; no CUDA. A driver in software, such as
SwiftShader, serves for a dry run.
"""

from __future__ import annotations

from pathlib import Path

from moebius_bench.hardware.network import WEIGHTS
from moebius_bench.hardware.recorder import NotInstalledError, NotRunError, Recorder, need
from moebius_bench.hardware.stages.engines import export_command, exported_preset, verify_and_time


def run(record: Recorder) -> None:
    """A bundle with the rewrites of `--target webgpu`: graphs, a picture, and their times."""
    if reason := _why_not():
        raise NotInstalledError(reason)
    need("torch", "diffusers", "onnx", "onnx_ir", "onnxscript", "onnxsim", "polygraphy", "ml_dtypes")
    from moebius_runtime.backends.ort import import_onnxruntime
    from moebius_runtime.backends.ort_plugin import PLUGINS, check_device, choose_device, plugin_devices
    from moebius_runtime.errors import RuntimeUnavailableError

    ort, plugin = import_onnxruntime(), PLUGINS["ort-webgpu"]
    try:  # before an export, which takes a while
        device = choose_device(plugin_devices(ort, plugin, "ort-webgpu"), None, plugin, "ort-webgpu")
        check_device(ort, plugin, device, "ort-webgpu")
    except RuntimeUnavailableError as error:
        raise NotRunError(" ".join(str(error).split())[:600]) from error
    record.fact("device", f"{device.name} ({device.kind})")
    preset = exported_preset(record)
    out = Path(record.request.folder) / "bundle-webgpu"
    options = ["--weights", WEIGHTS, "--vae", WEIGHTS, "--preset", preset, "--target", "webgpu", "--out", str(out)]
    export_command(["onnx", *options], record.left - 10)
    verify_and_time(record, "ort-webgpu", "ort-webgpu", out, "fp32", record.left - 3)


def _why_not() -> str | None:
    """Why ONNX Runtime has no WebGPU provider here; None where it has one, built in or as a plugin."""
    from importlib.util import find_spec

    if find_spec("onnxruntime") is None:
        return "onnxruntime not installed"
    if find_spec("onnxruntime_ep_webgpu") is not None:
        return None
    from moebius_runtime.backends.ort import import_onnxruntime

    if "WebGpuExecutionProvider" in import_onnxruntime().get_available_providers():
        return None
    return "neither onnxruntime-webgpu nor onnxruntime-ep-webgpu installed"
