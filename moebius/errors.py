"""Errors of PyTorch's side that a user can fix."""

from __future__ import annotations

from moebius_runtime.errors import MoebiusError


def one_line(text: str) -> str:
    """`text` on one line: runs of white space become one blank, characters that do not print become `?`.

    Names of tensors and files come from strangers; a newline or a terminal escape in one must not reach the
    screen.
    """
    return "".join(char if char.isprintable() else "?" for char in " ".join(text.split()))


class UserError(MoebiusError, ValueError):
    """Base of the errors here. The message is one line: received, expected, what to do."""

    def __init__(self, message: str) -> None:
        """Keep `message`, brought to one line."""
        super().__init__(one_line(message))


class CheckpointError(UserError):
    """A weights source, checkpoint or preset is not what is expected."""


class DamagedError(CheckpointError):
    """A weights file whose content is not what was written: copying or downloading it again may help."""


class MisfitError(CheckpointError):
    """A weights file that is not a state dict of the network: `unexpected` are the tensors that it does not have."""

    def __init__(self, message: str, unexpected: list[str]) -> None:
        super().__init__(message)
        self.unexpected = unexpected


class TrainingError(UserError):
    """A training option, or what it asks for, cannot be had; or a loss does not reach the weights that it should."""


class DataError(UserError):
    """Training data that cannot be used, or settings for it that make no sense."""
