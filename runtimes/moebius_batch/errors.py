"""Errors of bulk jobs beside those of `moebius_runtime.errors`."""

from __future__ import annotations

from moebius_runtime.errors import MoebiusError


class StoreError(MoebiusError):
    """A source or a destination cannot be reached, read or written as a whole; a single picture is an `InputError`."""


class FailingJobError(MoebiusError):
    """Too many pictures failed, or workers died again and again: the job was stopped."""

    exit_code = 1


class WorkerError(MoebiusError):
    """A worker, in another process or on another machine, met an error that ends the job; it keeps its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
