"""The runtimes, by the name that `--runtime` takes."""

from __future__ import annotations

from moebius_runtime.backends.base import Backend
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import RuntimeUnavailableError

RUNTIMES = ("ort-cpu",)
_PLANNED = ("ort-cuda", "tensorrt", "tensorrt-rtx", "torch")


def create_backend(bundle: Bundle, runtime: str, *, threads: int | None = None) -> Backend:
    """The named runtime over a bundle. Never another one in its place.

    Raises:
        RuntimeUnavailableError: the name is unknown, or what it needs is not installed.
    """
    if runtime == "ort-cpu":
        from moebius_runtime.backends.ort import OrtBackend

        return OrtBackend(bundle, threads=threads)
    if runtime in _PLANNED:
        raise RuntimeUnavailableError(
            f"runtime {runtime!r} is not part of this version of moebius-edge; use one of: {', '.join(RUNTIMES)}"
        )
    raise RuntimeUnavailableError(f"there is no runtime {runtime!r}; use one of: {', '.join(RUNTIMES)}")


__all__ = ["RUNTIMES", "Backend", "create_backend"]
