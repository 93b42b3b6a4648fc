"""The version of this package."""

from __future__ import annotations


def own_version() -> str | None:
    """The version of the installed `moebius-edge`; None in a checkout that is not installed."""
    from importlib import metadata

    try:
        return metadata.version("moebius-edge")
    except metadata.PackageNotFoundError:
        return None
