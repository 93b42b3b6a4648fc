"""`moebius-inpaint` between other programs: pipes, signals, full disks, links."""

from __future__ import annotations

import io
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_runtime import console
from moebius_runtime.images.pictures import NamedBytes, load_picture

RUNTIMES = Path(__file__).parents[2] / "runtimes"
ONE = ["a.png", "--mask", "m.png", "--out", "b.png", "--threads", "1", "--steps", "2"]
posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has other streams and modes")


@pytest.fixture
def start(here):
    """start(arguments, before="", **options of subprocess.run): the command as a shell starts it."""

    def call(arguments, before="", **more):
        code = f"{before}\nimport sys\nsys.argv[1:] = {arguments!r}\nfrom moebius_runtime import cli\ncli.main()"
        environment = os.environ | {"PYTHONPATH": str(RUNTIMES)}
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more
        return subprocess.run([sys.executable, "-c", code], cwd=here, env=environment, timeout=120, check=False, **more)

    return call


STOPPED = """
import os, signal, time
from moebius_runtime.pipeline import InpaintPipeline
signal.signal(signal.SIGINT, signal.default_int_handler)
def inpaint(*_args, **_more):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
InpaintPipeline.inpaint = inpaint
"""


@posix
def test_an_interruption_is_reported(start, files_here):
    before = files_here()
    done = start(ONE, STOPPED)
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == b"interrupted; no half-written file was left behind"
    assert done.stdout == b""
    assert files_here() == before


@pytest.mark.parametrize("picture", [True, False])
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_full_standard_output(start, here, picture):
    with open("/dev/full", "wb") as full:
        done = start([*ONE[:4], "-" if picture else "b.png", *ONE[5:]], stdout=full)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(b"error: cannot write to standard output: No space left on device")
    assert b"Traceback" not in done.stderr
    assert picture or load_picture(here / "b.png").shape == (128, 128)


@posix
@pytest.mark.parametrize("picture", [True, False])
def test_the_reader_has_gone(start, here, picture):
    reading, writing = os.pipe()
    os.close(reading)
    done = start([*ONE[:4], "-" if picture else "b.png", *ONE[5:]], stdout=writing)
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE  # noqa: TID251
    assert b"rror" not in done.stderr
    assert b"Traceback" not in done.stderr
    assert picture or load_picture(here / "b.png").shape == (128, 128)


@posix
@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_closed_streams(start, here, closed):
    """No file that is opened takes the place of a standard stream."""
    done = start(ONE, stdin=subprocess.DEVNULL, preexec_fn=lambda: [os.close(number) for number in closed])
    assert done.returncode == 0
    assert load_picture(here / "b.png").shape == (128, 128)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device")
def test_a_full_error_stream_stops_nothing(start, here):
    with open("/dev/full", "wb") as full:
        done = start(ONE, stderr=full)
    assert done.returncode == 0
    assert done.stdout.startswith(b"1 picture filled")


# --- standard input and output ------------------------------------------------------------------------------


class Pipe(io.TextIOWrapper):
    """A text stream over bytes, as the standard streams are."""

    def __init__(self, data: bytes = b"", terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data))
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.fixture
def piped(here, run, monkeypatch):
    """piped(stdin, *arguments): exit code, what came to standard output, lines of the error stream."""

    def call(given, *arguments):
        out = Pipe()
        monkeypatch.setattr(sys, "stdin", Pipe(given))
        monkeypatch.setattr(sys, "stdout", out)
        code, _, err = run(*arguments)
        out.flush()
        return code, out.buffer.getvalue(), err

    return call


@pytest.mark.parametrize("which", ["picture", "mask"])
@pytest.mark.parametrize("form", [None, "png", "jpg", "TIF", "webp"])
def test_a_pipe(piped, run, which, form):
    run(*ONE)
    expected = load_picture("b.png").pixels
    picture, mask = ("-", "m.png") if which == "picture" else ("a.png", "-")
    given = Path("a.png" if which == "picture" else "m.png").read_bytes()
    arguments = [picture, "--mask", mask, "--out", "-", *ONE[5:], *(["--format", form] if form else [])]
    code, out, err = piped(given, *arguments)
    assert code == 0, err
    found = load_picture(NamedBytes("out", out))
    assert found.format == {"jpg": "JPEG", "TIF": "TIFF", "webp": "WEBP"}.get(form, "PNG")
    assert np.array_equal(found.pixels, expected) or form == "jpg"
    assert not any("filled" in line for line in err)  # the summary would be in the picture


