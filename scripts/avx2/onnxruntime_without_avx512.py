"""Copies the installed ONNX Runtime to a folder, with every `cpuid` instruction replaced by a trap.

    python onnxruntime_without_avx512.py FOLDER

With FOLDER first on PYTHONPATH and `cpuid_mask.c` compiled and preloaded, ONNX Runtime chooses the routines of a
processor with AVX2 and FMA. It has no switch for that. The instructions are found by objdump, because the two bytes
0F A2 also occur inside of other instructions and of data.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

CPUID, TRAP = b"\x0f\xa2", b"\xcc\x90"
_SECTION = re.compile(r"^\s*\d+\s+\S+\s+([0-9a-f]+)\s+([0-9a-f]+)\s+[0-9a-f]+\s+([0-9a-f]+)", re.MULTILINE)
_FOUND = re.compile(r"^\s*([0-9a-f]+):\s+cpuid\b", re.MULTILINE)


def objdump(*arguments: str | Path) -> str:
    """What objdump prints."""
    return subprocess.run(["objdump", *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def trap_cpuid(library: Path) -> int:
    """Replaces each `cpuid` of a shared library in place; returns how many there were.

    Raises:
        SystemExit: the file does not hold the instruction where objdump finds it.
    """
    sections = [tuple(int(x, 16) for x in match) for match in _SECTION.findall(objdump("-h", "-w", library))]
    addresses = [int(x, 16) for x in _FOUND.findall(objdump("-d", "--no-show-raw-insn", library))]
    data = bytearray(library.read_bytes())
    for address in addresses:
        _, start, offset = next(one for one in sections if one[1] and one[1] <= address < one[1] + one[0])
        place = address - start + offset
        if data[place : place + 2] != CPUID:
            raise SystemExit(f"error: {library} has no cpuid at {address:#x}; objdump and the file disagree")
        data[place : place + 2] = TRAP
    library.write_bytes(data)
    return len(addresses)


def main(folder: Path) -> None:
    """Writes `folder/onnxruntime`."""
    installed = importlib.metadata.distribution("onnxruntime").locate_file("onnxruntime")
    copy = folder / "onnxruntime"
    shutil.copytree(str(installed), copy)
    found = {library.name: trap_cpuid(library) for library in sorted(copy.glob("capi/*.so*"))}
    if not any(found.values()):
        raise SystemExit(f"error: no cpuid in {', '.join(found) or 'any library of ' + str(installed)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
