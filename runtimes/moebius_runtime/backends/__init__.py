"""The runtimes by their names in `--runtime`."""

from __future__ import annotations

import inspect
from typing import Any

from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import Precision
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError

AUTO = "auto"
GROUP = "moebius_runtime.backends"  # entry points of other packages: name of the runtime = its Backend class
RUNTIMES = ("ort-cpu", "ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx", "torch")

# Best first. ort-tensorrt is not tried, because it builds engines for minutes.
_AUTO = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu")


def create_backend(
    bundle: Bundle,
    runtime: str,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
    trust: bool = False,
) -> Backend:
    """Opens a bundle with the named runtime. There is no fallback to another one.

    Args:
        bundle: the bundle.
        runtime: one of `RUNTIMES`; `auto` for the first of tensorrt, tensorrt-rtx, ort-cuda and ort-cpu that can run
            here, with notes on why the ones before it cannot; or the name of an entry point of `GROUP`.
        threads: number of threads of a runtime on the CPU; None takes the physical cores.
        precision: precision of the U-Net; None takes the runtime's preference among those of the bundle.
        trust: run engines whose engine passport is missing or does not match, with a note.

    Raises:
        RuntimeUnavailableError: the runtime is unknown, or its packages or hardware are missing.
        EngineError: the runtime needs engines, and none of the bundle's fits.
        BundleError: the bundle has no such precision.
        InputError: the runtime does not take one of the arguments.
    """
    if trust and runtime not in (AUTO, "tensorrt", "tensorrt-rtx"):
        raise InputError(f"--trust is about engines, and runtime {runtime!r} loads none; leave it out")
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
    return _elsewhere(bundle, runtime, threads, precision)


def _automatic(bundle: Bundle, threads: int | None, precision: Precision | None, trust: bool) -> Backend:
    """The best available runtime, with notes on why better ones are unavailable."""
    reasons = []
    for runtime in _AUTO:
        on_cpu = runtime == "ort-cpu"
        try:
            backend = create_backend(
                bundle,
                runtime,
                threads=threads if on_cpu else None,
                precision=precision,
                trust=trust and "tensorrt" in runtime,
            )
        except MoebiusError as error:
            reasons.append(f"{runtime} was not taken: {error}")
        else:
            backend.note(f"--runtime auto: {runtime} is run", *reasons)
            return backend
    raise RuntimeUnavailableError(f"--runtime auto: nothing here can run {bundle.path}: {'; '.join(reasons)}")


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


__all__ = ["AUTO", "GROUP", "RUNTIMES", "Backend", "create_backend"]
