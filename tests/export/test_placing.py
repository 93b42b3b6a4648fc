"""Folders that appear whole or not at all, and what killed processes leave behind."""

from __future__ import annotations

import os

import pytest

from moebius_runtime.errors import OutputError
from moebius_runtime.files import placed_whole


def fill(out, text):
    with placed_whole(out) as folder:
        (folder / "file").write_text(text)


def fill_half(out):
    with placed_whole(out) as folder:
        (folder / "file").write_text("half")
        assert (out / "file").read_text() == "old"
        raise KeyboardInterrupt


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_replaces_the_old_one_only_when_it_is_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    fill(out, "old")
    with pytest.raises(KeyboardInterrupt):
        fill_half(out)
    assert (out / "file").read_text() == "old"
    fill(out, "new")
    assert (out / "file").read_text() == "new"
    assert names(out.parent) == ["out"]


def test_what_was_left_behind_is_removed_and_what_is_in_use_is_not(tmp_path):
    out = tmp_path / "out"
    for name in (".out.dead.part", ".out.dead.old", ".out2.other.part", ".out.kept"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("left")
    (tmp_path / "target").mkdir()
    (tmp_path / ".out.link.part").symlink_to(tmp_path / "target")
    fill(out, "first")
    with placed_whole(out) as busy:
        fill(out, "second")
        assert busy.is_dir()
    assert names(tmp_path) == [".out.kept", ".out.link.part", ".out2.other.part", "out", "target"]


def test_a_folder_moved_away_by_a_killed_exchange_comes_back(tmp_path):
    out, old = tmp_path / "out", tmp_path / ".out.x.old"
    old.mkdir()
    (old / "file").write_text("old")
    with pytest.raises(RuntimeError), placed_whole(out):
        raise RuntimeError
    assert (out / "file").read_text() == "old"


def test_names_are_no_patterns(tmp_path):
    (tmp_path / ".ab.x.part").mkdir()
    fill(tmp_path / "a[b]", "x")
    fill(tmp_path / "*", "x")
    assert ".ab.x.part" in names(tmp_path)


def test_an_exchange_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    fill(out, "old")
    replace, calls = os.replace, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match="No space left on device"):
        fill(out, "new")
    monkeypatch.undo()
    assert (out / "file").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="Choose an existing, writable folder"):
        fill(tmp_path / "file" / "out", "x")


@pytest.mark.parametrize("kind", ["file", "link", "dangling"])
def test_what_is_no_folder_is_refused_before_any_work(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    else:
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / ("target" if kind == "link" else "nothing"))
    before = names(tmp_path)
    with pytest.raises(OutputError, match="a file or a link has that name"), placed_whole(out):
        raise AssertionError("the work began")
    assert names(tmp_path) == before


def test_a_name_that_no_folder_can_have(tmp_path):
    with pytest.raises(OutputError, match=r"cannot write .*null.* Choose an existing, writable folder"):
        fill(tmp_path / "a\0b", "x")
