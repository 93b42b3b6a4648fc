"""Files appear whole or not at all, also when the process dies or the disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from moebius_runtime.errors import OutputError
from moebius_runtime.files import MappedFile, atomic_write, check_writable, native_path, open_plain, sha256_file

RUNTIMES = Path(__file__).parents[2] / "runtimes"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_and_replaced(tmp_path):
    for text in (b"first", b"second, longer", b""):
        with atomic_write(tmp_path / "file") as stream:
            stream.write(text)
            assert stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
        assert (tmp_path / "file").read_bytes() == text
        assert names(tmp_path) == ["file"]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with atomic_write(target) as stream:
        stream.write(b"new")
        stream.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_error_in_the_block_leaves_everything_as_it_was(tmp_path, error):
    (tmp_path / "file").write_bytes(b"old")

    def write() -> None:
        with atomic_write(tmp_path / "file") as stream:
            stream.write(b"half")
            raise error("stopped")

    with pytest.raises(OutputError if error is OSError else error):
        write()
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_full_disk(tmp_path, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(OutputError, match=r"No space left on device.*free some space") as caught,
        atomic_write(tmp_path / "file") as stream,
    ):
        stream.write(b"data")
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == []


LIMITED = """
import resource, signal, sys
sys.path.insert(0, sys.argv[1])
from moebius_runtime.errors import OutputError
from moebius_runtime.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    with atomic_write(sys.argv[2]) as stream:
        for _ in range(100):
            stream.write(bytes(1 << 12))
except OutputError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of this kind")
def test_a_disk_that_takes_only_the_beginning(tmp_path):
    """The kernel itself refuses the bytes beyond 64 KiB."""
    (tmp_path / "file").write_bytes(b"old")
    command = [sys.executable, "-c", LIMITED, str(RUNTIMES), str(tmp_path / "file")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "File too large" in done.stdout
    assert done.stdout.count("\n") == 1
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from moebius_runtime.files import atomic_write
with atomic_write(sys.argv[2]) as stream:
    stream.write(b"n" * 100_000)
    stream.flush()
    print("written", flush=True)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_process_that_is_killed_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    command = [sys.executable, "-c", KILLED, str(RUNTIMES), str(tmp_path / "file")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)  # noqa: TID251
        process.wait(timeout=30)
    assert (tmp_path / "file").read_bytes() == b"old"
    left = [name for name in names(tmp_path) if name != "file"]
    assert all(name.startswith(".file.") and name.endswith(".part") for name in left)  # nobody could clear it away


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    (tmp_path / "folder").mkdir()
    for place, words in (
        (tmp_path / "missing" / "a", "No such file or directory"),
        (tmp_path / "file" / "a", "Not a directory"),
        (tmp_path / "folder", "folder"),
        (tmp_path / ("x" * 300), "too long"),
        (tmp_path / "a\0b", "null"),
    ):

        def write(place: Path = place) -> None:
            with atomic_write(place) as stream:
                stream.write(b"data")

        with pytest.raises(OutputError, match=words) as caught:
            write()
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]
    assert names(tmp_path / "folder") == []


def test_check_writable_tells_early_and_leaves_nothing(tmp_path):
    check_writable(tmp_path / "new")
    (tmp_path / "old").write_bytes(b"old")
    check_writable(tmp_path / "old")
    assert names(tmp_path) == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"
    for place in (tmp_path / "missing" / "a", tmp_path / "old" / "a", tmp_path):
        with pytest.raises(OutputError):
            check_writable(place)


def test_long_names_that_fit_can_be_written(tmp_path):
    with atomic_write(tmp_path / ("x" * 250)) as stream:
        stream.write(b"data")
    assert names(tmp_path) == ["x" * 250]


