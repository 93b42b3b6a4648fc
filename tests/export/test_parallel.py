"""The VAE's export beside the U-Net's, in a process of its own.

The cases run in a fresh process, as the command does: a fork of the suite's own process would copy its threads' locks.
"""

import json
import subprocess
import sys

import pytest

from moebius_runtime.bundle.manifest import read_manifest

_SCRIPT = """
import json, os, signal, sys, threading
from moebius.errors import CheckpointError, MisfitError
from moebius_export.errors import ExportError
from moebius_export.onnx_export import parallel
parallel.physical_cores = lambda: 2

def work(how, progress):
    progress("vae_encoder", "trace")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "misfit":
        raise MisfitError("other tensors", ["conv.weight"])
    if how == "bug":
        class Local(Exception): pass
        raise Local("cannot be pickled")
    if how == "endless":
        threading.Event().wait()
    return os.getpid()

def tried(how, aside):
    seen = []
    try:
        with parallel.started(work, how, parallel=aside) as result:
            if how == "endless":
                raise KeyError("the other part failed")
            return f"{result(lambda *stage: seen.append(stage)) == os.getpid()} {seen}"
    except Exception as error:
        return f"{type(error).__name__} {str(error).strip().splitlines()[-1]} {getattr(error, 'unexpected', '')}"

print(json.dumps([tried(how, aside) for how, aside in json.loads(sys.argv[1])]))
"""


def _run(*cases):
    """What each case, (how, whether in a process of its own), came to; one after the other in a fresh process."""
    command = [sys.executable, "-c", _SCRIPT, json.dumps(cases)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is one process")
def test_work_in_a_child_gives_its_result_progress_and_errors():
    cases = [("well", True), ("well", False), *((how, True) for how in ("killed", "misfit", "bug", "endless"))]
    well, inside, killed, misfit, bug, endless = _run(*cases)
    assert well == "False [('vae_encoder', 'trace')]"
    assert inside == "True [('vae_encoder', 'trace')]"
    assert "was killed, perhaps for lack of memory; nothing was written" in killed
    assert misfit == "MisfitError other tensors ['conv.weight']"
    assert bug.startswith("RuntimeError ")
    assert "cannot be pickled" in bug
    assert endless == "KeyError 'the other part failed' "  # the child does not outlive the block


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(fused_bundle, tmp_path):
    script = """
import sys
from moebius_export.onnx_export import export, parallel
parallel.physical_cores = lambda: 2
export.export_onnx(sys.argv[1], export.ExportOptions(weights="stand-in", vae="stand-in", preset="tiny"),
                   two_processes=True)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "bundle")], timeout=300, check=True)
    made, expected = read_manifest(tmp_path / "bundle"), read_manifest(fused_bundle)
    assert {name: file.sha256 for name, file in made.files.items()} == {
        name: file.sha256 for name, file in expected.files.items()
    }
    assert (made.graphs, made.decoders, made.rewrites) == (expected.graphs, expected.decoders, expected.rewrites)
    assert made.model == expected.model
