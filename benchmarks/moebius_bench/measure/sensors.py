"""Which sensors this machine offers while a worker runs."""

from __future__ import annotations

from pathlib import Path

from moebius_bench.measure.processes import Sensors
from moebius_runtime.hardware import jetson, nvidia


def find_sensors(root: Path = Path("/"), query: nvidia.Query = nvidia.nvidia_smi) -> Sensors:
    """The board's own power sensors on a Jetson, the cards' elsewhere, none on a machine with neither."""
    if jetson.is_jetson(root):
        if jetson.total_power(root) is not None:
            rails = ", ".join(jetson.read_rails(root))
            return Sensors(lambda: jetson.total_power(root), f"the board's INA3221 ({rails})")
        return Sensors()
    if query(["-L"]) is None:
        return Sensors()
    power = (lambda: nvidia.power_draw(query)) if nvidia.power_draw(query) is not None else None
    return Sensors(power, "nvidia-smi (the cards alone)", lambda pid: nvidia.process_memory(pid, query))
