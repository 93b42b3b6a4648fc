"""Checks the machine itself: processor, memory, disk, system, Jetson."""

from __future__ import annotations

import re
from pathlib import Path

from moebius_export.doctor import facts
from moebius_export.doctor.rows import Row, Verdict
from moebius_export.doctor.sources import Sources
from moebius_runtime.hardware.host import describe_host, read_text
from moebius_runtime.hardware.jetson import describe_jetson, is_jetson, l4t_release

# Instruction sets that the compiled kernels and ONNX Runtime use, by their names in /proc/cpuinfo.
_INSTRUCTIONS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "asimddp", "i8mm", "sve")
_LEAST_PYTHON = (3, 10)


def processor_rows(sources: Sources) -> list[Row]:
    """Rows of the processor, cores, instruction sets, system and Python, which must be 3.10 or later."""
    host = describe_host(sources.root)
    cpuinfo = read_text(sources.root / "proc/cpuinfo") or ""
    has = instructions(cpuinfo)
    python = ".".join(map(str, sources.python))
    old = sources.python < _LEAST_PYTHON
    return [
        Row("processor", ", ".join(host[key] for key in ("board", "cpu") if key in host) or sources.machine),
        Row("cores", f"{host['cores']}, {sources.machine}"),
        Row("instruction sets", ", ".join(has) or "none of those that the kernels use"),
        Row("system", ", ".join(host[key] for key in ("system", "kernel") if key in host)),
        Row("python", python, Verdict.wrong, "install Python 3.10 or later") if old else Row("python", python),
    ]


def instructions(cpuinfo: str) -> list[str]:
    """The used instruction sets that /proc/cpuinfo lists: `flags` on x86, `Features` on Arm."""
    line = re.search(r"^(?:flags|Features)\s*: (.*)$", cpuinfo, re.MULTILINE)
    found = set(line[1].split()) if line else set()
    return [name for name in _INSTRUCTIONS if name in found]


def memory_rows(sources: Sources, folder: Path) -> list[Row]:
    """Rows of memory and disk; `folder` is where engines will be written."""
    meminfo = read_text(sources.root / "proc/meminfo") or ""
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB$", meminfo, re.MULTILINE)}
    rows = []
    if "MemTotal" in kib and "MemAvailable" in kib:
        swap = f", {gib(kib.get('SwapTotal', 0) << 10)} swap" if kib.get("SwapTotal") else ", no swap"
        text = f"{gib(kib['MemAvailable'] << 10)} free of {gib(kib['MemTotal'] << 10)}{swap}"
        low = kib["MemAvailable"] << 10 < facts.MEMORY_WANTED
        jetson = is_jetson(sources.root)
        fix = "close other programs" + (
            "; stop the desktop with `sudo systemctl isolate multi-user.target`" if jetson else ""
        )
        rows.append(Row("memory", text, Verdict.wrong, fix) if low else Row("memory", text))
    else:
        rows.append(Row("memory", "/proc/meminfo cannot be read"))
    free = sources.free_disk(existing(folder))
    text = f"{gib(free)} free in {existing(folder)}"
    little = free < facts.DISK_WANTED
    rows.append(
        Row("disk", text, Verdict.wrong, f"free some space: a bundle with engines takes {gib(facts.DISK_WANTED)}")
        if little
        else Row("disk", text)
    )
    return rows


def jetson_rows(sources: Sources) -> list[Row]:
    """Rows of board, JetPack, power mode and clocks of a Jetson; none on any other machine."""
    if not is_jetson(sources.root):
        return []
    l4t = l4t_release(sources.root)
    jetpack = facts.jetpack_of(l4t)
    if jetpack is None:
        found = f"Jetson Linux {l4t}" if l4t else "no release in /etc/nv_tegra_release"
        rows = [Row("JetPack", f"{found}; this version does not know it", Verdict.wrong, _FLASH)]
    else:
        text = (
            f"{jetpack.name} (Jetson Linux {l4t}), which ships TensorRT {jetpack.tensorrt}, CUDA {jetpack.cuda} and "
            f"Python {jetpack.python}"
        )
        rows = [Row("JetPack", text) if jetpack.supported else Row("JetPack", text, Verdict.wrong, _FLASH)]
        python = ".".join(map(str, sources.python))
        if python != jetpack.python:
            rows.append(
                Row(
                    "python of JetPack",
                    f"this is Python {python}, but the device's TensorRT needs {jetpack.python}",
                    Verdict.wrong,
                    f"python{jetpack.python} -m venv --system-site-packages .venv",
                )
            )
    state = describe_jetson(sources.root)
    if "nvpmodel" in state:
        rows.append(Row("power mode", state["nvpmodel"], fix="sudo nvpmodel -q lists the modes"))
    if "jetson_clocks" in state:
        pinned = state["jetson_clocks"] == "on"
        rows.append(Row("pinned clocks", state["jetson_clocks"], fix=None if pinned else "sudo jetson_clocks"))
    return rows


_FLASH = "install JetPack 6.1 or later: docs/jetson.md"


def existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next((path for path in (folder, *folder.absolute().parents) if path.is_dir()), Path("/"))


def gib(size: float) -> str:
    """Formats bytes as GiB."""
    return f"{size / (1 << 30):.1f} GiB"
