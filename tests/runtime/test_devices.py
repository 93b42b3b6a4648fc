"""The GPU as the driver describes it; the driver here is a stand-in with the functions of CUDA's driver API."""

from __future__ import annotations

import ctypes

import pytest

from moebius_runtime.errors import RuntimeUnavailableError
from moebius_runtime.hardware import devices


class Driver:
    """One GPU, or none."""

    def __init__(self, init=0, count=1, memory=0):
        self.init, self.count, self.memory = init, count, memory
        self.retained = 0

    def cuInit(self, flags):  # noqa: N802
        return self.init

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, handle, index):  # noqa: N802
        handle._obj.value = index
        return 0

    def cuDriverGetVersion(self, version):  # noqa: N802
        version._obj.value = 12060
        return 0

    def cuDeviceGetName(self, name, length, handle):  # noqa: N802
        ctypes.memmove(name, b"Orin\0", 5)
        return 0

    def cuDeviceGetAttribute(self, value, attribute, handle):  # noqa: N802
        value._obj.value = {75: 8, 76: 7}[attribute]
        return 0

    def cuDevicePrimaryCtxRetain(self, context, handle):  # noqa: N802
        self.retained += 1
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, handle):  # noqa: N802
        self.retained -= 1
        return 0

    def cuCtxPushCurrent_v2(self, context):  # noqa: N802
        return 0

    def cuCtxPopCurrent_v2(self, context):  # noqa: N802
        return 0

    def cuMemGetInfo_v2(self, free, total):  # noqa: N802
        free._obj.value, total._obj.value = 5 << 30, 8 << 30
        return self.memory


# The first line of /proc/driver/nvidia/version, of a desktop and of a Jetson with JetPack 6.
DESKTOP = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\nGCC version:\n"
JETSON = "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  (buildbrain)\n"


def put(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_gpu_that_is_here(monkeypatch, tmp_path):
    driver = Driver()
    monkeypatch.setattr(devices, "_library", lambda: driver)
    put(tmp_path, "proc/driver/nvidia/version", JETSON)
    found = devices.current_device(tmp_path)
    assert found == devices.Device("Orin", 87, "540.4.0", "12.6", 8 << 30, 5 << 30)
    assert driver.retained == 0


@pytest.mark.parametrize("driver", [None, Driver(init=100), Driver(init=34), Driver(count=0)])
def test_no_gpu(driver, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_library", lambda: driver)
    assert devices.current_device(tmp_path) is None


@pytest.mark.parametrize(
    ("driver", "words"), [(Driver(init=803), "restart the machine"), (Driver(memory=2), "error 2")]
)
def test_a_driver_that_refuses_is_no_missing_gpu(driver, words, monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_library", lambda: driver)
    with pytest.raises(RuntimeUnavailableError, match=words):
        devices.current_device(tmp_path)
    assert driver.retained == 0


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("proc/driver/nvidia/version", DESKTOP, "550.54.14"),
        ("proc/driver/nvidia/version", JETSON, "540.4.0"),
        ("sys/module/nvidia/version", "580.95.05\n", "580.95.05"),
        ("etc/nv_tegra_release", "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic\n", "L4T 36.4.0"),
        ("etc/other", "", None),
    ],
)
def test_the_drivers_version(name, text, version, tmp_path):
    put(tmp_path, name, text)
    assert devices.driver_version(tmp_path) == version


def test_without_a_version_the_drivers_cuda_stands_for_it(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_library", Driver)
    assert devices.current_device(tmp_path).driver == "with CUDA 12.6"


def test_this_machine():
    """Whatever it has: a whole description, or none."""
    found = devices.current_device()
    assert found is None or (found.sm >= 50 and 0 < found.free_memory <= found.total_memory)
