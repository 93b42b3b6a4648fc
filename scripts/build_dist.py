"""Builds the sdist and, from it, the pure wheel, each twice, and fails where two builds differ.

python scripts/build_dist.py FOLDER [COMPILER...]

Each COMPILER, such as aarch64-linux-gnu-g++, adds a wheel with the kernels compiled for its target (Linux), which
`auditwheel` tags with the oldest manylinux whose C library it runs with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EPOCH, DATE = "SOURCE_DATE_EPOCH", "1580601600"  # hatchling's own date, for the files that auditwheel writes


def build(source: Path, kind: str, out: Path, compiler: str = "") -> Path:
    """Builds `kind` (sdist or wheel) of the project in `source`; returns the file. No compiler: no compiled kernels."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    choice = {"MOEBIUS_NO_KERNELS": "0", "CXX": compiler} if compiler else {"MOEBIUS_NO_KERNELS": "1"}
    subprocess.run(command, cwd=source, check=True, env=os.environ | choice)
    (file,) = out.iterdir()
    if not compiler:
        return file
    repaired = out / "repaired"
    # Nothing is grafted into the wheel, so no file has to be patched; `--strip` would need the target's own binutils.
    repair = ["repair", "--patcher", "none", "--wheel-dir", str(repaired), str(file)]
    subprocess.run([sys.executable, "-m", "auditwheel", *repair], check=True, env=os.environ | {EPOCH: DATE})
    (file,) = repaired.iterdir()
    return file


def twice(source: Path, kind: str, scratch: Path, compiler: str = "") -> Path:
    """Builds twice and returns one file.

    Raises:
        SystemExit: the two files differ.
    """
    first, second = (build(source, kind, scratch / f"{kind}-{number}", compiler) for number in (1, 2))
    if first.read_bytes() != second.read_bytes():
        raise SystemExit(f"error: two builds of {first.name} differ; the {kind} is not reproducible")
    return first


def main(folder: Path, compilers: list[str]) -> None:
    """Writes the sdist, the pure wheel and a wheel of each compiler into `folder`."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sdist = twice(ROOT, "sdist", scratch)
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch / "source", filter="data")
        (source,) = (scratch / "source").iterdir()
        files = [sdist, twice(source, "wheel", scratch)]
        for number, compiler in enumerate(compilers):
            files.append(twice(source, "wheel", scratch / f"compiled-{number}", compiler))
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            sys.stdout.write(f"{shutil.copy(file, folder)} {file.stat().st_size / 1e6:.2f} MB\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
