"""Builds the sdist and, from it, the pure wheel, each twice, and fails where two builds differ.

python scripts/build_dist.py FOLDER
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


def build(source: Path, kind: str, out: Path) -> Path:
    """Builds `kind` (sdist or wheel, without compiled kernels) of the project in `source`; returns the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, env=os.environ | {"MOEBIUS_NO_KERNELS": "1"})
    (file,) = out.iterdir()
    return file


def twice(source: Path, kind: str, scratch: Path) -> Path:
    """Builds twice and returns one file.

    Raises:
        SystemExit: the two files differ.
    """
    first, second = (build(source, kind, scratch / f"{kind}-{number}") for number in (1, 2))
    if first.read_bytes() != second.read_bytes():
        raise SystemExit(f"error: two builds of {first.name} differ; the {kind} is not reproducible")
    return first


def main(folder: Path) -> None:
    """Writes both files into `folder`."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sdist = twice(ROOT, "sdist", scratch)
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch / "source", filter="data")
        (source,) = (scratch / "source").iterdir()
        wheel = twice(source, "wheel", scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for file in (sdist, wheel):
            sys.stdout.write(f"{shutil.copy(file, folder)}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
