"""The number of threads: affinity, cores with two threads, and the CPU quota of control groups."""

from __future__ import annotations

import os
import sys

import pytest

from moebius_runtime.hardware import processors
from moebius_runtime.hardware.processors import cpu_quota, physical_cores


@pytest.fixture
def machine(tmp_path):
    """machine(group lines, mounts as (root, point, filesystem, options), {file: text}): /proc/self and the mounts."""

    def make(groups, mounts, files):
        lines = []
        for root, point, kind, options in mounts:
            place = str(tmp_path / point).replace(" ", "\\040")
            lines.append(f"30 25 0:26 {root} {place} rw shared:9 - {kind} {kind} {options}")
        (tmp_path / "cgroup").write_text("\n".join(groups) + "\n")
        (tmp_path / "mountinfo").write_text("\n".join(lines) + "\n")
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return make


V2 = [("/", "v2", "cgroup2", "rw,nsdelegate")]


@pytest.mark.parametrize(
    ("groups", "mounts", "files", "expected"),
    [
        (["0::/a/b"], V2, {"v2/a/b/cpu.max": "50000 100000"}, 0.5),
        (["0::/a/b"], V2, {"v2/a/b/cpu.max": "max 100000"}, None),
        (["0::/a/b"], V2, {"v2/a/b/cpu.max": "max 100000", "v2/a/cpu.max": "150000 100000"}, 1.5),  # an outer group
        (["0::/a/b"], V2, {"v2/a/b/cpu.max": "300000 100000", "v2/a/cpu.max": "25000 10000"}, 2.5),  # the least
        (["0::/"], V2, {"v2/cpu.max": "200000 100000"}, 2.0),  # a container with a namespace of its own
        (["0::/docker/x"], [("/docker/x", "v2", "cgroup2", "rw")], {"v2/cpu.max": "70000 100000"}, 0.7),
        (["0::/../other"], V2, {"v2/cpu.max": "80000 100000"}, 0.8),
        (["0::/elsewhere"], [("/docker/x", "v2", "cgroup2", "rw")], {"v2/cpu.max": "90000 100000"}, 0.9),
        (["0::/a b"], [("/", "with space", "cgroup2", "rw")], {"with space/a b/cpu.max": "100000 100000"}, 1.0),
        (
            ["3:cpu,cpuacct:/g", "1:name=systemd:/s"],
            [("/", "v1", "cgroup", "rw,cpu,cpuacct"), ("/", "s", "cgroup", "rw,xattr,name=systemd")],
            {"v1/g/cpu.cfs_quota_us": "250000", "v1/g/cpu.cfs_period_us": "100000"},
            2.5,
        ),
        (
            ["3:cpu:/g"],
            [("/", "v1", "cgroup", "rw,cpu")],
            {"v1/g/cpu.cfs_quota_us": "-1", "v1/g/cpu.cfs_period_us": "100000"},
            None,
        ),
        (  # cpuset and cpuacct are other controllers
            ["3:cpuset,cpuacct:/g"],
            [("/", "v1", "cgroup", "rw,cpuset,cpuacct")],
            {"v1/g/cpu.cfs_quota_us": "50000", "v1/g/cpu.cfs_period_us": "100000"},
            None,
        ),
        (  # both versions mounted, the CPU in version 1
            ["3:cpu:/g", "0::/h"],
            [("/", "v1", "cgroup", "rw,cpu"), ("/", "v2", "cgroup2", "rw")],
            {"v1/g/cpu.cfs_quota_us": "100000", "v1/g/cpu.cfs_period_us": "50000", "v2/h/cgroup.procs": ""},
            2.0,
        ),
        (["0::/a"], V2, {"v2/a/cpu.max": "0 100000"}, None),
        (["0::/a"], V2, {"v2/a/cpu.max": "5 0"}, None),
        (["0::/a"], V2, {"v2/a/cpu.max": "nonsense"}, None),
        (["nonsense", ""], [], {}, None),
    ],
)
def test_quota(machine, groups, mounts, files, expected):
    assert cpu_quota(machine(groups, mounts, files)) == expected


def test_no_such_files(tmp_path):
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize(("quota", "cores"), [(None, 4), (0.01, 1), (0.5, 1), (1.0, 1), (1.5, 2), (3.99, 4), (64.0, 4)])
def test_the_quota_limits_the_cores(monkeypatch, quota, cores):
    monkeypatch.setattr(processors, "cpu_quota", lambda: quota)
    monkeypatch.setattr(processors, "allowed_cpus", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert physical_cores() == cores


def test_a_system_without_affinity(monkeypatch):
    assert 1 <= physical_cores() <= (os.cpu_count() or 1)
    monkeypatch.setattr(processors, "cpu_quota", lambda: None)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert physical_cores() == 7


def test_cores_with_two_threads_count_once(monkeypatch, tmp_path):
    for cpu, siblings in {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}.items():
        (tmp_path / f"cpu{cpu}").write_text(f"{siblings}\n")

    def opened(path, **more):
        return (tmp_path / path.split("/")[5]).open(**more)

    monkeypatch.setattr(processors, "cpu_quota", lambda: None)
    monkeypatch.setattr(processors, "open", opened, raising=False)
    monkeypatch.setattr(processors, "allowed_cpus", lambda: {0, 1, 2, 3})
    assert physical_cores() == 2
    monkeypatch.setattr(processors, "allowed_cpus", lambda: {0, 2, 9})
    assert physical_cores() == 2  # CPU 9 has no such file: it counts as a core of its own
