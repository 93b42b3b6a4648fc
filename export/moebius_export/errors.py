"""Errors of the export side."""

from __future__ import annotations

from moebius_runtime.errors import MoebiusError


class ExportError(MoebiusError):
    """Something a user asked of the export cannot be done, or a graph did not come out as it must."""


class ParityError(MoebiusError):
    """An exported file does not give PyTorch's result: the check did not hold."""

    exit_code = 1


class CostError(ExportError):
    """The products of a graph cannot be counted: a shape is unknown, or an operator is."""


class PrecisionError(ExportError):
    """A graph cannot be had in the precision that was asked for: the check did not hold."""

    exit_code = 1
