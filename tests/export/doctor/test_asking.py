"""Questions to libraries in processes of their own, for real."""

import json
import sys
from types import SimpleNamespace

import pytest

from moebius_export.doctor import asking
from moebius_export.doctor.sources import Sources, ask_library, read_answer, run_command
from moebius_runtime.errors import RuntimeUnavailableError
from moebius_runtime.passport import Device


def test_a_library_that_is_here():
    answer = ask_library("onnxruntime")
    assert answer.problem is None
    assert "CPUExecutionProvider" in answer.value["providers"]


def test_the_gpu_is_asked_of_the_runtime_s_own_reader(monkeypatch):
    device = Device("Orin", 87, "540.4.0", "12.6", 8 << 30, 6 << 30)
    monkeypatch.setattr("moebius_runtime.devices.current_device", lambda: device)
    assert Device(**json.loads(asking.answer("device").removeprefix(asking.MARK))["value"]) == device
    monkeypatch.setattr("moebius_runtime.devices.current_device", lambda: None)
    assert json.loads(asking.answer("device").removeprefix(asking.MARK)) == {"value": None}
    assert ask_library("device").problem is None


def test_bindings_of_both_layouts(monkeypatch):
    monkeypatch.setattr(asking, "_version", lambda name: "12.4.0" if name == "cuda-python" else None)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)  # not installed
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(cudart=SimpleNamespace(__file__="old")))
    assert asking.ask_cuda() == {"version": "12.4.0", "file": "old"}
    monkeypatch.setitem(sys.modules, "cuda.bindings", SimpleNamespace(runtime=SimpleNamespace(__file__="new")))
    assert asking.ask_cuda()["file"] == "new"


def test_onnxruntime():
    from moebius_runtime.backends.ort_integer import saturates

    value = ask_library("onnxruntime").value
    assert "CPUExecutionProvider" in value["providers"]
    assert value["saturates"] is saturates()


def test_the_kernels():
    assert ask_library("kernels").value["words"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a package that does something on import before all others, in this process and in those it starts."""

    def make(name, code):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(path for path in sys.path if path)}")

    return make


def test_a_library_that_is_not_here(package):
    package("tensorrt", "raise ModuleNotFoundError(\"No module named 'tensorrt'\", name='tensorrt')")
    answer = ask_library("tensorrt")
    assert (answer.problem, answer.missing) == ("No module named 'tensorrt'", True)


def test_a_library_that_ends_the_process(package):
    package("tensorrt", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    answer = ask_library("tensorrt")
    assert (answer.problem, answer.missing) == ("importing it ends the process (SIGSEGV)", False)


def test_a_library_that_leaves(package):
    package("tensorrt", "import sys\nsys.exit('no licence')")
    assert "exit code 1: no licence" in ask_library("tensorrt").problem


def test_a_library_that_lacks_a_file_of_the_system(package):
    # The words of the loader on a Jetson's container that was started without the NVIDIA runtime.
    package("tensorrt", "raise ImportError('libnvdla_compiler.so: cannot open shared object file')")
    answer = ask_library("tensorrt")
    assert (answer.problem, answer.missing) == ("libnvdla_compiler.so: cannot open shared object file", False)


def test_a_library_that_prints(package):
    package("tensorrt", "print('hello')\n__version__ = '10.3.0'")
    assert ask_library("tensorrt").value["version"] == "10.3.0"


def test_both_kinds_of_tensorrt(monkeypatch):
    fake = SimpleNamespace(__version__="1.7.1", __file__="x")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", fake)
    monkeypatch.setattr(asking, "_version", lambda name: "1.7.1" if name == "tensorrt_rtx_cu12" else None)
    assert asking.ask_tensorrt_rtx() == {"version": "1.7.1", "file": "x", "cuda": 12}


def test_a_missing_library_behind_an_error_of_ours(monkeypatch):
    def unavailable():
        try:
            raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")
        except ImportError as error:
            raise RuntimeUnavailableError("needs ONNX Runtime; install it") from error

    monkeypatch.setitem(asking.QUESTIONS, "onnxruntime", unavailable)
    content = json.loads(asking.answer("onnxruntime").removeprefix(asking.MARK))
    assert content == {"error": "No module named 'onnxruntime'", "kind": "missing"}


def test_an_error_of_ours_that_is_about_something_else(monkeypatch):
    def conflict():
        raise RuntimeUnavailableError("two packages overwrite each other")

    monkeypatch.setitem(asking.QUESTIONS, "onnxruntime", conflict)
    content = json.loads(asking.answer("onnxruntime").removeprefix(asking.MARK))
    assert content == {"error": "two packages overwrite each other", "kind": "RuntimeUnavailableError"}


def test_no_answer_at_all():
    assert read_answer(1, "", "").problem == "importing it ends the process (exit code 1: no word why)"
    assert read_answer(-11, "noise\n", "").problem == "importing it ends the process (SIGSEGV)"


def test_programs():
    assert run_command(["no-such-program-here"]) is None
    ran = run_command([sys.executable, "-c", "import sys; print('out'); sys.stderr.write('err'); sys.exit(3)"])
    assert (ran.code, ran.text) == (3, "out\nerr")
    assert Sources(run=lambda arguments: None).smi(["-L"]) is None
