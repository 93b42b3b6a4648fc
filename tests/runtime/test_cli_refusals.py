"""`moebius-inpaint` refuses bad input: exit code 2, one line, no file changed."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.pipeline import InpaintPipeline


def pixels(height: int = 128, width: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


ONE = ["a.png", "--mask", "m.png", "--out", "b.png", "--threads", "1", "--steps", "3"]


ALL = ["in", "--mask", "m.png", "--out", "out/deep", "--threads", "1", "--steps", "2"]


def with_option(name: str, value: object) -> list[object]:
    """`ONE` with an option changed."""
    arguments: list[object] = list(ONE)
    if name in arguments:
        arguments[arguments.index(name) + 1] = value
        return arguments
    return [*arguments, name, value]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("--steps", 0, "number of steps is 0"),
        ("--steps", 1001, "from 1 to 1000"),
        ("--steps", "many", "'--steps': "),
        ("--strength", 0, "strength is 0"),
        ("--strength", 1.5, "strength is 1.5"),
        ("--strength", "nan", "strength is nan"),
        ("--strength", 0.01, "keeps none of 3 steps"),
        ("--guidance-scale", -1, "guidance scale -1"),
        ("--guidance-scale", "inf", "guidance scale inf"),
        ("--guidance-scale", "nan", "guidance scale nan"),
        ("--seed", -1, "seed is -1"),
        ("--seed", 2**32, "seed is 4294967296"),
        ("--seed", "1.5", "'--seed': "),
        ("--sampler", "euler", "'euler' is not one of"),
        ("--fit", "square", "'square' is not one of"),
        ("--blend", "none", "'none' is not one of"),
        ("--mask-reduce", "min", "'min' is not one of"),
        ("--mask-dilate", -1, "--mask-dilate"),
        ("--mask-dilate", "much", "--mask-dilate much: expected auto or a whole number"),
        ("--mask-orientation", "turned", "'turned' is not one of"),
        ("--start", "noise", "'noise' is not one of"),
        ("--mode", "quick", "'quick' is not one of"),
        ("--mask-dilate", 10**9, "marks every pixel"),
        ("--quality", 0, "--quality"),
        ("--quality", 101, "--quality"),
        ("--threads", 0, "--threads"),
        ("--threads", 10**9, "threads is 1000000000; expected 1 to 1024"),
        ("--runtime", "tensorrt", "runs on the GPU, which takes no number of threads"),
        ("--runtime", "gpu", "there is no runtime 'gpu'; use one of: auto, ort-cpu"),
        ("--unknown", 1, "--unknown"),
        ("--out", "b.gif", "unknown suffix '.gif'"),
        ("--out", "b", "unknown suffix ''"),
        ("--out", "missing/b.png", "No such file or directory"),
        ("--out", "m.png/b.png", "Not a directory"),
        ("--out", "a.png", "would overwrite"),
        ("--out", "m.png", "would overwrite"),
        ("--mask", "missing.png", "there is no mask"),
        ("--mask", ".", "is a folder"),
        ("--bundle", "missing", "moebius-export onnx"),
        ("--bundle", "a.png", "Not a directory"),
    ],
)
def test_an_option_out_of_range(refused, name, value, words):
    refused(with_option(name, value), words)


@pytest.mark.parametrize("arguments", [["a.png"], ["a.png", "--mask", "m.png"], ["--mask", "m.png", "--out", "b.png"]])
def test_a_missing_argument(refused, arguments):
    refused(arguments, "Missing", "--help")


def test_help_without_arguments_and_on_request(run):
    assert run()[0] in (0, 2)  # which of them, Click's versions see differently
    code, out, err = run("--help")
    assert code == 0
    assert "--guidance-scale" in out
    assert err == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"this is text", "is not a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "a.png"),
        (None, "there is no picture"),
    ],
)
def test_an_unreadable_picture(refused, data, words):
    Path("a.png").unlink() if data is None else Path("a.png").write_bytes(data)
    refused(ONE, words)


def test_a_truncated_picture(refused):
    Path("a.png").write_bytes(Path("a.png").read_bytes()[:-2000])
    refused(ONE, "a.png", "cannot be decoded")


@pytest.mark.parametrize(
    ("width", "height", "words"), [(12_000, 9_000, "12000x9000 pixels"), (90_000, 90_000, "8100000000 pixels")]
)
def test_a_bomb(refused, width, height, words):
    """A few hundred bytes that would be gigabytes of pixels: refused by the header, ours or Pillow's limit first."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    Path("a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + Path("a.png").read_bytes()[33:])
    refused(ONE, words)


@pytest.mark.parametrize("mask", [False, True])
def test_libraries_in_c_do_not_speak_beside_the_error(here, mask, run_process):
    """libtiff writes to the process's error stream, past Python; Pillow logs."""
    data = io.BytesIO()
    Image.fromarray(pixels()).save(data, "TIFF", compression="tiff_adobe_deflate")
    at = data.getvalue().index(b"\x78")  # where the compressed rows begin
    damaged = data.getvalue()[:at] + b"\xff" * 50 + data.getvalue()[at + 50 :]
    (here / "x.tif").write_bytes(damaged)
    arguments = with_option("--mask", "x.tif") if mask else ["x.tif", *ONE[1:]]
    code, out, err = run_process(*arguments)
    assert (code, out, len(err)) == (2, "", 1), err
    assert "x.tif" in err[0]


