"""Builds the program that compares the kernels with nested loops, for this machine or with a cross compiler.

python tests/kernels/native/build.py FOLDER [--compiler "aarch64-linux-gnu-g++"] [--flags "-fsanitize=address"]

The object files of the variants stay in FOLDER beside the program `check`.
"""

import argparse
import importlib.util
import shlex
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


def hook():
    """The build hook of the project, whose flags and variants these are."""
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(folder, compiler, flags=()):
    """Compiles the kernels and `check.cpp`; returns the program."""
    hatch_build = hook()
    sources = ROOT / hatch_build.FOLDER / "src"
    folder.mkdir(parents=True, exist_ok=True)
    objects = hatch_build.compile_objects(compiler, sources, folder, tuple(flags))
    program = folder / "check"
    loops = ["-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{sources}"]  # nested loops need no -O3
    subprocess.run([*compiler, *loops, *flags, str(HERE / "check.cpp"), *objects, "-o", str(program)], check=True)
    return program


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compiler", default="")
    parser.add_argument("--flags", default="")
    given = parser.parse_args()
    print(build(given.folder, shlex.split(given.compiler) or hook()._compiler(), shlex.split(given.flags)))
