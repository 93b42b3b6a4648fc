"""The runtimes, by the name that `--runtime` takes."""

from __future__ import annotations

import inspect
from importlib import metadata
from typing import Any

from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.manifest import Precision
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError

AUTO = "auto"
GROUP = "moebius_runtime.backends"  # entry points of other packages: a runtime's name = its Backend class
RUNTIMES = ("ort-cpu", "ort-cuda", "ort-tensorrt", "tensorrt", "tensorrt-rtx", "torch")

# Best first. ort-tensorrt is not tried: it builds engines for minutes, which should be asked for.
_AUTO = ("tensorrt", "tensorrt-rtx", "ort-cuda", "ort-cpu")


def create_backend(
    bundle: Bundle,
    runtime: str,
    *,
    threads: int | None = None,
    precision: Precision | None = None,
    trust: bool = False,
) -> Backend:
    """The named runtime over a bundle. Never another one in its place.

    Args:
        bundle: what is to be run.
        runtime: one of `RUNTIMES`; `auto` for the first of engines that fit, ort-cuda and ort-cpu that can run here,
            with notes on what was taken and why the others were not; or the name of an entry point of `GROUP`.
        threads: of a runtime on the CPU; None takes the physical cores.
        precision: of the U-Net; None takes the runtime's own preference among what the bundle holds.
        trust: run engines whose passport is missing or does not match, with a note.

    Raises:
        RuntimeUnavailableError: the name is unknown, or what it needs is not installed or not in this machine.
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
    """The best runtime that can be had, with the reasons why better ones could not."""
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
    """A runtime that another package brings, such as this project's own `torch`."""
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
