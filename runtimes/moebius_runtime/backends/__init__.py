"""The runtimes by their names in `--runtime`."""

from __future__ import annotations

import inspect
import platform
from typing import Any

from moebius_runtime import kernels
from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.graph_files import function_domains
from moebius_runtime.bundle.manifest import Precision
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError
from moebius_runtime.hardware.host import processor_flags

AUTO = "auto"
GROUP = "moebius_runtime.backends"  # entry points of other packages: name of the runtime = its Backend class
RUNTIMES = (
    *("ort-cpu", "ort-cuda", "ort-tensorrt", "ort-webgpu", "ort-openvino"),
    *("openvino", "tensorrt", "tensorrt-rtx", "torch"),
)
WITH_DEVICES = ("openvino", "ort-openvino", "ort-webgpu")
"""The runtimes that take `--device`."""

_X86_64 = ("x86_64", "AMD64")
# Best first. ort-tensorrt is not tried, because it builds engines for minutes.
_AUTO = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-webgpu", "openvino", "ort-cpu")


def create_backend(
    bundle: Bundle,
    runtime: str,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
    trust: bool = False,
    device: str | None = None,
) -> Backend:
    """Opens a bundle with the named runtime. There is no fallback to another one.

    Args:
        bundle: the bundle.
        runtime: one of `RUNTIMES`; `auto` for the first of tensorrt, tensorrt-rtx, ort-cuda, ort-webgpu, openvino and
            ort-cpu that can run here and is worth it (`_not_worth_it`), with notes on why the ones before it were not
            taken; or the name of an entry point of `GROUP`.
        threads: number of threads of a runtime on the CPU; None takes the physical cores.
        precision: precision of the U-Net; None takes the runtime's preference among those of the bundle.
        trust: run engines whose engine passport is missing or does not match, with a note.
        device: of a runtime of `WITH_DEVICES`: its number, its name or a part of it. None takes the runtime's first.

    Raises:
        RuntimeUnavailableError: the runtime is unknown, or its packages or hardware are missing.
        EngineError: the runtime needs engines, and none of the bundle's fits.
        BundleError: the bundle has no such precision.
        InputError: the runtime does not take one of the arguments.
    """
    if trust and runtime not in (AUTO, "tensorrt", "tensorrt-rtx"):
        raise InputError(f"--trust is about engines, and runtime {runtime!r} loads none; leave it out")
    if device is not None and runtime not in WITH_DEVICES:
        raise InputError(
            f"--device {device}: runtime {runtime!r} takes none; name a runtime of {', '.join(WITH_DEVICES)}, or leave "
            "it out"
        )
    if runtime == AUTO:
        return _automatic(bundle, threads, precision, trust)
    if runtime == "ort-cpu":
        from moebius_runtime.backends.ort import OrtBackend

        return OrtBackend(bundle, threads=threads, precision=precision)
    if runtime == "ort-cuda":
        from moebius_runtime.backends.ort_gpu import OrtCudaBackend

        return OrtCudaBackend(bundle, threads=threads, precision=precision)
    if runtime == "ort-tensorrt":
        from moebius_runtime.backends.ort_gpu import OrtTensorRTBackend

        return OrtTensorRTBackend(bundle, threads=threads, precision=precision)
    if runtime == "tensorrt":
        from moebius_runtime.backends.tensorrt import TensorRTBackend

        return TensorRTBackend(bundle, threads=threads, precision=precision, trust=trust)
    if runtime == "tensorrt-rtx":
        from moebius_runtime.backends.tensorrt import TensorRTRTXBackend

        return TensorRTRTXBackend(bundle, threads=threads, precision=precision, trust=trust)
    if runtime == "openvino":
        from moebius_runtime.backends.openvino import OpenVinoBackend

        return OpenVinoBackend(bundle, threads=threads, precision=precision, device=device)
    if runtime == "ort-webgpu":
        from moebius_runtime.backends.ort_plugin import OrtWebGpuBackend

        return OrtWebGpuBackend(bundle, threads=threads, precision=precision, device=device)
    if runtime == "ort-openvino":
        from moebius_runtime.backends.ort_plugin import OrtOpenVinoBackend

        return OrtOpenVinoBackend(bundle, threads=threads, precision=precision, device=device)
    return _elsewhere(bundle, runtime, threads, precision)


