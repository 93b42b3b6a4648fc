"""Errors a user can mend. Each message says what was received, what is expected and what to do.

The command line prints the message of a `MoebiusError` on one line and exits with `exit_code`; anything else is a
bug and keeps its traceback.
"""

from __future__ import annotations


class MoebiusError(Exception):
    """Base of every error that a user can mend."""

    exit_code = 2


class InputError(MoebiusError):
    """An argument, picture, mask or file is not what is expected."""


class BundleError(MoebiusError):
    """A bundle (manifest, graph or weights file) is missing, damaged, or not one that this version reads."""


class EngineError(MoebiusError):
    """An engine, or its passport, is missing or damaged, or was built from other files or for another device."""


class RuntimeUnavailableError(MoebiusError):
    """The runtime that was asked for cannot run here."""


class CudaError(MoebiusError):
    """A call of the CUDA runtime failed: too little memory, a broken driver, or an error of work on the device."""


class CancelledError(MoebiusError):
    """The caller's own `cancelled` check ended the work; nothing was written."""

    exit_code = 130


class OutputError(MoebiusError):
    """The network's result is not a picture (NaN, infinite or constant), or the result could not be written."""
