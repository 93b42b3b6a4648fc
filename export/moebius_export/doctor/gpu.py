"""Rows of the GPU and its driver, as CUDA, nvidia-smi and the kernel see them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from moebius_export.doctor import facts
from moebius_export.doctor.host import gib
from moebius_export.doctor.rows import Row, Verdict
from moebius_export.doctor.sources import Sources
from moebius_runtime.bundle.passport import Device
from moebius_runtime.hardware.host import read_text
from moebius_runtime.hardware.jetson import is_jetson
from moebius_runtime.hardware.nvidia import describe_gpus

_DISPLAY = "0x03"  # PCI class of display controllers
_NVIDIA = "0x10de"


@dataclass(frozen=True)
class Gpu:
    """What is known of the GPU. `device` is what CUDA sees, and only that can run anything.

    Attributes:
        device: through the driver's own library; None where there is no GPU or it does not work.
        name: by CUDA, nvidia-smi or the board.
        sm: 86 for compute capability 8.6.
        driver: version of the kernel's driver.
        reason: why `device` is None.
    """

    device: Device | None
    name: str | None
    sm: int | None
    driver: str | None
    reason: str | None


def look_at_gpu(sources: Sources) -> Gpu:
    """Puts together what each source tells."""
    seen = next(iter(describe_gpus(sources.smi)), {})
    board = read_text(sources.root / "proc/device-tree/model") if is_jetson(sources.root) else None
    driver = kernel_driver(read_text(sources.root / "proc/driver/nvidia/version") or "") or seen.get("driver")
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
    """Driver and GPU, and what keeps CUDA from the GPU where there is one that it does not see."""
    return [_driver_row(sources, gpu), _gpu_row(gpu)]


def kernel_driver(text: str) -> str | None:
    """The version in /proc/driver/nvidia/version, which names it behind "Kernel Module", with "for ARCH" at times."""
    match = re.search(r"Kernel Module\s+(?:for \S+\s+)?(\d+(?:\.\d+)+)", text)
    return match[1] if match else None


def nvidia_on_pci(sources: Sources) -> bool:
    """Whether a display controller of NVIDIA's is on the PCI bus, with or without a driver."""
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
        said = " ".join(ran.text.split())[:200]
        return Row(
            "driver",
            f"nvidia-smi is here and fails: {said}",
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
    return Row("driver", "no NVIDIA driver", Verdict.missing, "needed for a GPU only; --runtime ort-cpu does without")


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
