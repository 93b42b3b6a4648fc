"""The compiled kernels as the runtime finds, loads and names them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moebius_runtime import kernels
from moebius_runtime.backends import create_backend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.graph_files import function_domains
from moebius_runtime.errors import InputError, RuntimeUnavailableError

HERE = Path(kernels.__file__).parent
LATENT = np.random.RandomState(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
no_library = not kernels.library_path()
needs_library = pytest.mark.skipif(no_library, reason=f"compiled kernels: {kernels.in_words()}")


@pytest.mark.skipif(os.environ.get("MOEBIUS_NO_KERNELS", "0") not in ("", "0"), reason="MOEBIUS_NO_KERNELS is set")
@pytest.mark.skipif(os.environ.get(kernels.SWITCH) == "off", reason=f"{kernels.SWITCH}=off")
def test_where_there_is_a_compiler_they_were_built():
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if sys.platform not in ("linux", "darwin") or not compiler:
        pytest.skip("no C++ compiler, or a system that they are not written for")
    path = kernels.library_path()
    assert path is not None, "there is a C++ compiler, but no library: run `make kernels`"
    assert kernels.variant(path) in kernels.VARIANTS
    sources = list((HERE / "src").glob("*"))  # of a checkout; a wheel has none
    newer = [source.name for source in sources if source.stat().st_mtime > path.stat().st_mtime]
    assert not newer, f"{newer} changed after the library was built: run `make kernels`"


@pytest.fixture
def bundle(toy_copy, reseal):
    """A toy bundle whose decoder's file brings along a function of domain moebius."""
    onnx = pytest.importorskip("onnx")
    (decoder,) = toy_copy.path.glob("vae_decoder/*.onnx")
    model = onnx.load(str(decoder), load_external_data=False)
    function = onnx.parser.parse_function(
        '<opset_import: ["": 20], domain: "moebius"> LambdaSummary (k, v) => (y) '
        "{ w = Softmax <axis = -1> (k) y = MatMul (w, v) }"
    )
    model.functions.append(function)
    model.opset_import.append(onnx.helper.make_opsetid("moebius", 1))
    decoder.write_bytes(model.SerializeToString())
    reseal(toy_copy.path)
    return Bundle.open(toy_copy.path)


def described(bundle):
    backend = create_backend(bundle, "ort-cpu", threads=1)
    backend.load("vae_encoder")
    assert "kernels" not in backend.describe()  # no function in it: nothing that they could take
    backend.run("vae_decoder", {"latent": LATENT})
    found = backend.describe()["kernels"]
    backend.release()
    assert backend.describe()["kernels"] == found  # they are asked for when all is done
    return found


@needs_library
def test_the_backend_says_which_it_uses(bundle, monkeypatch):
    monkeypatch.delenv(kernels.SWITCH, raising=False)
    assert described(bundle) == kernels.variant(HERE / kernels.library_path().name)
    assert described(bundle) in kernels.VARIANTS


def test_they_can_be_switched_off(bundle, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert kernels.library_path() is None
    assert described(bundle) == "none (MOEBIUS_KERNELS=off)"


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """installed(content): the library's place, holding that; nothing where it is None."""

    def place(content):
        monkeypatch.delenv(kernels.SWITCH, raising=False)
        monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
        path = tmp_path / kernels._NAMES[sys.platform]
        if content is not None:
            path.write_bytes(content)
        return path

    return place


def test_where_they_were_not_built(bundle, installed, monkeypatch):
    installed(None)
    assert described(bundle) == "none (not built)"
    monkeypatch.setenv(kernels.SWITCH, "generic")
    with pytest.raises(RuntimeUnavailableError, match="'generic', but this installation has no compiled kernels; inst"):
        described(bundle)


@needs_library
@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.9, 0.9999])
def test_a_damaged_library_is_an_error_that_says_what_to_do(bundle, installed, share):
    content = kernels.library_path().read_bytes()
    path = installed(content[: int(share * len(content))])
    with pytest.raises(RuntimeUnavailableError) as caught:
        described(bundle)
    for words in (str(path), "Reinstall moebius-edge, or set MOEBIUS_KERNELS=off"):
        assert words in str(caught.value)


def test_a_library_of_something_else(bundle, installed):
    installed(b"no library")
    with pytest.raises(RuntimeUnavailableError, match=r"cannot be loaded: .*Reinstall moebius-edge"):
        described(bundle)
    other = next(Path(np.__file__).parent.rglob("_multiarray_umath*.so"))
    with pytest.raises(RuntimeUnavailableError, match=r"cannot be loaded: .*moebius_kernels_variant.*Reinstall"):
        kernels.variant(other)


@pytest.mark.parametrize("value", ["AVX2", "on", "1", "avx2 ", "none"])
def test_an_unknown_variant(bundle, monkeypatch, value):
    monkeypatch.setenv(kernels.SWITCH, value)
    with pytest.raises(
        InputError,
        match=f"MOEBIUS_KERNELS is {value!r}; expected off, generic, avx2, .*, neon, dotprod, i8mm, or nothing",
    ):
        described(bundle)


@needs_library
def test_a_variant_that_is_not_the_one_in_use(bundle, monkeypatch):
    """As on a CPU without it: the library falls back, and this must not go unnoticed."""
    running = kernels.variant(kernels.library_path())
    other = next(name for name in kernels.VARIANTS if name != running)
    monkeypatch.setenv(kernels.SWITCH, other)
    with pytest.raises(RuntimeUnavailableError, match=f"is '{other}', but the kernels run '{running}'"):
        described(bundle)


@needs_library
def test_the_command_says_what_it_used(bundle, run):
    code, out, _ = run("a.png", "--mask", "m.png", "--bundle", bundle.path, "--out", "o.png", "--steps", 2)
    assert code == 0
    assert f"kernels: {kernels.variant(kernels.library_path())}: o.png" in " ".join(out.split())


def test_domains_of_functions(bundle):
    files = {path.parent.name: function_domains(path) for path in bundle.path.glob("*/*.onnx")}
    assert files.pop("vae_decoder") == {"moebius"}
    assert set(map(frozenset, files.values())) == {frozenset()}


def test_looking_for_them_loads_nothing():
    code = "import sys, moebius_runtime.kernels as k; k.library_path(); print('onnxruntime' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