def _automatic(bundle: Bundle, threads: int | None, precision: Precision | None, trust: bool) -> Backend:
    """The best available runtime, with notes on why better ones are unavailable."""
    reasons = []
    for runtime in _AUTO:
        on_cpu = runtime in ("ort-cpu", "openvino")
        try:
            if reason := _not_worth_it(bundle, runtime):
                raise RuntimeUnavailableError(reason)
            backend = create_backend(
                bundle,
                runtime,
                threads=threads if on_cpu else None,
                precision=precision,
                trust=trust and "tensorrt" in runtime,
            )
            backend.refuse_known_failure()
        except MoebiusError as error:
            reasons.append(f"{runtime} was not taken: {error}")
        else:
            if runtime == "ort-webgpu" and backend.device.kind != "GPU":  # type: ignore[attr-defined]
                reasons.append(f"{runtime} was not taken: it found no GPU, only {backend.device.name}")  # type: ignore[attr-defined]
                continue
            backend.note(f"--runtime auto: {runtime} is run", *reasons)
            return backend
    raise RuntimeUnavailableError(f"--runtime auto: nothing here can run {bundle.path}: {'; '.join(reasons)}")


def _not_worth_it(bundle: Bundle, runtime: str) -> str | None:
    """Why `auto` does not take OpenVINO, or None: by the measurements in docs/runtimes.md.

    It is faster than ONNX Runtime without the compiled kernels on x86-64 with AVX2, slower than with them, and not
    faster where there is AVX-512. Nothing was measured on other processors.
    """
    if runtime != "openvino":
        return None
    flags = processor_flags()
    if platform.machine() not in _X86_64 or "avx2" not in flags:
        return "it was compared with ort-cpu on x86-64 with AVX2 only; name it with --runtime openvino"
    if "avx512f" in flags:
        return "it is not faster than ort-cpu on a processor with AVX-512 (docs/runtimes.md)"
    compiled = kernels.library_path() is not None and "fp32" in bundle.graph("unet").files
    if compiled and kernels.DOMAIN in function_domains(bundle.model_file("unet")):
        return "the compiled kernels of ort-cpu run this bundle, which is faster (docs/runtimes.md)"
    return None


def _elsewhere(bundle: Bundle, runtime: str, threads: int | None, precision: Precision | None) -> Backend:
    """A runtime of another package, such as this project's `torch`."""
    from importlib import metadata  # takes 30 ms, half of it for the parser of e-mails

    found = [point for point in metadata.entry_points(group=GROUP) if point.name == runtime]
    if not found:
        if runtime == "torch":
            raise RuntimeUnavailableError(
                f"runtime 'torch' is brought by an entry point of group {GROUP}, and no installed package has it. "
                'Install moebius-edge again: `pip install "moebius-edge[export]"`.'
            )
        raise RuntimeUnavailableError(f"there is no runtime {runtime!r}; use one of: auto, {', '.join(RUNTIMES)}")
    try:
        kind = found[0].load()
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r} ({found[0].value}) needs what cannot be imported ({error}). Install it with "
            '`pip install "moebius-edge[export]"`.'
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Backend)):
        raise RuntimeUnavailableError(f"runtime {runtime!r}: {found[0].value} is not a Backend; remove its package")
    options: dict[str, Any] = {"threads": threads}
    if "precision" in inspect.signature(kind).parameters:
        options["precision"] = precision
    elif precision not in (None, "fp32"):
        raise InputError(f"--precision {precision}: runtime {runtime!r} runs in fp32; leave it out")
    return kind(bundle, **options)


__all__ = ["AUTO", "GROUP", "RUNTIMES", "WITH_DEVICES", "Backend", "create_backend"]
