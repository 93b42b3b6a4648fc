"""Checks the GPU and its driver, as CUDA, nvidia-smi and the kernel report them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moebius_export.doctor import facts
from moebius_export.doctor.host import gib
from moebius_export.doctor.rows import Row, Verdict
from moebius_export.doctor.sources import Sources
from moebius_runtime.bundle.passport import Device
from moebius_runtime.hardware.devices import driver_version
from moebius_runtime.hardware.host import read_text
from moebius_runtime.hardware.jetson import is_jetson
from moebius_runtime.hardware.nvidia import describe_gpus

_DISPLAY = "0x03"  # PCI class of display controllers
_NVIDIA = "0x10de"


@dataclass(frozen=True)
class Gpu:
    """The GPU of this machine. Only `device`, which CUDA reports, can run anything.

    Attributes:
        device: from the driver's own library; None if there is no GPU or it does not work.
        name: from CUDA, nvidia-smi or the board.
        sm: 86 for compute capability 8.6.
        driver: version of the kernel driver.
        reason: why `device` is None.
    """

    device: Device | None
    name: str | None
    sm: int | None
    driver: str | None
    reason: str | None


def find_gpu(sources: Sources) -> Gpu:
    """Finds the GPU from CUDA, nvidia-smi, the kernel and the device tree."""
    seen = next(iter(describe_gpus(sources.smi)), {})
    board = read_text(sources.root / "proc/device-tree/model") if is_jetson(sources.root) else None
    driver = driver_version(sources.root) or seen.get("driver")
    answer = sources.ask("device")
    device = Device(**answer.value) if isinstance(answer.value, dict) else None
    if device is not None:
        return Gpu(device, device.name, device.sm, device.driver, None)
    there = driver or board or seen
    reason = (answer.problem or "CUDA finds none") if there else "no NVIDIA driver is loaded"
    capability = (sources.smi(["--query-gpu=compute_cap", "--format=csv,noheader"]) or "").splitlines()
    match = re.fullmatch(r"(\d+)\.(\d)", capability[0].strip()) if capability else None
    sm = int(match[1]) * 10 + int(match[2]) if match else facts.jetson_sm(board)
    return Gpu(None, seen.get("name") or board, sm, driver, reason)


def gpu_rows(sources: Sources, gpu: Gpu) -> list[Row]:
    """Rows of the driver and the GPU, with the reason if CUDA does not reach a GPU that is there."""
    return [_driver_row(sources, gpu), _gpu_row(gpu)]


def nvidia_on_pci(sources: Sources) -> bool:
    """Whether an NVIDIA display controller is on the PCI bus, with or without a driver."""
    folders = (sources.root / "sys/bus/pci/devices").glob("*")
    return any(
        read_text(folder / "vendor") == _NVIDIA and (read_text(folder / "class") or "").startswith(_DISPLAY)
        for folder in folders
    )


def _driver_row(sources: Sources, gpu: Gpu) -> Row:
    if gpu.driver is not None:
        return Row("driver", f"NVIDIA {gpu.driver}")
    ran = sources.run(["nvidia-smi", "-L"])
    if ran is not None and ran.code != 0:
        reason = " ".join(ran.text.split())[:200]
        return Row(
            "driver",
            f"nvidia-smi is installed and fails: {reason}",
            Verdict.wrong,
            "reboot after a driver update, else install the driver again; in a container, start it with --gpus all",
        )
    if nvidia_on_pci(sources):
        return Row(
            "driver",
            "none is loaded, but an NVIDIA GPU is on the PCI bus",
            Verdict.wrong,
            "install NVIDIA's driver 580 or later; in a container, start it with --gpus all",
        )
    return Row("driver", "no NVIDIA driver", Verdict.missing, "needed only for a GPU; --runtime ort-cpu needs none")


def _gpu_row(gpu: Gpu) -> Row:
    if gpu.device is not None:
        device = gpu.device
        memory = f"{gib(device.free_memory)} free of {gib(device.total_memory)}"
        return Row("gpu", f"{device.name}, SM {device.sm}, {memory}, CUDA {device.cuda}")
    if gpu.name is None:
        return Row("gpu", f"none: {gpu.reason}", Verdict.missing)
    sm = f"SM {gpu.sm}" if gpu.sm else "SM unknown"
    return Row("gpu", f"{gpu.name}, {sm}, but not through CUDA: {gpu.reason}", Verdict.wrong, _REACH)


_REACH = (
    "check that CUDA_VISIBLE_DEVICES does not hide it; start a container with --gpus all (on a Jetson --runtime nvidia "
    "--group-add video)"
)
