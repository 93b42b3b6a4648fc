"""Finds the installed TensorRT: `tensorrt` (the system's or JetPack's) or `tensorrt_rtx` (extra `trt-rtx`)."""

from __future__ import annotations

import importlib
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moebius_runtime.bundle.passport import EngineBackend
from moebius_runtime.errors import RuntimeUnavailableError

MODULES: dict[EngineBackend, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
_OLDEST = {"tensorrt": (10, 0), "tensorrt-rtx": (1, 0)}  # the first with strongly typed networks
_HOW = {
    "tensorrt": "it is part of JetPack on a Jetson (`sudo apt install tensorrt python3-libnvinfer`, and an environment "
    "made with --system-site-packages), and NVIDIA's packages bring it elsewhere",
    "tensorrt-rtx": 'install it with `pip install "moebius-edge[trt-rtx]"` (Linux x86-64 and Windows)',
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT. Its attributes decide what it supports, not its version number."""

    backend: EngineBackend
    module: Any

    @property
    def version(self) -> str:
        """Such as "10.3.0" or "1.7.1.116"."""
        return str(self.module.__version__)

    @property
    def names_targets(self) -> bool:
        """Whether it can build for GPUs of other machines."""
        return hasattr(self.module, "ComputeCapability")

    @property
    def targets(self) -> list[int]:
        """Compute capabilities that it can build for by name."""
        names = dir(getattr(self.module, "ComputeCapability", None))
        return sorted(int(match[1]) for name in names if (match := re.fullmatch(r"SM(\d+)", name)))

    @property
    def has_monitor(self) -> bool:
        """Whether builds report their progress and can be stopped."""
        return hasattr(self.module, "IProgressMonitor")

    def level(self, name: str) -> Any | None:
        """A member of `HardwareCompatibilityLevel`, or None if this version lacks it."""
        return getattr(getattr(self.module, "HardwareCompatibilityLevel", None), name, None)

    def flag(self, name: str) -> Any | None:
        """A member of `BuilderFlag`, or None if this version lacks it."""
        return getattr(self.module.BuilderFlag, name, None)


def find_library(backend: EngineBackend | None, cross: bool, note: Callable[[str], None]) -> Library:
    """Imports the requested backend, or the one that is installed.

    Args:
        backend: None takes the installed one.
        cross: the targets are named and may be on other machines, which only TensorRT-RTX builds for.
        note: called with the choice and its reason if both are installed.

    Raises:
        RuntimeUnavailableError: it is not installed, does not load, or is too old.
    """
    if backend is not None:
        return _checked(backend, _imported(backend))
    found = {name: module for name in MODULES if (module := _imported(name, missing_ok=True)) is not None}
    if not found:
        first: EngineBackend = "tensorrt" if platform.machine() == "aarch64" else "tensorrt-rtx"
        other = next(name for name in MODULES if name != first)
        raise RuntimeUnavailableError(
            f"no TensorRT is installed: neither `tensorrt` nor `tensorrt_rtx` can be imported. {first}: {_HOW[first]}; "
            f"{other}: {_HOW[other]}"
        )
    chosen: EngineBackend = "tensorrt-rtx" if cross and "tensorrt-rtx" in found else next(iter(found))
    if len(found) > 1:
        why = "only it builds for GPUs of other machines" if cross else "it builds for this machine's GPU"
        rest = next(name for name in found if name != chosen)
        note(f"tensorrt and tensorrt-rtx are both installed: using {chosen}, {why}; --backend {rest} uses the other")
    return _checked(chosen, found[chosen])


def _imported(backend: EngineBackend, missing_ok: bool = False) -> Any | None:
    name = MODULES[backend]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if missing_ok and error.name == name:
            return None
        raise RuntimeUnavailableError(f"--backend {backend}: {error}; {_HOW[backend]}") from error
    except (ImportError, OSError, RuntimeError) as error:  # a wheel without its libraries
        reason = " ".join(str(error).split())[:300]
        raise RuntimeUnavailableError(f"`{name}` is installed but does not load: {reason}; {_HOW[backend]}") from error


def _checked(backend: EngineBackend, module: Any) -> Library:
    library = Library(backend, module)
    numbers = tuple(int(part) for part in re.findall(r"\d+", library.version)[:2])
    if numbers < _OLDEST[backend]:
        raise RuntimeUnavailableError(
            f"{backend} {library.version} has no strongly typed networks; 10.0 or later is needed (on a Jetson: "
            "JetPack 6.1 or later)"
        )
    return library
