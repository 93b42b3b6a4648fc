"""Machines to play back. Where a text was recorded is said beside it."""

from __future__ import annotations

from pathlib import Path

from moebius_export.doctor.sources import Answer, Ran, Sources

# /proc/cpuinfo of an Orin Nano under Jetson Linux 36, as published in bug reports; one of its six cores.
ORIN_CPUINFO = (
    "processor\t: 0\nBogoMIPS\t: 62.50\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp "
    "cpuid asimdrdm lrcpc dcpop asimddp uscat ilrcpc flagm paca pacg\nCPU implementer\t: 0x41\n"
    "CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: 0xd42\nCPU revision\t: 1\n\n"
)
# The head of /proc/cpuinfo of the machine that these tests were written on, its flags shortened.
EPYC_CPUINFO = (
    "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\ncpu MHz\t\t: 2596.128\ncpu cores\t: 2\n"
    "flags\t\t: fpu sse sse2 ht fma sse4_2 avx f16c avx2 avx512f avx512dq avx512bw avx512_bf16 avx512_vnni\n\n"
)
# The first line of /etc/nv_tegra_release, as JetPack 6.0, 6.1, 6.2 and 6.2.1 have it: from issue reports on GitHub.
TEGRA = {
    "36.3.0": "# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic, EABI: aarch64, "
    "DATE: Fri Jul 19 23:24:25 UTC 2024\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    "36.4.0": "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic, EABI: aarch64, "
    "DATE: Fri Sep 13 04:36:44 UTC 2024\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    "36.4.7": "# R36 (release), REVISION: 4.7, GCID: 42132812, BOARD: generic, EABI: aarch64, "
    "DATE: Thu Sep 18 22:54:44 UTC 2025\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
    "36.5.0": "# R36 (release), REVISION: 5.0, GCID: 43688277, BOARD: generic, EABI: aarch64, "
    "DATE: Fri Jan 16 03:50:45 UTC 2026\n# KERNEL_VARIANT: oot\nTARGET_USERSPACE_LIB_DIR=nvidia\n",
}
# /proc/driver/nvidia/version: of a Jetson with JetPack 6, the proprietary module, the open one, and SUSE's open one.
DRIVERS = {
    "540.4.0": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build  "
    "(buildbrain@mobile-u64-6336-d8000)  Tue Jan  7 17:35:12 PST 2025\n"
    "GCC version:  collect2: error: ld returned 1 exit status\n",
    "535.129.03": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n",
    "580.173.02": "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.173.02  Release Build\n",
    "390.48": "NVRM version: NVIDIA UNIX x86_64 Kernel Module 390.48 Thu Mar 22 00:42:57 PDT 2018\n",
}


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def answers(**values):
    """An `ask` of a machine where only what is named is installed; a string is what its import fails with."""

    def ask(name):
        if name not in values:
            if name == "kernels":
                return Answer({"words": "none (not built)"})
            if name == "device":
                return Answer(None)
            return Answer(problem=f"No module named '{name}'", missing=True)
        value = values[name]
        return Answer(problem=value) if isinstance(value, str) else Answer(value)

    return ask


def smi(name="NVIDIA GeForce RTX 4070", capability="8.9", driver="580.173.02"):
    """nvidia-smi of one card: it answers the fields that it knows, and refuses others with exit code 2."""
    known = {"name": name, "compute_cap": capability, "driver_version": driver, "memory.total": "12282"}
    others = ("index", "memory.used", "pstate", "temperature.gpu", "power.draw", "power.limit", "clocks.sm")
    known |= dict.fromkeys((*others, "clocks.mem", "clocks.max.sm", "clocks_event_reasons.active"), "[N/A]")

    def run(arguments):
        if arguments[0] != "nvidia-smi":
            return None
        if arguments[1] == "-L":
            return Ran(0, f"GPU 0: {name} (UUID: GPU-0)\n")
        fields = arguments[1].removeprefix("--query-gpu=").split(",")
        if any(field not in known for field in fields):
            return Ran(2, "Field is not a valid field to query.\n")
        return Ran(0, ", ".join(known[field] for field in fields) + "\n")

    return run


def device(name="NVIDIA GeForce RTX 4070", sm=89, driver="580.173.02", cuda="13.0"):
    return {
        "name": name,
        "sm": sm,
        "driver": driver,
        "cuda": cuda,
        "total_memory": 12 << 30,
        "free_memory": 11 << 30,
    }


ORT = {"version": "1.27.0", "providers": ["CPUExecutionProvider"]}
ORT_GPU = {
    "version": "1.27.0",
    "providers": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
}
TORCH = {"version": "2.13.0", "cuda": "13.0", "gpu": True, "lacking": []}


def machine(root: Path, **options) -> Sources:
    """A server with nothing on it but what the options say."""
    if not (root / "proc").exists():
        meminfo = "MemTotal:       24650944 kB\nMemFree:  1000 kB\nMemAvailable:   20325472 kB\nSwapTotal: 0 kB\n"
        write(root, {"proc/cpuinfo": EPYC_CPUINFO, "proc/meminfo": meminfo})
    options = {"run": lambda arguments: None, "ask": answers(), "free_disk": lambda path: 50 << 30} | options
    return Sources(root=root, **{"machine": "x86_64", "python": (3, 12)} | options)


def orin(root: Path, l4t: str = "36.4.7", **options) -> Sources:
    """An Orin Nano of 8 GB."""
    write(
        root,
        {
            "proc/cpuinfo": ORIN_CPUINFO,
            "proc/meminfo": "MemTotal:        7803904 kB\nMemFree: 87040 kB\nMemAvailable:    5816128 kB\n"
            "SwapTotal:       3901952 kB\n",
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\x00",
            "etc/nv_tegra_release": TEGRA[l4t],
            "proc/driver/nvidia/version": DRIVERS["540.4.0"],
            "var/lib/nvpmodel/status": "pmode:0002\n",
        },
    )
    return machine(root, **{"machine": "aarch64", "python": (3, 10)} | options)
