"""Errors of the packages that need PyTorch: wrong weights, training options or training data."""

from __future__ import annotations

from moebius_runtime.errors import MoebiusError
from moebius_runtime.errors import one_line as one_line


class UserError(MoebiusError, ValueError):
    """Base of the errors here. The message is one line: what was received, what is expected and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class CheckpointError(UserError):
    """A weights source, checkpoint or preset is missing or does not fit the network."""


class DamagedError(CheckpointError):
    """A damaged weights file. Copying or downloading it again may help."""


class MisfitError(CheckpointError):
    """A weights file that does not fit the network. `unexpected` names the tensors that only the file has."""

    def __init__(self, message: str, unexpected: list[str] | None = None) -> None:
        super().__init__(message)
        self.unexpected = unexpected or []


class TrainingError(UserError):
    """Wrong training options, missing resources, or a loss that does not depend on the weights it should train."""


class DataError(UserError):
    """Unusable training data, or invalid settings for it."""
