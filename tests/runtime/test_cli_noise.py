"""`--noise`: a file from anywhere, read without running or allocating what it says."""

from __future__ import annotations

import io
import os
import pickle  # noqa: TID251  (to see that none is read)
import struct
from pathlib import Path

import numpy as np
import pytest

ONE = ["a.png", "--mask", "m.png", "--out", "b.png", "--threads", "1", "--steps", "3"]


def npy(header: bytes, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    length = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + data


def saved(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Mine:
    """A pickle of this writes a file when it is read."""

    def __reduce__(self):
        return (open, ("pwned", "w"))


SHAPE = b"{'descr': '<f4', 'fortran_order': False, 'shape': %s, }"
GOOD = saved(np.zeros((1, 4, 16, 16), np.float32))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "expected a .npy file"),
        (b"text", "expected a .npy file"),
        (GOOD[:-1], "expected a .npy file"),
        (GOOD[:40], "expected a .npy file"),
        (GOOD[:9], "expected a .npy file"),
        (pickle.dumps(Mine()), "expected a .npy file"),
        (
            npy(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", pickle.dumps(Mine())),
            "expected a .npy file",
        ),
        (npy(b" " * 60_000), "expected a .npy file"),
        (npy(b"(" * 4000), "expected a .npy file"),
        (npy(b"'''"), "expected a .npy file"),
        (npy(b"{'descr': '<f4'"), "expected a .npy file"),
        (npy(b"__import__('os').system('touch pwned')"), "expected a .npy file"),
        (npy(SHAPE % b"(1, 4, 16, -16)", b"\0" * 4096), "expected a .npy file"),
        (npy(SHAPE % b"(1000000, 1000000)"), "expected a .npy file"),
        (npy(SHAPE % b"(99999999999, 99999999999, 99999999999)"), "expected a .npy file"),
        (npy(SHAPE % b"(4294967296, 4294967296)"), "expected a .npy file"),
        (npy(SHAPE % b"(1, 4, 16, 16)", version=b"\x09\x00"), "expected a .npy file"),
        (b"\0" * ((64 << 20) + 1), "over 64 MiB"),
        (saved(np.zeros((1, 4, 16, 16))), "noise is float64 [1, 4, 16, 16]; this bundle expects float32"),
        (saved(np.zeros((1, 4, 16, 16), ">f4")), "noise is >f4"),
        (saved(np.zeros((1, 4, 64, 64), np.float32)), "this bundle expects float32 [1, 4, 16, 16]"),
        (saved(np.zeros((4, 16, 16), np.float32)), "float32 [4, 16, 16]"),
        (saved(np.full((1, 4, 16, 16), np.nan, np.float32)), "NaN"),
        (saved(np.float32(1)), "float32 []"),
    ],
    ids=lambda value: repr(value[:24]) if isinstance(value, bytes) else "",
)
def test_noise_that_is_none(refused, data, words):
    Path("noise.npy").write_bytes(data)
    refused([*ONE, "--noise", "noise.npy"], words)
    assert not Path("pwned").exists()


def test_noise_from_no_file(refused, here, run_process):
    refused([*ONE, "--noise", "missing.npy"], "missing.npy", "No such file")
    refused([*ONE, "--noise", "."], "it is a folder")
    if hasattr(os, "mkfifo"):
        os.mkfifo(here / "pipe")  # noqa: TID251
        code, _, err = run_process(*ONE, "--noise", "pipe")
        assert code == 2
        assert "not a plain file" in err[0]


def test_a_fortran_ordered_array_is_as_good(run):
    noise = np.random.RandomState(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
    np.save("c.npy", noise)
    np.save("f.npy", np.asfortranarray(noise))
    for name in "cf":
        assert run("a.png", "--mask", "m.png", "--out", f"{name}.png", "--noise", f"{name}.npy")[0] == 0
    assert Path("c.png").read_bytes() == Path("f.png").read_bytes()
