"""The user's cache folder: what is kept, what goes, and what is not read."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from moebius_runtime.files.cache import Kept, Store, cache_folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "kept", 100)


def test_what_is_written_is_read(store):
    assert store.read("a") is None
    assert store.write("a", b"1" * 60) is None
    assert store.read("a") == b"1" * 60
    assert sorted(path.name for path in store.folder.iterdir()) == ["a"]


def test_the_least_recently_used_go(store):
    for index, name in enumerate("abc"):
        assert store.write(name, b"x" * 40) is None
        os.utime(store.folder / name, (1000 + index, 1000 + index))
    assert sorted(path.name for path in store.folder.iterdir()) == ["b", "c"]  # three do not fit
    assert store.read("b")  # which makes it the newest
    store.write("d", b"x" * 40)
    assert sorted(path.name for path in store.folder.iterdir()) == ["b", "d"]


def test_too_large(store):
    assert store.write("a", b"x" * 101) == "0 MiB are over the limit of 0 MiB"
    store.folder.mkdir()
    (store.folder / "a").write_bytes(b"x" * 101)
    assert store.read("a") is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in Store(tmp_path / "file" / "kept", 100).write("a", b"1")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("which", ["file", "folder"])
def test_what_others_could_have_written_is_not_read(store, which):
    store.write("a", b"1")
    (store.folder / "a" if which == "file" else store.folder).chmod(0o777)
    assert store.read("a") is None
    if which == "folder":
        assert "another user" in store.write("a", b"2")


def test_only_changes_are_written(store):
    kept = Kept(store, "a")
    assert kept.read() is None
    assert kept.write(b"1") is None
    (store.folder / "a").unlink()
    assert kept.write(b"1") is None
    assert not (store.folder / "a").exists()
    assert kept.write(b"2") is None
    assert Kept(store, "a").read() == b"2"


@pytest.mark.skipif(os.name == "nt", reason="other folders")
def test_where(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MOEBIUS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "moebius-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "moebius-edge"


@pytest.mark.parametrize("lost", ["old", "new", "folder"])
def test_another_process_trims_at_the_same_time(store, monkeypatch, lost):
    """Between the list of files and the look at one, it is gone: the blob was written all the same."""
    store.write("old", b"x" * 40)
    real = Path.iterdir

    def iterdir(folder):
        if lost == "folder":
            shutil.rmtree(folder)
        found = list(real(folder))
        (folder / lost).unlink()
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert store.write("new", b"x" * 80) is None
    monkeypatch.undo()
    assert (store.folder / "new").exists() == (lost == "old")


def test_another_process_deletes_a_blob_first(store, monkeypatch):
    """Between the look at a blob and its deletion."""
    store.write("old", b"x" * 40)
    real = Path.unlink

    def unlink(path, *args, **kwargs):
        if path.name == "old":
            real(path)
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert store.write("new", b"x" * 80) is None
    assert [path.name for path in store.folder.iterdir()] == ["new"]
