"""Compiles the kernels for ONNX Runtime into the wheel, and into the checkout for editable installs.

They are optional: without a compiler the package is pure Python, and says so. See docs/kernels.md.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

FOLDER = Path("runtimes/moebius_runtime/kernels")
LIBRARIES = {"linux": "libmoebius_kernels.so", "darwin": "libmoebius_kernels.dylib"}
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-fno-math-errno")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma")
# Name -> floats in a register, and the flags that allow its instructions; the best one of a machine last.
VARIANTS: dict[str, tuple[int, tuple[str, ...]]] = {"generic": (4, ())}
X86_VARIANTS = VARIANTS | {
    "avx2": (8, ("-mavx2", "-mfma")),
    "avxvnni": (8, ("-mavx2", "-mfma", "-mavxvnni")),
    "avx512": (16, AVX512),
    "avx512vnni": (16, (*AVX512, "-mavx512vnni")),
}
ARM_VARIANTS = VARIANTS | {
    "neon": (4, ("-DMOEBIUS_NEON=1",)),
    "dotprod": (4, ("-DMOEBIUS_NEON=2", "-march=armv8.2-a+dotprod")),
    "i8mm": (4, ("-DMOEBIUS_NEON=3", "-march=armv8.2-a+i8mm")),
}


class KernelsHook(BuildHookInterface):
    """Adds the compiled kernels to a wheel, or leaves the wheel pure and says why."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compiles, before hatchling collects the wheel's files. A compiler that fails ends the build."""
        root = Path(self.root)
        why_not = _why_not()
        if why_not:
            if version == "editable":  # a library of before would be loaded
                for name in LIBRARIES.values():
                    (root / FOLDER / name).unlink(missing_ok=True)
            self.app.display_warning(f"moebius-edge: pure Python, without kernels for ONNX Runtime: {why_not}")
            return
        library = FOLDER / LIBRARIES[sys.platform]
        try:
            compile_library(_compiler(), root / FOLDER / "src", root / library)
        except BuildError as error:
            self.app.abort(f"moebius-edge: {error}\nSet MOEBIUS_NO_KERNELS=1 to install without these kernels.")
        build_data["artifacts"].append(f"/{library.as_posix()}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform(_compiler())}"  # the library knows nothing of Python


class BuildError(Exception):
    """The compiler cannot be started, or refused the sources."""


def _why_not() -> str | None:
    """Why there is nothing to compile; None where there is."""
    if os.environ.get("MOEBIUS_NO_KERNELS", "0") not in ("", "0"):
        return "MOEBIUS_NO_KERNELS is set"
    if sys.platform not in LIBRARIES:
        return f"they are not written for {platform.system()}"
    return None if _compiler() else "no C++ compiler found (CXX, c++, g++, clang++)"


def _compiler() -> list[str]:
    """$CXX, which may hold arguments, else the first of the usual names; empty where there is none."""
    if named := shlex.split(os.environ.get("CXX", "")):
        return named
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), [])


def _platform(compiler: list[str]) -> str:
    """The platform of the wheel's name: on Linux that of the compiler's target, which may be a cross compiler.

    It is never manylinux: only `auditwheel` knows which C libraries the result runs with.

    Raises:
        BuildError: the compiler cannot be started.
    """
    own = next(tag.platform for tag in sys_tags() if "manylinux" not in tag.platform)
    if not own.startswith("linux_"):
        return own
    machine = _machine(compiler)
    return "linux_" + {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)


def _machine(compiler: list[str]) -> str:
    """The processor that the compiler compiles for, such as `x86_64`."""
    return _run([*compiler, "-dumpmachine"]).strip().partition("-")[0]


def variants_of(compiler: list[str]) -> dict[str, tuple[int, tuple[str, ...]]]:
    """The variants for the compiler's target; without those whose flags the compiler is too old for.

    Raises:
        BuildError: the compiler cannot be started.
    """
    machine = _machine(compiler)
    tables = {"x86_64": X86_VARIANTS, "amd64": X86_VARIANTS, "aarch64": ARM_VARIANTS, "arm64": ARM_VARIANTS}
    found = tables.get(machine, VARIANTS)
    return {name: (lanes, flags) for name, (lanes, flags) in found.items() if not flags or _takes(compiler, flags)}


def _takes(compiler: list[str], flags: tuple[str, ...]) -> bool:
    command = [*compiler, *flags, "-x", "c++", "-E", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def compile_objects(
    compiler: list[str],
    sources: Path,
    folder: Path,
    variants: dict[str, tuple[int, tuple[str, ...]]],
    extra: tuple[str, ...] = (),
) -> list[str]:
    """Compiles each source once, `variant.cpp` once per instruction set; returns the object files.

    Args:
        compiler, sources: the command, and the folder of the sources.
        folder: for the object files.
        variants: as `variants_of` gives them.
        extra: more flags for all of them.

    Raises:
        BuildError: with what the compiler said.
    """
    listed = " ".join(f"V({name})" for name in variants)
    jobs = [
        (name, "variant", (f"-DMOEBIUS_VARIANT={name}", f"-DMOEBIUS_LANES={lanes}", *flags))
        for name, (lanes, flags) in variants.items()
    ]
    jobs += [(name, name, ()) for name in ("library", "work")]
    jobs += [("dispatch", "dispatch", (f"-DMOEBIUS_VARIANTS={listed}",))]

    def compiled(job: tuple[str, str, tuple[str, ...]]) -> str:
        name, source, flags = job
        made = str(folder / f"{name}.o")
        _run([*compiler, *FLAGS, *extra, *flags, "-c", str(sources / f"{source}.cpp"), "-o", made])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(compiled, jobs))


def compile_library(compiler: list[str], sources: Path, library: Path) -> None:
    """Compiles and links the library.

    The library is exchanged whole: a process that has the old one loaded keeps it.

    Raises:
        BuildError: with what the compiler said.
    """
    with tempfile.TemporaryDirectory(prefix="moebius-kernels-") as folder:
        objects = compile_objects(compiler, sources, Path(folder), variants_of(compiler))
        made = f"{folder}/{library.name}"
        # libgcc stays shared, as libstdc++ needs it anyway; a static one of GCC 12 would ask for glibc 2.35.
        _run([*compiler, "-shared", *objects, "-o", made])
        beside = library.with_name(f".{library.name}.{os.getpid()}")
        try:
            shutil.copy(made, beside)
            os.replace(beside, library)
        finally:
            beside.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"the C++ compiler {command[0]!r} cannot be started: {error.strerror}") from error
    if done.returncode:
        raise BuildError(f"the C++ compiler failed: {shlex.join(command)}\n{done.stdout}{done.stderr}".rstrip())
    return done.stdout
