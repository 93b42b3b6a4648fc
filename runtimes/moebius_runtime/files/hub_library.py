"""huggingface_hub, imported only when a hub is used, and its settings.

The mirror (`HF_ENDPOINT`) and offline mode (`HF_HUB_OFFLINE`) are read at each request, so a program may set them after
importing huggingface_hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from moebius_runtime.errors import InputError
from moebius_runtime.files.hub_answers import check_endpoint, first_line

if TYPE_CHECKING:
    from types import ModuleType


def import_hub(what: str, extra: str, instead: str) -> ModuleType:
    """Imports `huggingface_hub`.

    Args:
        what: what needs it, for the message.
        extra: of this project, that installs it.
        instead: what to do without it.

    Raises:
        InputError: it is not installed, or cannot use its settings in the environment.
    """
    try:
        import huggingface_hub
        from huggingface_hub import constants, errors  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{what} need the package huggingface_hub; install moebius-edge[{extra}], or {instead}"
        ) from error
    except ValueError as error:  # it reads its environment here
        raise InputError(
            f"huggingface_hub cannot use its settings ({first_line(error)}); check the variables HF_*, of which "
            "timeouts are whole seconds, and HF_ENDPOINT"
        ) from error
    module: ModuleType = huggingface_hub
    return module


def offline() -> bool:
    """Whether the environment forbids network access, as huggingface_hub reads it."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """The hub's address, or that of the mirror in `HF_ENDPOINT`.

    Raises:
        InputError: `HF_ENDPOINT` is not a valid address.
    """
    return check_endpoint((os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"))


def hub_cache() -> Path:
    """The cache folder of huggingface_hub, which must be importable."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
