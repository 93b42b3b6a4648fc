"""Hashes across processes: a file is hashed once per change, and a change is noticed whatever is restored after it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from moebius_runtime.files import hashes
from moebius_runtime.files.hashes import FileHashes


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "_LARGE", 4)
    monkeypatch.setattr(hashes, "_SETTLED", -1_000_000_000)  # files count as settled at once
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that were read and hashed."""
    found: list[str] = []
    real = hashes.sha256_file
    monkeypatch.setattr(hashes, "sha256_file", lambda path: found.append(path.name) or real(path))
    return found


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "weights").write_bytes(b"12345678")
    return tmp_path / "weights"


def right(path: Path) -> bool:
    """Whether a new process, with what earlier ones recorded, gives the file's hash."""
    return FileHashes().sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_another_process_hashes_it_only_after_a_change(cache, hashed, file):
    assert [right(file) for _ in range(3)] == [True] * 3
    assert hashed == ["weights"]
    file.write_bytes(b"123456789")
    assert [right(file) for _ in range(2)] == [True] * 2
    assert hashed == ["weights"] * 2
    assert FileHashes(rehash=True).sha256(file) == hashlib.sha256(b"123456789").hexdigest()
    assert hashed == ["weights"] * 3


@pytest.mark.skipif(os.name == "nt", reason="Windows records no time of change")
def test_an_exchange_with_equal_size_and_restored_time_is_noticed(cache, hashed, file):
    assert right(file)
    before = file.stat()
    file.write_bytes(b"87654321")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert right(file)
    other = file.with_name("other")
    other.write_bytes(b"abcdefgh")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)
    assert right(file)
    assert len(hashed) == 3


def test_a_file_that_has_just_changed_is_not_recorded(cache, hashed, file, monkeypatch):
    monkeypatch.setattr(hashes, "_SETTLED", 3_600_000_000_000)
    assert right(file)
    assert right(file)
    assert len(hashed) == 2
    assert not cache.exists()


def test_small_files_and_one_process(cache, hashed, file):
    file.write_bytes(b"123")
    one = FileHashes()
    for _ in range(3):
        one.sha256(file)
    assert hashed == ["weights"]
    assert not cache.exists()


@pytest.mark.parametrize(
    "record",
    [b"", b"null", b"[]", b"{}", b"[1, 2]", b'["a", "b", "c"]', b'[[1], "x"]', b"[" * 1000, b"\xff", b'[{"a": 1}, ""]'],
)
def test_a_damaged_record_is_not_used(cache, hashed, file, record):
    assert right(file)
    (path,) = cache.iterdir()
    path.write_bytes(record)
    assert right(file)
    assert len(hashed) == 2
    assert right(file)  # written again
    assert len(hashed) == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows protects the folder in another way")
def test_a_record_that_others_could_have_written_is_not_used(cache, hashed, file):
    assert right(file)
    (path,) = cache.iterdir()
    path.chmod(0o666)
    assert right(file)
    assert len(hashed) == 2
    cache.chmod(0o777)
    assert right(file)
    assert len(hashed) == 3


def test_a_cache_that_cannot_be_written_is_no_error(cache, hashed, file):
    cache.parent.write_bytes(b"a file where the folder should be")
    assert [right(file) for _ in range(2)] == [True] * 2
    assert len(hashed) == 2


def test_a_missing_file(cache, file):
    file.unlink()
    with pytest.raises(FileNotFoundError):
        FileHashes().sha256(file)
