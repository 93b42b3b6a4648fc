"""The kernels against nested loops, without Python or ONNX Runtime: the program that Arm's tests run too."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
BUILD = Path(__file__).with_name("native") / "build.py"
_spec = importlib.util.spec_from_file_location("native_build", BUILD)
native = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(native)


@pytest.mark.slow
@pytest.mark.skipif(not native.hook()._compiler(), reason="no C++ compiler")
def test_avx_vnni_by_the_instruction_of_avx512(tmp_path):
    """Variant avxvnni on a processor without AVX-VNNI: AVX512-VNNI's form of its instruction does the same."""
    compiler = native.hook()._compiler()
    if "avxvnni" not in native.hook().variants_of(compiler):
        pytest.skip("the compiler has no AVX-VNNI")
    program = native.build(tmp_path, compiler, ("generic", "avxvnni"), avx_vnni_by_avx512=True)
    done = subprocess.run([program, "avxvnni", "generic"], capture_output=True, text=True)
    if "the best: generic" in done.stdout:
        pytest.skip("this CPU has no AVX512-VNNI")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d+ passed, 0 failed$", done.stdout, re.MULTILINE)
