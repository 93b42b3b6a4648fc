"""Errors that a user can fix. Each message names what was received, what is expected and what to do.

The commands print the message of a `MoebiusError` on one line and exit with its `exit_code`. Any other exception is a
bug and keeps its traceback.
"""

from __future__ import annotations


def one_line(message: str) -> str:
    """`message` on one line, with control characters escaped: names of files and tensors can hold any."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode()
        for char in " ".join(message.splitlines())
    )


class MoebiusError(Exception):
    """Base class of all errors that a user can fix."""

    exit_code = 2


class InputError(MoebiusError):
    """An argument, picture, mask or file is invalid."""


class BundleError(MoebiusError):
    """A bundle (manifest, graph or weights file) is missing, damaged, or of a version that cannot be read."""


class EngineError(MoebiusError):
    """An engine, or its passport, is missing or damaged, or was built from other files or for another device."""


class RuntimeUnavailableError(MoebiusError):
    """The requested runtime is unavailable."""


class DeviceError(MoebiusError):
    """A device or its driver gives other values for a graph than PyTorch gave at export."""


class CudaError(MoebiusError):
    """A call of the CUDA runtime failed: too little memory, a broken driver, or an error on the device."""


class CancelledError(MoebiusError):
    """The caller's own `cancelled` check ended the work; nothing was written."""

    exit_code = 130


class OutputError(MoebiusError):
    """The network's result is no picture (NaN, infinite or constant), or a result could not be written."""
