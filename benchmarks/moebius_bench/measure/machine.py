"""What a measurement ran on: the machine, and what is installed."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from moebius_runtime.hardware.host import describe_host

LIBRARIES = ("moebius-edge", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch")
# What a device installs to fill pictures; one of the inference libraries, whichever is there.
_NEEDED = ("numpy", "pillow", "pydantic", "rich", "typer", "onnxruntime", "onnxruntime-gpu")


def describe_machine(root: Path = Path("/")) -> dict[str, str]:
    """The host as `describe_host` sees it, and library versions; what cannot be read is left out, not guessed."""
    return describe_host(root) | {name: version for name in LIBRARIES if (version := installed_version(name))}


def installed_sizes(names: Iterable[str] = _NEEDED) -> dict[str, int]:
    """Bytes on disk of each installed distribution that the runtime needs, and of their own requirements.

    Sizes are those of the files that the distribution's RECORD lists and that are there.
    """
    sizes: dict[str, int] = {}
    waiting = list(names)
    while waiting:
        name = _normal(waiting.pop())
        if name in sizes:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # the other inference library, or a need of another system
        sizes[name] = sum(_size(Path(str(file.locate()))) for file in distribution.files or ())
        waiting += [need for entry in distribution.requires or () if (need := _requirement(entry))]
    runtime = importlib.util.find_spec("moebius_runtime")
    if runtime is not None and runtime.submodule_search_locations:
        folder = Path(next(iter(runtime.submodule_search_locations)))
        sizes["moebius_runtime"] = sum(_size(path) for path in folder.rglob("*.py"))
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))


def installed_version(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirement(entry: str) -> str | None:
    """The name in a requirement, None where it belongs to an extra."""
    requirement, _, marker = entry.partition(";")
    match = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return match[0] if match and "extra" not in marker else None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
