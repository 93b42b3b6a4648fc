"""What a measurement ran on. Every reader takes the root of the file tree, so that recorded trees can be tested."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

LIBRARIES = ("moebius-edge", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "torch")
# What a device installs to fill pictures; one of the inference libraries, whichever is there.
_NEEDED = ("numpy", "pillow", "pydantic", "rich", "typer", "onnxruntime", "onnxruntime-gpu")


def describe_machine(root: Path = Path("/")) -> dict[str, str]:
    """Processor, cores, clocks, memory, system and library versions; what cannot be read is left out, not guessed."""
    cpuinfo = _read(root / "proc/cpuinfo") or ""
    facts = {
        "board": _read(root / "proc/device-tree/model"),
        "cpu": _field(cpuinfo, "model name") or _field(cpuinfo, "Model") or platform.processor() or None,
        "architecture": platform.machine(),
        "cores": _cores(cpuinfo),
        "governor": _governors(root),
        "clock": _clock(root, cpuinfo),
        "memory": _memory(_read(root / "proc/meminfo") or ""),
        "load_average": (_read(root / "proc/loadavg") or "").partition(" ")[0] or None,
        "system": _field(_read(root / "etc/os-release") or "", "PRETTY_NAME", "=") or platform.platform(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    known = {name: value for name, value in facts.items() if value}
    return known | {name: version for name in LIBRARIES if (version := _version(name))}


def installed_sizes(names: Iterable[str] = _NEEDED) -> dict[str, int]:
    """Bytes on disk of each installed distribution that the runtime needs, and of what those need in turn.

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


def _cores(cpuinfo: str) -> str:
    from moebius_runtime.backends.ort import physical_cores

    logical = cpuinfo.count("processor\t") or os.cpu_count() or 1
    try:
        usable = len(os.sched_getaffinity(0))
    except AttributeError:
        usable = logical
    return f"{physical_cores()} physical usable, {usable} of {logical} logical"


def _governors(root: Path) -> str | None:
    found = {
        text
        for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
        if (text := _read(path))
    }
    return ", ".join(sorted(found)) or None


def _clock(root: Path, cpuinfo: str) -> str | None:
    current, limits = [], set()
    for folder in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        if (now := _read(folder / "scaling_cur_freq")) and now.isdigit():
            current.append(int(now) // 1000)
        if (top := _read(folder / "scaling_max_freq")) and top.isdigit():
            limits.add(int(top) // 1000)
    if current:
        top_text = f" of {max(limits)}" if limits else ""
        return f"{min(current)} to {max(current)}{top_text} MHz"
    stated = [float(value) for value in re.findall(r"^cpu MHz\s*: ([\d.]+)$", cpuinfo, re.MULTILINE)]
    return f"{min(stated):.0f} to {max(stated):.0f} MHz (as /proc/cpuinfo states)" if stated else None


def _memory(meminfo: str) -> str | None:
    values = dict(re.findall(r"^(MemTotal|MemAvailable|SwapTotal):\s+(\d+) kB$", meminfo, re.MULTILINE))
    if "MemTotal" not in values:
        return None
    gib = {name: int(value) / (1 << 20) for name, value in values.items()}
    free = f", {gib['MemAvailable']:.1f} GiB free at the start" if "MemAvailable" in gib else ""
    return f"{gib['MemTotal']:.1f} GiB{free}"


def _field(text: str, name: str, separator: str = ":") -> str | None:
    for line in text.splitlines():
        key, found, value = line.partition(separator)
        if found and key.strip() == name:
            return value.strip().strip('"') or None
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ") or None
    except OSError:
        return None


def _version(name: str) -> str | None:
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
