"""The GPU of this machine, queried from NVIDIA's driver without any Python package.

The driver brings `libcuda`, whose functions are called through ctypes: CUDA driver API, "Initialization", "Version",
"Device Management" and "Memory Management". The driver's own version is not among them; it is read from where the
kernel module writes it, or from `nvidia-smi`.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from moebius_runtime.bundle.passport import Device
from moebius_runtime.errors import RuntimeUnavailableError

_NO_DEVICE = (34, 100)  # CUDA_ERROR_STUB_LIBRARY: the toolkit's stub of the driver; CUDA_ERROR_NO_DEVICE
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_KNOWN = {
    803: "the driver and its library are of different versions: restart the machine",
    804: "this card's driver needs the CUDA version it came with",
    999: "unknown error: often a driver that was updated without a restart",
}


def current_device(root: str | Path = "/") -> Device | None:
    """The first GPU that CUDA shows, or None where there is no driver or no GPU.

    Free memory is measured now, for which a CUDA context is opened and closed again.

    Args:
        root: of the file system in which the driver's version is looked up.

    Raises:
        RuntimeUnavailableError: the driver reports an error.
    """
    cuda = _library()
    if cuda is None:
        return None
    status = cuda.cuInit(0)
    if status in _NO_DEVICE:
        return None
    _check(status, "cuInit")
    count = ctypes.c_int()
    _check(cuda.cuDeviceGetCount(ctypes.byref(count)), "cuDeviceGetCount")
    if count.value < 1:
        return None
    handle, version = ctypes.c_int(), ctypes.c_int()
    _check(cuda.cuDeviceGet(ctypes.byref(handle), 0), "cuDeviceGet")
    _check(cuda.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
    name = ctypes.create_string_buffer(256)
    _check(cuda.cuDeviceGetName(name, len(name), handle), "cuDeviceGetName")
    major, minor = (_attribute(cuda, attribute, handle) for attribute in (_MAJOR, _MINOR))
    free, total = _memory(cuda, handle)
    cuda_version = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return Device(
        name=name.value.decode(errors="replace"),
        sm=10 * major + minor,
        driver=driver_version(root) or f"with CUDA {cuda_version}",
        cuda=cuda_version,
        total_memory=total,
        free_memory=free,
    )


def driver_version(root: str | Path = "/") -> str | None:
    """The driver's version, such as "550.54.14", or on some Jetsons "L4T 36.4.0"; None if it is unknown."""
    for path, pattern in (
        ("proc/driver/nvidia/version", r"NVRM version:.*?\s(\d+\.\d+(?:\.\d+)?)\s"),
        ("sys/module/nvidia/version", r"^(\d+\.\d+(?:\.\d+)?)"),
    ):
        if found := re.search(pattern, _text(Path(root) / path)):
            return found[1]
    program = shutil.which("nvidia-smi")
    if program is not None and str(root) == "/":
        command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            output = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
        except (OSError, subprocess.SubprocessError):
            output = ""
        if found := re.match(r"\s*(\d+\.\d+(?:\.\d+)?)\s*$", output.partition("\n")[0]):
            return found[1]
    # "# R36 (release), REVISION: 4.0, GCID: ...": the driver is part of the release
    if found := re.search(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(Path(root) / "etc/nv_tegra_release")):
        return f"L4T {found[1]}.{found[2]}"
    return None


def _library() -> Any | None:
    """The driver's library, or None where there is no driver."""
    try:
        if sys.platform == "win32":
            return ctypes.WinDLL("nvcuda.dll")
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def _attribute(cuda: Any, attribute: int, handle: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle), "cuDeviceGetAttribute")
    return value.value


def _memory(cuda: Any, handle: ctypes.c_int) -> tuple[int, int]:
    """Free and total memory in bytes."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    _check(cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle), "cuDevicePrimaryCtxRetain")
    try:
        _check(cuda.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
        _check(cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "cuMemGetInfo")
        _check(cuda.cuCtxPopCurrent_v2(ctypes.byref(context)), "cuCtxPopCurrent")
    finally:
        cuda.cuDevicePrimaryCtxRelease_v2(handle)
    return free.value, total.value


def _check(status: int, function: str) -> None:
    if status:
        words = _KNOWN.get(status, "see NVIDIA's list of CUresult")
        raise RuntimeUnavailableError(
            f"the GPU's driver refuses {function} with CUDA error {status} ({words}); run `nvidia-smi` for details, or "
            "restart the machine"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[:4096]
    except OSError:
        return ""
