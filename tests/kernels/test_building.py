"""The build hook: what it compiles, and that it is optional without hiding a failure."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
hatch_build = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hatch_build)

pytestmark = pytest.mark.skipif(sys.platform not in hatch_build.LIBRARIES, reason="the kernels are not built here")
needs_compiler = pytest.mark.skipif(not hatch_build._compiler(), reason="no C++ compiler")


class AbortedError(Exception):
    pass


class App:
    def __init__(self):
        self.warnings = []

    def display_warning(self, message):
        self.warnings.append(message)

    def abort(self, message):
        raise AbortedError(message)


@pytest.fixture
def root(tmp_path):
    """A checkout whose sources compile in no time: one function per file, and one per variant."""
    sources = tmp_path / hatch_build.FOLDER / "src"
    sources.mkdir(parents=True)
    visible = '__attribute__((visibility("default")))'
    (sources / "library.cpp").write_text(f'extern "C" {visible} int answer() {{ return 42; }}\n')
    (sources / "work.cpp").write_text("int hidden() { return 1; }\n")
    (sources / "dispatch.cpp").write_text("#define V(name) name,\nenum { MOEBIUS_VARIANTS };\n")
    (sources / "variant.cpp").write_text(
        "namespace MOEBIUS_VARIANT { extern const int lanes; const int lanes = MOEBIUS_LANES; }\n"
    )
    return tmp_path


@pytest.fixture
def build(root, monkeypatch):
    """build(version, **environment) -> (what hatchling is told, warnings)."""
    monkeypatch.delenv("MOEBIUS_NO_KERNELS", raising=False)
    monkeypatch.delenv("CXX", raising=False)

    def run(version="standard", **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        app, data = App(), {"artifacts": []}
        hatch_build.KernelsHook(str(root), {}, None, None, "", "wheel", app).initialize(version, data)
        return data, app.warnings

    return run


def library(root):
    return root / hatch_build.FOLDER / hatch_build.LIBRARIES[sys.platform]


@needs_compiler
def test_a_wheel_for_this_platform_and_any_python(build, root):
    import ctypes

    data, warnings = build()
    assert warnings == []
    assert data["artifacts"] == [f"/{library(root).relative_to(root)}"]
    assert data["pure_python"] is False
    assert data["tag"].startswith("py3-none-")
    assert "any" not in data["tag"]
    assert ctypes.CDLL(str(library(root))).answer() == 42
    assert [path.name for path in library(root).parent.iterdir() if path.is_file()] == [library(root).name]


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("aarch64-linux-gnu-g++"), reason="no cross compiler")
def test_a_cross_compilers_wheel_is_for_its_target(build, root):
    data, warnings = build(CXX="aarch64-linux-gnu-g++")
    assert warnings == []
    assert data["tag"] == "py3-none-linux_aarch64"
    assert int.from_bytes(library(root).read_bytes()[18:20], "little") == 183  # EM_AARCH64


@pytest.mark.skipif(sys.platform != "linux", reason="platforms of Linux")
@pytest.mark.parametrize(
    ("target", "platform"),
    [
        ("x86_64-linux-gnu", "linux_x86_64"),
        ("amd64-linux-gnu", "linux_x86_64"),
        ("aarch64-redhat-linux", "linux_aarch64"),
        ("riscv64-linux-gnu", "linux_riscv64"),
    ],
)
def test_the_platform_is_that_of_the_compilers_target(target, platform):
    assert hatch_build._platform(compiler_for(target)) == platform


def check_pure(data, warnings, words):
    assert data == {"artifacts": []}
    assert len(warnings) == 1
    assert "pure Python" in warnings[0]
    assert words in warnings[0]
    assert "\n" not in warnings[0]


def test_without_a_compiler_the_wheel_is_pure(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    check_pure(*build(), "no C++ compiler")


def test_on_another_system_it_is_pure(build, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    check_pure(*build(), "not written for")


def test_switched_off_it_is_pure_and_no_older_library_stays(build, root):
    library(root).write_bytes(b"old")
    check_pure(*build(MOEBIUS_NO_KERNELS="1"), "MOEBIUS_NO_KERNELS is set")
    assert library(root).exists()  # of a checkout: not this wheel's, which holds no artifacts
    check_pure(*build("editable", MOEBIUS_NO_KERNELS="1"), "MOEBIUS_NO_KERNELS is set")
    assert not library(root).exists()


@needs_compiler
def test_a_compiler_that_fails_ends_the_build(build, root):
    library(root).write_bytes(b"old")
    with (root / hatch_build.FOLDER / "src" / "variant.cpp").open("a") as stream:
        stream.write("int broken() { return nonsense; }\n")
    with pytest.raises(AbortedError) as caught:
        build()
    for words in ("the C++ compiler failed", "nonsense", "MOEBIUS_NO_KERNELS=1"):
        assert words in str(caught.value)
    assert library(root).read_bytes() == b"old"


def test_a_compiler_that_is_named_and_missing_ends_the_build(build):
    with pytest.raises(AbortedError, match=r"'no-such-c\+\+' cannot be started: No such file"):
        build(CXX="no-such-c++ -O1")


@needs_compiler
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_the_library_shows_two_names():
    """Everything else is hidden: libraries in one process must not find each other's functions."""
    from moebius_runtime import kernels

    path = kernels.library_path()
    if path is None or sys.platform != "linux":
        pytest.skip(f"compiled kernels: {kernels.in_words()}")
    done = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True)
    ours = [line.split()[-1] for line in done.stdout.splitlines() if line.split()[-2] in "TDB"]
    assert sorted(ours) == ["RegisterCustomOps", "moebius_kernels_variant"]


