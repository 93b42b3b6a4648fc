"""Compatibility of versions, from NVIDIA's documentation as of November 2026.

Sources: TensorRT 11.4.1 support matrix and its page on Jetson, TensorRT prerequisites (10.x, 11.2, 11.4), TensorRT-RTX
support matrix and the wheel of 1.7.1, "Minor Version Compatibility" of the CUDA compatibility guide, the release notes
of Jetson Linux and JetPack.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Version = tuple[int, ...]

LEAST_TENSORRT: Version = (10, 3)  # the first that this project supports
LEAST_SM = 75  # Turing: the oldest GPU of TensorRT since 10.5 and of TensorRT-RTX
RTX_SM = (75, 80, 86, 89, 120, 121)
RTX_MACHINES = ("x86_64", "AMD64")
# The first TensorRT that supports a compute capability, where that is later than `LEAST_TENSORRT`.
FIRST_TENSORRT_OF_SM: dict[int, Version] = {100: (10, 8), 120: (10, 8)}
# The first driver on which libraries of a CUDA major version run.
LEAST_DRIVER = {12: 525, 13: 580}
LEAST_DRIVER_TENSORRT_11 = 535
# Approximate size of a full-size bundle with its engines, and memory of a build.
DISK_WANTED = 4 << 30
MEMORY_WANTED = 4 << 30

JETSON_SM = {"Xavier": 72, "Orin": 87, "Thor": 110}


@dataclass(frozen=True)
class JetPack:
    """A release of NVIDIA's software for Jetson, with the versions that it ships."""

    name: str
    tensorrt: str
    python: str
    cuda: str
    supported: bool
    takes_tensorrt_11: bool = False


_JETPACKS: tuple[tuple[Version, JetPack], ...] = (  # by the first L4T release, newest first
    ((38,), JetPack("JetPack 7", "10.13 or later", "3.12", "13", True, takes_tensorrt_11=True)),  # 11 since 7.2.2
    ((36, 4), JetPack("JetPack 6.1 or 6.2", "10.3", "3.10", "12.6", True)),
    ((36,), JetPack("JetPack 6.0", "8.6", "3.10", "12.2", False)),
    ((35,), JetPack("JetPack 5", "8.5", "3.8", "11.4", False)),
    ((32,), JetPack("JetPack 4", "8.2", "3.6", "10.2", False)),
)


def version_of(text: str | None) -> Version:
    """Parses the leading numbers of a version: `10.3.0.30-1+cuda12.5` gives (10, 3, 0, 30). Empty if there are none."""
    match = re.match(r"\d+(\.\d+)*", text or "")
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def jetpack_of(l4t: str | None) -> JetPack | None:
    """The JetPack of a release of Jetson Linux such as `36.4.3`; None if it is unknown."""
    release = version_of(l4t)
    return next((jetpack for first, jetpack in _JETPACKS if release and release >= first), None)


def jetson_sm(board: str | None) -> int | None:
    """The compute capability of a Jetson, by the board name in its device tree; None if it is unknown."""
    return next((sm for name, sm in JETSON_SM.items() if name in (board or "")), None)


def driver_problem(driver: str | None, cuda_major: int | None, what: str) -> str | None:
    """Why a driver is too old for a library built for a CUDA major version; None if it is not, or is unknown."""
    least = LEAST_DRIVER.get(cuda_major or 0)
    found = version_of(driver)
    if least is None or not found or found[0] >= least:
        return None
    return f"{what} is made for CUDA {cuda_major}, which needs driver {least} or later; found {driver}"


def tensorrt_problem(version: str, sm: int | None, driver: str | None, jetpack: JetPack | None) -> str | None:
    """Why a TensorRT version does not support this device; None if no reason is known."""
    found = version_of(version)
    if found < LEAST_TENSORRT:
        return f"TensorRT {version} is older than {dotted(LEAST_TENSORRT)}, the first that supports the graphs"
    if jetpack is not None and found[0] >= 11 and not jetpack.takes_tensorrt_11:
        return f"TensorRT {version} does not run on {jetpack.name}, which ships {jetpack.tensorrt}"
    if sm is not None and sm < LEAST_SM:
        return f"SM {sm} is older than SM {LEAST_SM}, the oldest that TensorRT supports"
    first = FIRST_TENSORRT_OF_SM.get(sm or 0)
    if first is not None and found < first:
        return f"TensorRT {version} does not support SM {sm}; {dotted(first)} is the first that does"
    here = version_of(driver)
    if found[0] >= 11 and here and here[0] < LEAST_DRIVER_TENSORRT_11:
        return f"TensorRT {version} needs driver {LEAST_DRIVER_TENSORRT_11} or later; found {driver}"
    return None


def rtx_problem(machine: str, sm: int | None) -> str | None:
    """Why TensorRT-RTX cannot run on this device; None if it can."""
    if machine not in RTX_MACHINES:
        return f"TensorRT-RTX is made for x86-64 only; this machine is {machine}"
    if sm is not None and sm not in RTX_SM:
        return f"TensorRT-RTX does not support SM {sm}; it supports {', '.join(map(str, RTX_SM))}"
    return None


def dotted(version: Version) -> str:
    """(10, 3) as `10.3`."""
    return ".".join(map(str, version))
