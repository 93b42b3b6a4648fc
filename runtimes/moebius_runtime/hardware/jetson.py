"""NVIDIA Jetson boards: power mode, pinned clocks, and the power sensors on the board.

Paths are those of JetPack 5 and 6. Every reader takes the root of the file tree.
"""

from __future__ import annotations

import re
from pathlib import Path

from moebius_runtime.hardware.host import read_text

# Rails of the board's INA3221 sensors whose sum is what the module draws. VDD_IN is the whole module (Orin Nano and
# NX); the AGX Orin has no such rail, but three that make it up.
_WHOLE = (("VDD_IN",), ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"))
_SENSORS = ("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*", "sys/bus/i2c/devices/*/hwmon/hwmon*")


def is_jetson(root: Path = Path("/")) -> bool:
    """Whether the device tree names a Jetson, or a Tegra release is installed."""
    return "Jetson" in (read_text(root / "proc/device-tree/model") or "") or (root / "etc/nv_tegra_release").exists()


def describe_jetson(root: Path = Path("/")) -> dict[str, str]:
    """Release, power mode and clocks of a Jetson; empty on any other machine."""
    if not is_jetson(root):
        return {}
    facts = {
        "jetson_release": f"L4T {release}" if (release := l4t_release(root)) else "",
        "nvpmodel": _power_mode(root),
        "jetson_clocks": _pinned_clocks(root),
        "power_rails": ", ".join(read_rails(root)) or "none readable",
    }
    return {name: value for name, value in facts.items() if value}


def read_rails(root: Path = Path("/")) -> dict[str, float]:
    """Watts on every labelled rail of the board's INA3221 sensors now: millivolts times milliamperes."""
    rails: dict[str, float] = {}
    folders = {folder.resolve() for pattern in _SENSORS for folder in root.glob(pattern)}
    for folder in sorted(folders):
        if read_text(folder / "name") != "ina3221":
            continue
        for label in sorted(folder.glob("in[0-9]*_label")):
            name, channel = read_text(label), label.name[2 : -len("_label")]
            volts, amperes = _number(folder / f"in{channel}_input"), _number(folder / f"curr{channel}_input")
            if name and name != "NC" and volts is not None and amperes is not None:
                rails[name] = volts * amperes * 1e-6
    return rails


def total_power(root: Path = Path("/")) -> float | None:
    """Watts that the module draws now; None where its rails are not known to add up to the whole."""
    rails = read_rails(root)
    for names in _WHOLE:
        if all(name in rails for name in names):
            return sum(rails[name] for name in names)
    return None


def l4t_release(root: Path = Path("/")) -> str | None:
    """The release of Jetson Linux, such as `36.4.3`; None where none is noted."""
    text = read_text(root / "etc/nv_tegra_release") or ""
    match = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return f"{match[1]}.{match[2]}" if match else None


def _power_mode(root: Path) -> str | None:
    """The mode that nvpmodel noted, with its name from nvpmodel's configuration."""
    status = re.search(r"pmode:0*(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    names = dict(
        re.findall(r"<\s*POWER_MODEL\s+ID=(\d+)\s+NAME=(\S+)\s*>", read_text(root / "etc/nvpmodel.conf") or "")
    )
    return f"{status[1]} ({names[status[1]]})" if status[1] in names else status[1]


def _pinned_clocks(root: Path) -> str | None:
    """Whether `jetson_clocks` holds the clocks up: least and greatest frequency are one, for every core and the GPU."""
    cpus = list((root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq"))
    gpus = [
        folder for folder in (root / "sys/class/devfreq").glob("*") if re.search(r"\.(gpu|ga10b|gv11b)$", folder.name)
    ]
    ranges = [(f / "scaling_min_freq", f / "scaling_max_freq") for f in cpus]
    ranges += [(f / "min_freq", f / "max_freq") for f in gpus]
    values = [(_number(low), _number(high)) for low, high in ranges]
    if not values or any(low is None or high is None for low, high in values):
        return None
    pinned = sum(low == high for low, high in values)
    if pinned == len(values):
        return "on"
    return "off" if pinned == 0 else f"partly: {pinned} of {len(values)} clocks are pinned"


def _number(path: Path) -> float | None:
    try:
        return float(read_text(path) or "")
    except ValueError:
        return None