def test_a_picture_that_is_too_small(refused):
    Image.fromarray(pixels(63, 200)).save("a.png")
    refused(ONE, "200x63", "64")


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros((128, 128), np.uint8), "marks no pixel"),
        (np.full((128, 128), 255, np.uint8), "marks every pixel"),
        (np.eye(100, dtype=np.uint8) * 255, "--resize-mask"),
    ],
)
def test_masks_that_cannot_be(refused, mask, words):
    Image.fromarray(mask).save("m.png")
    refused(ONE, "m.png", words)


def test_a_format_that_cannot_hold_the_picture(refused):
    Image.fromarray(np.dstack([pixels(), np.full((128, 128), 9, np.uint8)])).save("a.png")
    refused(with_option("--out", "b.jpg"), "JPEG cannot hold alpha", ".png")


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text(path.read_text()[:-100]),
        lambda path: path.write_text(path.read_text().replace('"guidance_scale": 2.5', '"guidance_scale": 2.6')),
        lambda path: path.write_text(json.dumps({"schema_version": 2})),
        lambda path: path.unlink(),
    ],
)
def test_a_damaged_manifest(refused, toy_copy, damage):
    damage(toy_copy.path / "manifest.json")
    refused([*ONE, "--bundle", toy_copy.path], "manifest.json")


@pytest.mark.parametrize("name", ["unet/model.onnx", "unet/model.onnx.data", "vae_encoder/model.onnx"])
def test_a_damaged_graph(refused, toy_copy, name):
    path = toy_copy.path / name
    path.write_bytes(path.read_bytes()[:-1])
    refused([*ONE, "--bundle", toy_copy.path], name)


def test_the_runtime_is_not_installed(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused(ONE, 'pip install "moebius-edge[ort]"')


def test_a_file_in_place_of_the_output_folder(refused, here):
    (here / "in").mkdir()
    shutil.copy("a.png", "in/a.png")
    Path("file").touch()
    refused(["in", "--mask", "m.png", "--out", "file"], "is a file")
    refused(["in", "--mask", "m.png", "--out", "file/deeper"], "file/deeper", "Not a directory")


def test_the_output_folder_is_tried_before_the_work(run, here, monkeypatch):
    def work(*_args, **_more):
        pytest.fail("work began")

    monkeypatch.setattr(InpaintPipeline, "inpaint", work)
    assert run(*with_option("--out", "missing/b.png"))[0] == 2

    def refuse(path, mode):
        if mode == "xb":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return open(path, mode)

    monkeypatch.setattr("moebius_runtime.files.writing.open", refuse, raising=False)
    code, _, err = run(*ONE)
    assert code == 2
    assert len(err) == 1
    assert "cannot write b.png: Permission denied" in err[0]


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk(refused, monkeypatch, old):
    if old:
        Path("b.png").write_bytes(b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused([*ONE, "--overwrite"], "b.png", "No space left on device", "free some space")


def test_a_result_that_is_no_picture(refused, here, make_toy):
    weights = {"decoder_bias": np.full(3, np.nan, np.float32)}
    make_toy(here / "broken", weights=weights)
    refused([*ONE, "--bundle", "broken"], "NaN", "nothing was saved")


def test_such_a_result_in_a_folder(run, here, folder, make_toy):
    make_toy(here / "broken", weights={"decoder_bias": np.full(3, 1e6, np.float32)})
    code, out, err = run(*ALL, "--bundle", "broken")
    assert code == 1
    assert "0 pictures filled, 3 failed" in out
    assert sum("one flat colour" in line for line in err) == 3
    assert os.listdir("out/deep") == []


def test_too_little_memory(refused, monkeypatch):
    def exhausted(*_args, **_more):
        raise MemoryError

    monkeypatch.setattr(InpaintPipeline, "inpaint", exhausted)
    refused(ONE, "not enough memory")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of this kind")
def test_a_disk_that_takes_only_the_beginning_of_the_picture(here, run_process, files_here):
    """The kernel itself refuses what goes beyond 4 KiB."""
    import resource  # noqa: TID251
    import signal

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    before = files_here()
    code, out, err = run_process(*ONE, preexec_fn=limit)
    assert (code, out, len(err)) == (2, "", 1)
    assert "b.png: File too large" in err[0]
    assert files_here() == before


def test_hostile_graphs_say_one_line_too(here, toy_copy, reseal, run_process):
    """Also to the process's own error stream, to which ONNX Runtime writes past Python."""
    path = toy_copy.path / "vae_encoder/model.onnx"
    data = path.read_bytes()
    assert data.count(b"AveragePool") == 1
    path.write_bytes(data.replace(b"AveragePool", b"AveragePooh"))
    reseal(toy_copy.path)
    code, out, err = run_process(*ONE, "--bundle", toy_copy.path)
    assert (code, out, len(err)) == (2, "", 1), err
    assert "AveragePooh" in err[0]
