from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from moebius.data.opening import has_held_out, open_source
from moebius.data.photographs import PhotographSource
from moebius.data.sources import FolderSource, JsonLinesSource, SceneSource
from moebius.data.tars import TarSource
from moebius.errors import DataError

write_tar = runpy.run_path(str(Path(__file__).with_name("made.py")))["write_tar"]


def test_what_texts_mean(folder, tmp_path):
    assert isinstance(open_source(str(folder), 32), FolderSource)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"image": "a.png"}')
    assert isinstance(open_source(str(rows), 32), JsonLinesSource)
    tar = write_tar(tmp_path / "a.tar", [])
    assert isinstance(open_source(str(tar), 32), TarSource)
    assert isinstance(open_source(str(tmp_path), 32), TarSource)
    scenes = open_source("scenes:7:3", 32, held_out=True)
    assert isinstance(scenes, SceneSource)
    assert (len(scenes), scenes.seed, scenes.size, scenes.held_out) == (7, 3, 32, True)
    assert isinstance(open_source("photographs", 32), PhotographSource)


def test_sources_with_a_held_out_part():
    assert all(map(has_held_out, ("photographs", "photographs:folder", "scenes:4", "scenes:4:1")))
    assert not any(map(has_held_out, ("", "folder", "rows.jsonl", "photographs.tar")))
    with pytest.raises(DataError, match="no-such-folder is not a folder"):
        open_source("photographs:no-such-folder", 32)


@pytest.mark.parametrize("text", ["", "none", "scenes:0", "scenes:5:-1", "scenes", "a\0b", "x.jsonl"])
def test_refusals(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="expected scenes:COUNT"):
        open_source(text, 32)


def test_files_have_no_held_out_part(folder):
    with pytest.raises(DataError, match="another folder"):
        open_source(str(folder), 32, held_out=True)
    (folder / "a.txt").write_text("")
    with pytest.raises(DataError, match="another kind"):
        open_source(str(folder / "a.txt"), 32)