MINGW = "x86_64-w64-mingw32-g++"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(MINGW), reason=f"no {MINGW}")
def test_the_sources_compile_for_windows_where_long_has_32_bits(tmp_path):
    """Without a warning; the DLL exports the two names and needs only what every Windows has."""
    sources = ROOT / hatch_build.FOLDER / "src"
    variants = {"generic": hatch_build.VARIANTS["generic"], "avx2": hatch_build.X86_VARIANTS["avx2"]}
    objects = hatch_build.compile_objects([MINGW], sources, tmp_path, variants, ("-O1", "-Werror"))
    library = tmp_path / "kernels.dll"
    subprocess.run([MINGW, "-shared", "-static", *objects, "-o", library], check=True)
    shown = subprocess.run([MINGW.replace("g++", "objdump"), "-p", library], capture_output=True, text=True, check=True)
    assert set(re.findall(r"DLL Name: (.*)", shown.stdout)) <= {"KERNEL32.dll", "msvcrt.dll"}
    exports = shown.stdout.partition("[Ordinal/Name Pointer] Table")[2].split("\n\n")[0]
    assert re.findall(r"\] (\w+)", exports) == ["RegisterCustomOps", "moebius_kernels_variant"]


def test_no_source_counts_in_long():
    """`long` has 32 bits on Windows and 64 elsewhere, so no count, place or size may be one."""
    for folder in (ROOT / hatch_build.FOLDER / "src", ROOT / "tests/kernels/native"):
        for path in (*folder.glob("*.h"), *folder.glob("*.cpp")):
            code = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
            assert not re.search(r"\blong\b", code), path.name


def test_the_sources_are_those_of_the_hook():
    sources = {path.stem for path in (ROOT / hatch_build.FOLDER / "src").glob("*.cpp")}
    assert sources == {"library", "work", "dispatch", "variant"}


def compiler_for(machine, refused=()):
    """A compiler that is for this machine, and refuses some flags as an older one does."""
    words = " ".join(f"*{flag}*) exit 1;;" for flag in refused)
    return ["sh", "-c", f'case "$*" in *-dumpmachine*) echo {machine};; {words} esac', "sh"]


@pytest.mark.parametrize(
    ("machine", "refused", "expected"),
    [
        ("x86_64-linux-gnu", (), ["generic", "avx2", "avxvnni", "avx512", "avx512vnni"]),
        ("x86_64-linux-gnu", ("-mavxvnni",), ["generic", "avx2", "avx512", "avx512vnni"]),
        ("aarch64-linux-gnu", (), ["generic", "neon", "dotprod", "i8mm"]),
        ("arm64-apple-darwin24.1.0", ("+i8mm",), ["generic", "neon", "dotprod"]),
        ("aarch64_be-linux-gnu", (), ["generic"]),
        ("riscv64-linux-gnu", (), ["generic"]),
    ],
)
def test_variants_of_a_machine_and_of_older_compilers(machine, refused, expected):
    assert list(hatch_build.variants_of(compiler_for(machine, refused))) == expected


def test_the_runtime_knows_every_variant():
    from moebius_runtime import kernels

    assert set(kernels.VARIANTS) == set(hatch_build.X86_VARIANTS) | set(hatch_build.ARM_VARIANTS)
    assert set(kernels.DOT_PRODUCTS) < set(kernels.VARIANTS)
