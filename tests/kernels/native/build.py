"""Builds the program that compares the kernels with nested loops, for this machine or with a cross compiler.

python tests/kernels/native/build.py FOLDER [--compiler "aarch64-linux-gnu-g++"] [--variants generic,avxvnni]

The object files of the variants stay in FOLDER beside the program `check`. With --avx-vnni-by-avx512 the variant
avxvnni is compiled with AVX512-VNNI's form of its one instruction, which does the same, where there is no AVX-VNNI.
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


def build(folder, compiler, names=(), avx_vnni_by_avx512=False):
    """Compiles the kernels, of these variants or of all, and `check.cpp`; returns the program."""
    hatch_build = hook()
    variants = hatch_build.variants_of(compiler)
    flags = ()
    if avx_vnni_by_avx512:
        lanes, _ = variants["avxvnni"]
        variants["avxvnni"] = lanes, ("-mavx2", "-mfma", "-mavx512vl", "-mavx512vnni")
        flags = ("-DMOEBIUS_TEST_AVXVNNI",)
    variants = {name: variants[name] for name in names or variants}
    sources = ROOT / hatch_build.FOLDER / "src"
    folder.mkdir(parents=True, exist_ok=True)
    objects = hatch_build.compile_objects(compiler, sources, folder, variants, flags)
    program = folder / "check"
    loops = ["-std=c++17", "-O2", "-Wall", "-Wextra", f"-I{sources}"]  # nested loops need no -O3
    subprocess.run([*compiler, *loops, str(HERE / "check.cpp"), *objects, "-o", str(program)], check=True)
    return program


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compiler", default="")
    parser.add_argument("--variants", default="")
    parser.add_argument("--avx-vnni-by-avx512", action="store_true")
    given = parser.parse_args()
    compiler = shlex.split(given.compiler) or hook()._compiler()
    print(build(given.folder, compiler, tuple(filter(None, given.variants.split(","))), given.avx_vnni_by_avx512))