def test_one_mask_of_standard_input_for_a_folder(piped, folder):
    code, _, _ = piped(Path("m.png").read_bytes(), "in", "--mask", "-", "--out", "out", *ONE[5:])
    assert code == 0
    assert sorted(os.listdir("out")) == ["a.png", "b.jpg", "c.png"]


def test_the_format_of_the_picture(piped):
    Image.open("a.png").save("a.bmp")
    for name, form in (("a.bmp", "PNG"), ("a.jpg", "JPEG")):
        Image.open("a.png").save(name)
        code, out, _ = piped(b"", name, "--mask", "m.png", "--out", "-", *ONE[5:])
        assert (code, load_picture(NamedBytes("out", out)).format) == (0, form)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-", "--mask", "-", "--out", "b.png"], "both '-'"),
        (["-", "--mask", ".", "--out", "b.png"], "is a folder and a picture from standard input"),
        (["-", "--mask", "m.png", "--out", "."], "name a file for the picture from standard input"),
        (["a.png", "--mask", "m.png", "--out", "-", "--save-comparison"], "no place beside --out -"),
        (["a.png", "--mask", "m.png", "--out", "b.png", "--format", "png"], "--format is for --out -"),
        (["a.png", "--mask", "m.png", "--out", "-", "--format", "gif"], "unknown suffix '.gif'"),
        (["-", "--mask", "m.png", "--out", "b.png"], "standard input is empty"),
    ],
)
def test_pipes_that_cannot_be(piped, arguments, words):
    code, out, err = piped(b"", *arguments)
    assert (code, out, len(err)) == (2, b"", 1)
    assert words in err[0]


def test_a_damaged_picture_in_a_pipe(piped):
    code, out, err = piped(b"no picture", "-", "--mask", "m.png", "--out", "-")
    assert (code, out, len(err)) == (2, b"", 1)
    assert "standard input is not a picture" in err[0]


def test_terminals_are_refused(monkeypatch):
    for stream in (None, Pipe(terminal=True)):
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(Exception, match="standard input is a terminal"):
            console.read_stdin()
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(Exception, match="standard output is a terminal"):
            console.binary_stdout()


# --- results that exist -------------------------------------------------------------------------------------


@posix
def test_overwrite_keeps_permissions_and_links(run, here):
    (here / "store").mkdir()
    for name in ("b.png", "store/real.png"):
        (here / name).write_bytes(b"old")
        (here / name).chmod(0o600)
    (here / "l.png").symlink_to("store/real.png")
    for name in ("b.png", "l.png"):
        assert run(*ONE[:4], name, *ONE[5:], "--overwrite")[0] == 0
    assert (here / "l.png").is_symlink()
    for name in ("b.png", "store/real.png"):
        assert stat.S_IMODE((here / name).stat().st_mode) == 0o600
        assert load_picture(here / name).shape == (128, 128)


@posix
def test_a_link_to_nothing_is_there_and_kept(run, here):
    (here / "b.png").symlink_to("outside.png")
    code, _, err = run(*ONE)
    assert code == 0
    assert err[-1] == "note: b.png exists and is kept; --overwrite replaces it"
    assert not (here / "outside.png").exists()


def test_what_is_kept_is_the_last_line(start, here):
    (here / "in").mkdir()
    (here / "out").mkdir()
    for name in ("a.png", "c.png", "d.png"):
        (here / "in" / name).write_bytes((here / "a.png").read_bytes())
        if name != "c.png":
            (here / "out" / name).write_bytes(b"precious")
    done = start(["in", "--mask", "m.png", "--out", "out", *ONE[5:]], stderr=subprocess.STDOUT)
    assert done.returncode == 0
    last = done.stdout.decode().splitlines()[-1]
    assert last == f"note: out{os.sep}a.png, out{os.sep}d.png exist and are kept; --overwrite replaces them"