@pytest.mark.skipif(sys.platform == "win32", reason="no umask")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_are_as_readable_as_any_other(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_write(tmp_path / "file") as stream:
            stream.write(b"data")
        assert os.umask(mask) == mask  # and nothing has changed it
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_open_plain(tmp_path):
    (tmp_path / "file").write_bytes(b"data")
    with open_plain(tmp_path / "file") as stream:
        assert stream.read() == b"data"
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with open_plain(tmp_path / "link") as stream:
        assert stream.read() == b"data"
    refused = {tmp_path: "it is a folder", tmp_path / "nothing": "No such file", tmp_path / "a\0b": "NUL"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # noqa: TID251
        refused |= {tmp_path / "pipe": "not a plain file", Path("/dev/zero"): "not a plain file"}
    for place, words in refused.items():
        with pytest.raises(OSError, match=words) as caught:
            open_plain(place)
        assert caught.value.strerror


def test_sha256(tmp_path):
    for size in (0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1):
        data = bytes(range(256)) * (size // 256 + 1)
        (tmp_path / "file").write_bytes(data[:size])
        assert sha256_file(tmp_path / "file") == hashlib.sha256(data[:size]).hexdigest()


def test_a_mapped_file(tmp_path):
    content = os.urandom((2 << 20) + 3)
    path = tmp_path / "file"
    path.write_bytes(content)
    with MappedFile(path) as mapped:
        path.unlink()  # or replaced: the mapping stays whole
        assert len(mapped) == len(content)
        assert mapped.view == content
        assert mapped.view.readonly
        assert mapped.sha256() == hashlib.sha256(content).hexdigest()
    with pytest.raises(ValueError, match="released"):
        len(mapped)
    mapped.close()


def test_a_mapping_lives_as_long_as_a_buffer_of_it(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    mapped = MappedFile(tmp_path / "file")
    held = memoryview(mapped.view)
    mapped.close()
    assert held == b"content"


@pytest.mark.parametrize(("make", "words"), [(Path.touch, "it is empty"), (Path.mkdir, "it is a folder")])
def test_what_cannot_be_mapped(tmp_path, make, words):
    make(tmp_path / "it")
    with pytest.raises(OSError, match=words):
        MappedFile(tmp_path / "it")


# --- what is replaced ---------------------------------------------------------------------------------------

posix = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o444, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path, mode):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(mode)
    with atomic_write(tmp_path / "file") as stream:
        assert stat.S_IMODE(os.fstat(stream.fileno()).st_mode) == mode  # before anything is in it
        stream.write(b"new")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode
    assert (tmp_path / "file").read_bytes() == b"new"


@posix
@pytest.mark.parametrize(("mode", "expected"), [(0o660, 0o600), (0o640, 0o600), (0o664, 0o644), (0o666, 0o666)])
def test_a_group_that_cannot_be_kept_takes_its_rights_along(tmp_path, monkeypatch, mode, expected):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "file").chmod(mode)
    real = os.lstat

    def lstat(path):
        status = list(real(path))
        status[5] += 12345  # another group than a new file gets
        return os.stat_result(status)

    def refuse(*_args):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "lstat", lstat)
    monkeypatch.setattr(os, "fchown", refuse)
    with atomic_write(tmp_path / "file") as stream:
        assert stat.S_IMODE(os.fstat(stream.fileno()).st_mode) == expected


@posix
@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed_where_that_is_asked_for(tmp_path, there):
    (tmp_path / "store").mkdir()
    real = tmp_path / "store" / "real"
    if there:
        real.write_bytes(b"old")
        real.chmod(0o600)
    (tmp_path / "between").symlink_to("store/real")
    (tmp_path / "link").symlink_to("between")
    check_writable(tmp_path / "link", follow_links=True)
    with atomic_write(tmp_path / "link", follow_links=True) as stream:
        stream.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "between").is_symlink()
    assert real.read_bytes() == b"new"
    assert names(tmp_path / "store") == ["real"]
    assert stat.S_IMODE(real.stat().st_mode) == 0o600 or not there
    with atomic_write(tmp_path / "link") as stream:  # and replaced where it is not
        stream.write(b"newer")
    assert not (tmp_path / "link").is_symlink()
    assert real.read_bytes() == b"new"


@posix
def test_what_is_not_replaced(tmp_path):
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-folder").symlink_to("folder")
    os.mkfifo(tmp_path / "pipe")  # noqa: TID251
    for name, words in (("circle", "symbolic links"), ("to-folder", "a folder"), ("pipe", "a device or a pipe")):
        for act in (check_writable, lambda path, **more: atomic_write(path, **more).__enter__()):
            with pytest.raises(OutputError, match=words):
                act(tmp_path / name, follow_links=True)
    assert names(tmp_path) == ["circle", "folder", "pipe", "to-folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="paths of other systems are UTF-8")
def test_native_path(tmp_path):
    (tmp_path / "ünö").mkdir()
    with native_path(tmp_path / "ünö" / "x") as name:
        assert name == str(tmp_path / "ünö" / "x")
    folder = tmp_path / os.fsdecode(b"b\xfcn")
    folder.mkdir()
    (folder / "x").write_bytes(b"data")
    before = os.listdir("/proc/self/fd")
    with native_path(folder / "x") as name:
        assert name.encode("ascii")
        assert Path(name).read_bytes() == b"data"
    assert len(os.listdir("/proc/self/fd")) == len(before)
