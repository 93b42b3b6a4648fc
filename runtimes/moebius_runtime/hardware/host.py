"""The host: processor, cores, clocks, memory and system.

Every reader takes the root of the file tree, so that recorded trees can be tested.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def processor_name(root: Path = Path("/")) -> str:
    """The processor's name, else its architecture."""
    return _cpu(read_text(root / "proc/cpuinfo") or "") or platform.machine()


def processor_flags(root: Path = Path("/")) -> frozenset[str]:
    """The instruction sets that the processor lists, such as `avx2`; empty where the system does not state them."""
    return frozenset((_field(read_text(root / "proc/cpuinfo") or "", "flags") or "").split())


def describe_host(root: Path = Path("/")) -> dict[str, str]:
    """Processor, cores, clocks, memory, system and Python; what cannot be read is left out, not guessed."""
    cpuinfo = read_text(root / "proc/cpuinfo") or ""
    facts = {
        "board": read_text(root / "proc/device-tree/model"),
        "cpu": _cpu(cpuinfo),
        "architecture": platform.machine(),
        "cores": _cores(cpuinfo),
        "governor": _governors(root),
        "clock": _clock(root, cpuinfo),
        "memory": _memory(read_text(root / "proc/meminfo") or ""),
        "load_average": (read_text(root / "proc/loadavg") or "").partition(" ")[0] or None,
        "system": _field(read_text(root / "etc/os-release") or "", "PRETTY_NAME", "=") or platform.platform(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    return {name: value for name, value in facts.items() if value}


def _cpu(cpuinfo: str) -> str | None:
    return _field(cpuinfo, "model name") or _field(cpuinfo, "Model") or platform.processor() or None


def _cores(cpuinfo: str) -> str:
    from moebius_runtime.hardware.processors import allowed_cpus, physical_cores

    logical = cpuinfo.count("processor\t") or os.cpu_count() or 1
    allowed = allowed_cpus()
    usable = logical if allowed is None else len(allowed)
    return f"{physical_cores()} physical usable, {usable} of {logical} logical"


def _governors(root: Path) -> str | None:
    found = {
        text
        for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
        if (text := read_text(path))
    }
    return ", ".join(sorted(found)) or None


def _clock(root: Path, cpuinfo: str) -> str | None:
    current, limits = [], set()
    for folder in sorted((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")):
        if (now := read_text(folder / "scaling_cur_freq")) and now.isdigit():
            current.append(int(now) // 1000)
        if (top := read_text(folder / "scaling_max_freq")) and top.isdigit():
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


def read_text(path: Path) -> str | None:
    """A small text file of the system without blank ends; None where it is not there, not readable, or empty."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\x00\n ") or None
    except OSError:
        return None
