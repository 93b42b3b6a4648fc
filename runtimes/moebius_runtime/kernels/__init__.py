"""Compiled kernels for ONNX Runtime: the path of their library, and the instruction set that it uses.

They implement the operators of domain `moebius`. Without them ONNX Runtime runs the functions of the model. The library
is optional and built with the wheel: see docs/kernels.md.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from moebius_runtime.errors import InputError, RuntimeUnavailableError

DOMAIN = "moebius"
SWITCH = "MOEBIUS_KERNELS"
VARIANTS = ("generic", "avx2", "avxvnni", "avx512", "avx512vnni", "neon", "dotprod", "i8mm")
BYTE_PRODUCTS = "avx512vnni"
"""The variant with AVX-512's INT8 dot products; `DOT_PRODUCTS` lists all that have such instructions."""
DOT_PRODUCTS = ("avxvnni", "avx512vnni", "dotprod", "i8mm")
"""The variants with instructions for INT8 dot products, which make INT8 several times as fast as fp32."""
_OFF = "off"
_NAMES = {"linux": "libmoebius_kernels.so", "darwin": "libmoebius_kernels.dylib"}
_REINSTALL = f"Reinstall moebius-edge, or set {SWITCH}=off to run without compiled kernels."


def library_path() -> Path | None:
    """The library of this installation; None where it was not built or MOEBIUS_KERNELS is off.

    Raises:
        InputError: MOEBIUS_KERNELS has an unknown value.
        RuntimeUnavailableError: it names a variant, and there is no library.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", _OFF, *VARIANTS):
        raise InputError(
            f"{SWITCH} is {wanted!r}; expected {_OFF}, {', '.join(VARIANTS)}, or nothing for the best of this CPU"
        )
    path = Path(__file__).with_name(_NAMES.get(sys.platform, "none"))
    if wanted != _OFF and path.is_file():
        return path
    if wanted in VARIANTS:
        raise RuntimeUnavailableError(
            f"{SWITCH} is {wanted!r}, but this installation has no compiled kernels; install moebius-edge where there "
            f"is a C++ compiler, or unset {SWITCH}"
        )
    return None


def in_words() -> str:
    """The variant that runs operators of `DOMAIN`, such as `avx512`, or `none (not built)`.

    Raises:
        InputError, RuntimeUnavailableError: see `library_path` and `variant`.
    """
    path = library_path()
    if path is None:
        return f"none ({SWITCH}=off)" if os.environ.get(SWITCH) == _OFF else "none (not built)"
    return variant(path)


def in_words_of_bytes(words: str) -> str:
    """The result of `in_words` for an INT8 model, with a note if this CPU has no instructions for INT8 dot products."""
    if words in DOT_PRODUCTS:
        return words
    return f"{words}, without INT8 dot products: int8 gains little here"


def variant(path: Path) -> str:
    """The instruction set that the library's kernels use in this process: one of `VARIANTS`.

    Raises:
        RuntimeUnavailableError: the library cannot be loaded, or does not use the variant in MOEBIUS_KERNELS.
    """
    if not _is_whole(path):
        raise RuntimeUnavailableError(f"{path} is damaged: its end is missing. {_REINSTALL}")
    try:
        ask = ctypes.CDLL(str(path)).moebius_kernels_variant
    except (OSError, AttributeError) as error:
        raise RuntimeUnavailableError(f"{path} cannot be loaded: {error}. {_REINSTALL}") from error
    ask.restype = ctypes.c_char_p
    runs = str(ask().decode())
    wanted = os.environ.get(SWITCH, "")
    if wanted and wanted != runs:
        raise RuntimeUnavailableError(
            f"{SWITCH} is {wanted!r}, but the kernels run {runs!r}: this CPU has no {wanted}, or the variable was "
            f"changed after they were loaded. Unset {SWITCH}, or set it to what the CPU has before the start."
        )
    return runs


def _is_whole(path: Path) -> bool:
    """Whether an ELF file is complete up to its section table: the loader would crash on a truncated one."""
    try:
        with path.open("rb") as stream:
            header = stream.read(64)
            size = os.fstat(stream.fileno()).st_size
    except OSError:
        return True  # the loader's error has the details
    if header[:6] != b"\x7fELF\x02\x01":  # 64 bits, little endian
        return True
    table, entry, count = (int.from_bytes(header[a:b], "little") for a, b in ((40, 48), (58, 60), (60, 62)))
    return len(header) == 64 and table + entry * count <= size
