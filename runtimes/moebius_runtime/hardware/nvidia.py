"""NVIDIA graphics cards, through `nvidia-smi` where it is installed."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Callable, Sequence

Query = Callable[[Sequence[str]], str | None]
"""Given arguments of nvidia-smi: its output, or None where it is missing or refuses them."""

_FIELDS = {
    "index": "index",
    "name": "name",
    "driver_version": "driver",
    "memory.total": "memory_mib",
    "memory.used": "memory_used_mib",
    "pstate": "performance_state",
    "temperature.gpu": "temperature_c",
    "power.draw": "power_w",
    "power.limit": "power_limit_w",
    "clocks.sm": "clock_sm_mhz",
    "clocks.mem": "clock_memory_mhz",
    "clocks.max.sm": "clock_sm_max_mhz",
}
# Newer drivers call it "event", older ones "throttle"; each refuses the other name.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of NVML's clocks event reasons that mean "slower than it could be".
_THROTTLING = {
    0x4: "software power cap",
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def nvidia_smi(arguments: Sequence[str]) -> str | None:
    """Runs nvidia-smi; None where there is none or it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def describe_gpus(query: Query = nvidia_smi) -> list[dict[str, str]]:
    """Name, driver, clocks, power and throttling of each card now; empty where there is none."""
    rows = _table(query, list(_FIELDS))
    reasons = next((found for field in _REASONS if (found := _table(query, [field]))), [])
    gpus = []
    for index, row in enumerate(rows):
        gpu = {
            name: value
            for name, value in zip(_FIELDS.values(), row, strict=True)
            if value not in ("[N/A]", "[Not Supported]", "N/A")
        }
        if index < len(reasons):
            gpu["throttling"] = throttling(reasons[index][0])
        gpus.append(gpu)
    return gpus


def throttling(mask: str) -> str:
    """The reasons in NVML's bit mask for a lower clock, as text; "none" for a card that is not throttled."""
    try:
        bits = int(mask, 16)
    except ValueError:
        return f"unknown ({mask})"
    return ", ".join(name for bit, name in _THROTTLING.items() if bits & bit) or "none"


def power_draw(query: Query = nvidia_smi) -> float | None:
    """Watts of all cards together now."""
    try:
        watts = [float(row[0]) for row in _table(query, ["power.draw"])]
    except ValueError:
        return None
    return sum(watts) if watts else None


def process_memory(pid: int, query: Query = nvidia_smi) -> int | None:
    """Bytes of device memory that a process holds now."""
    text = query(["--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"])
    total = None
    for row in csv.reader(io.StringIO(text or ""), skipinitialspace=True):
        if len(row) == 2 and row[0] == str(pid) and row[1].isdigit():
            total = (total or 0) + int(row[1]) * (1 << 20)
    return total


def _table(query: Query, fields: Sequence[str]) -> list[list[str]]:
    text = query([f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"])
    rows = [row for row in csv.reader(io.StringIO(text or ""), skipinitialspace=True) if row]
    return [row for row in rows if len(row) == len(fields)]
