"""Validates build options against the library and the device. Each refusal gives the reason and an alternative."""

from __future__ import annotations

from collections.abc import Callable

from moebius_export.trt.library import Library
from moebius_export.trt.options import COMPATIBILITIES, BuildOptions
from moebius_runtime.bundle.passport import Device
from moebius_runtime.errors import InputError, RuntimeUnavailableError

LEVELS = {"none": "NONE", "ampere+": "AMPERE_PLUS", "same-cc": "SAME_COMPUTE_CAPABILITY"}
# GPUs that TensorRT-RTX does not support, by its support matrix (it has GeForce and RTX cards from Turing on).
_NOT_RTX = {
    70: "Volta",
    72: "Xavier",
    87: "Jetson Orin: build on it with JetPack's TensorRT, --backend tensorrt",
    90: "Hopper: build on it with TensorRT, --backend tensorrt",
    100: "data-centre Blackwell: build on it with TensorRT, --backend tensorrt",
    101: "Jetson Thor: build on it with JetPack's TensorRT, --backend tensorrt",
    103: "data-centre Blackwell: build on it with TensorRT, --backend tensorrt",
    110: "Jetson Thor: build on it with JetPack's TensorRT, --backend tensorrt",
}


def check_options(
    options: BuildOptions, library: Library, device: Device | None, note: Callable[[str], None]
) -> tuple[int, ...]:
    """Validates the options and returns the compute capabilities to build for.

    Args:
        options: the user's options.
        library: the TensorRT that builds.
        device: the GPU of this machine, if any.
        note: called with a line for each option that has no effect or a side effect.

    Raises:
        InputError: the library does not support an option, or the targets do not.
        RuntimeUnavailableError: a GPU is needed and there is none.
    """
    targets = _targets(options, library, device)
    tuning, where = options.tuning, f"{library.backend} {library.version}"
    if options.precision == "bf16" and min(targets) < 80:
        raise InputError(f"--bf16: SM {min(targets)} has no bfloat16, which begins with Ampere (SM 80); use --fp16")
    if options.precision == "fp8" and min(targets) < 89:
        raise InputError(f"--fp8: SM {min(targets)} has no FP8, which begins with Ada (SM 89); use --int8 or --fp16")
    if tuning.opt_level is not None and not 0 <= tuning.opt_level <= 5:
        raise InputError(f"--opt-level {tuning.opt_level}: expected 0 (quick build) to 5 (longest search)")
    level = tuning.hardware_compatibility
    if level not in COMPATIBILITIES:
        raise InputError(f"--hardware-compatibility {level}: expected one of {', '.join(COMPATIBILITIES)}")
    rtx = library.backend == "tensorrt-rtx"
    if level != "none":
        if rtx:
            raise InputError(
                f"--hardware-compatibility {level}: tensorrt-rtx cannot build such engines; name every GPU with --sm"
            )
        if library.level(LEVELS[level]) is None:
            raise InputError(
                f"--hardware-compatibility {level}: {where} does not support it; it came with TensorRT 10.9"
            )
        if level == "ampere+" and min(targets) < 80:
            raise InputError(f"--hardware-compatibility ampere+: SM {min(targets)} is older than Ampere (SM 80)")
    if tuning.version_compatible and (rtx or library.flag("VERSION_COMPATIBLE") is None):
        raise InputError(
            f"--version-compatible: {where} cannot build such engines, they load only in the version that built them; "
            "leave it out, and build again after an update"
        )
    if tuning.strip_weights and rtx and device is None:
        raise InputError(
            "--strip-weights: tensorrt-rtx strips weights only on a machine with a GPU, for which it compiles; leave "
            "it out"
        )
    if tuning.strip_weights:
        note(
            "--strip-weights: these engines contain no weights. Each load must first refit them from the bundle's ONNX "
            "files, which takes seconds and as much memory as the weights. The build needs as much memory as without"
        )
    if tuning.timing_cache is not None and rtx:
        note("--timing-cache: tensorrt-rtx times no kernels during a build, so the file is neither read nor written")
    if tuning.tf32 and max(targets) < 80:
        note(f"--tf32 has no effect: SM {max(targets)} has no TF32, which begins with Ampere (SM 80)")
    if not library.has_monitor:
        note(f"{where} does not report the progress of a build, and a running build cannot be interrupted")
    return targets


def _targets(options: BuildOptions, library: Library, device: Device | None) -> tuple[int, ...]:
    where = f"{library.backend} {library.version}"
    if options.sms and not library.names_targets:
        here = f"SM {device.sm}, {device.name}" if device else "none was found"
        raise InputError(
            f"--sm {_listed(options.sms)}: {where} builds for the GPU of this machine only ({here}); leave --sm out "
            "and build on each device, or use --backend tensorrt-rtx"
        )
    wanted = options.sms or ((device.sm,) if device else ())
    if not wanted:
        what = "name the GPUs to build for, such as --sm 86,89,120" if library.names_targets else "build on the device"
        raise RuntimeUnavailableError(f"no GPU was found here, and {where} needs to know the target: {what}")
    if library.names_targets and (lacking := [sm for sm in wanted if sm not in library.targets]):
        sm = lacking[0]
        why = f" ({_NOT_RTX[sm]})" if sm in _NOT_RTX else ""
        given = "--sm" if options.sms else f"this machine's {device.name if device else 'GPU'}, SM"
        raise InputError(f"{given} {sm}: {where} does not build for it{why}; it builds for {_listed(library.targets)}")
    return wanted


def _listed(sms: tuple[int, ...] | list[int]) -> str:
    return ",".join(map(str, sms))
