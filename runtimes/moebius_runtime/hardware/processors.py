"""The number of physical cores that this process may use, within the CPU quota of its container."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_PROC = Path("/proc/self")


def physical_cores() -> int:
    """Physical cores that this process may use, at least 1, and no more than its control groups grant.

    Logical processors count once per core where Linux reports it, else all. A quota is rounded up: 1.5 CPUs are 2.
    """
    quota = cpu_quota()
    cores = _allowed_cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def cpu_quota(proc: Path = _PROC) -> float | None:
    """CPUs that the control groups of this process grant: the least along every path to a root; None without a quota.

    Reads version 1 (`cpu.cfs_quota_us`) and version 2 (`cpu.max`), see cgroups(7) and the kernel's cgroup-v2.rst.

    Args:
        proc: the folder with `cgroup` and `mountinfo` of the process.
    """
    try:
        groups = (proc / "cgroup").read_text(errors="surrogateescape").splitlines()
        mounts = (proc / "mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return None
    granted = [
        quota
        for root, point, version in _hierarchies(mounts)
        for folder in _folders(_group(groups, version), root, point)
        if (quota := _quota(folder, version)) is not None
    ]
    return min(granted, default=None)


def _hierarchies(mounts: list[str]) -> Iterator[tuple[PurePosixPath, Path, int]]:
    """(root within the hierarchy, mount point, cgroup version) of every mount that can limit CPU time."""
    for line in mounts:
        before, _, after = line.partition(" - ")
        fields, filesystem = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(filesystem) < 3:
            continue
        version = 2 if filesystem[0] == "cgroup2" else 1 if filesystem[0] == "cgroup" else 0
        if version == 2 or (version == 1 and "cpu" in filesystem[2].split(",")):
            yield PurePosixPath(_unescaped(fields[3])), Path(_unescaped(fields[4])), version


def _group(groups: list[str], version: int) -> PurePosixPath | None:
    """The path of this process's group, of lines `number:controllers:path`."""
    for line in groups:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (number == "0" and not controllers) if version == 2 else "cpu" in controllers.split(","):
            return PurePosixPath(path)
    return None


def _folders(group: PurePosixPath | None, root: PurePosixPath, point: Path) -> list[Path]:
    """The folder of a group and of each one around it, up to the mount point.

    A container can see its group's path as the host does, and only that group mounted: then the mount point is it.
    """
    if group is None:
        return []
    inside = group.relative_to(root) if group.is_relative_to(root) else PurePosixPath(".")
    if ".." in inside.parts:
        return [point]
    return [point / part for part in (inside, *inside.parents)]


def _quota(folder: Path, version: int) -> float | None:
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{what}_us").read_text() for what in ("quota", "period"))
        granted = int(quota) / int(period)  # ValueError where the quota is "max"
    except (OSError, ValueError, ZeroDivisionError):
        return None
    return granted if granted > 0 else None  # version 1 writes -1 for "no quota"


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def allowed_cpus() -> set[int] | None:
    """The CPUs on which this process may run; None where the system knows no such limit (all but Linux)."""
    if sys.platform != "linux":
        return None
    return os.sched_getaffinity(0)  # noqa: TID251


def _allowed_cores() -> int:
    allowed = allowed_cpus()
    if allowed is None:
        return os.cpu_count() or 1
    cores = set()
    for cpu in allowed:
        try:
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", encoding="ascii") as stream:
                cores.add(stream.read().strip())
        except OSError:
            cores.add(str(cpu))
    return len(cores) or 1
