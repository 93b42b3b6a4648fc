from __future__ import annotations

import io
import json
import os
import runpy
import tarfile
from pathlib import Path

import numpy as np
import pytest

from moebius.data.pictures import BrokenPicture
from moebius.data.tars import TarSource
from moebius.errors import DataError

MADE = runpy.run_path(str(Path(__file__).with_name("made.py")))
mask_png, png, write_tar = MADE["mask_png"], MADE["png"], MADE["write_tar"]


@pytest.fixture
def shards(tmp_path):
    for shard in range(3):
        members = [(f"{shard}/{index:03d}.png", png(shard * 64 + index)) for index in range(20)]
        write_tar(tmp_path / f"s{shard}.tar", members)
    return tmp_path


def values(source, epoch=0, seed=0, start=0):
    return [entry.load().image.getpixel((0, 0))[0] for entry in source.entries(epoch, seed, start)]


def outcomes(path, **options):
    """Names to items, or to reasons."""
    result = {}
    for entry in TarSource([path], **options).entries(0, 0):
        try:
            result[entry.name] = entry.load()
        except BrokenPicture as broken:
            result[entry.name] = str(broken)
    return result


def test_every_sample_once_in_an_order_of_the_seed(shards):
    source = TarSource([shards], buffer=16)
    drawn = values(source)
    assert sorted(drawn) == sorted(shard * 64 + index for shard in range(3) for index in range(20))
    assert drawn == values(TarSource([shards], buffer=16))
    assert drawn != values(source, epoch=1)
    assert drawn != values(source, seed=1)
    assert drawn != sorted(drawn)
    assert values(source, start=23) == drawn[23:]
    assert values(TarSource([shards], buffer=1), 0) != drawn


def test_the_buffer_mixes_tars(shards):
    """With a buffer larger than a tar, neighbours come from different ones."""
    drawn = np.array(values(TarSource([shards], buffer=40))) // 64
    assert (np.diff(drawn) != 0).mean() > 0.35
    assert (np.diff(np.array(values(TarSource([shards], buffer=1))) // 64) != 0).sum() == 2


def test_nothing_is_read_before_it_is_asked_for(shards, monkeypatch):
    opened = []
    real = tarfile.open
    monkeypatch.setattr(tarfile, "open", lambda path, mode: opened.append(path) or real(path, mode))
    entries = TarSource([shards], buffer=4).entries(0, 0)
    assert opened == []
    next(entries)
    assert len(opened) == 1


def test_masks_and_tasks(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("x/1.png", png(1)),
            ("x/1.json", json.dumps({"task": "foreground", "caption": "a cat"}).encode()),
            ("x/1.mask.png", mask_png()),
            ("x/1.txt", b"a cat"),
            ("x/2.PNG", png(2)),
            ("x/2.json", b"{}"),
        ],
    )
    found = outcomes(path)
    assert found["1"].task == "foreground"
    assert np.asarray(found["1"].mask).any()
    assert (found["2"].mask, found["2"].task) == (None, "background")


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([("1.png", png(1)), ("1.json", b"{")], "JSON"),
        ([("1.png", png(1)), ("1.json", b"[" * 60_000)], "JSON"),
        ([("1.png", png(1)), ("1.json", b'{"task": "x"}')], "expected background or foreground"),
        ([("1.png", png(1)), ("1.json", b'"sky"')], "expected background or foreground"),
        ([("1.png", png(1)), ("1.json", b" " * 70_000)], "are over 65536"),
        ([("1.png", png(1)), ("1.json", b'{"task": "foreground"}')], "without a mask"),
        ([("1.png", png(1)), ("1.jpg", png(1))], "2 pictures"),
        ([("1.png", png(1)), ("1.png", png(1))], "twice"),
        ([("1.mask.png", mask_png())], "0 pictures"),
        ([("1.png", png(1)), ("1.mask.png", mask_png((40, 40)))], "its mask is of"),
        ([("1.png", b"no picture")], "not a whole picture"),
        ([("1.json", b"{}")], "0 pictures"),
    ],
)
def test_samples_that_cannot_be_used_say_why(tmp_path, members, why):
    found = outcomes(write_tar(tmp_path / "a.tar", [*members, ("2.png", png(2))]))
    assert why in found["1"]
    assert found["2"].image.size == (48, 40)


def test_hostile_names_touch_nothing(tmp_path):
    inside = tmp_path / "in"
    inside.mkdir()
    bad = ["/abs/1.png", "../../up.png", "a/../../b.png", "\x1b[31mred.png", "n" * 300 + ".png", "..", ".png", "é.png"]
    path = write_tar(inside / "a.tar", [(name, png(3)) for name in bad])
    before = sorted(tmp_path.rglob("*"))
    found = outcomes(path)
    assert sorted(tmp_path.rglob("*")) == before
    assert all(name.isprintable() and "/" not in name and len(name) <= 200 for name in found)


def test_links_and_devices_are_not_followed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("1.png", tarfile.SYMTYPE), ("2.png", tarfile.LNKTYPE), ("3.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        sparse = tarfile.TarInfo("5.png")
        sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 0
        tar.addfile(sparse)
        folder = tarfile.TarInfo("d.png")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("4.png")
        info.size = len(png(4))
        tar.addfile(info, io.BytesIO(png(4)))
    found = outcomes(path)
    assert set(found) == {"1", "2", "3", "4", "5"}
    assert all("not a plain file" in found[name] for name in "1235")


@pytest.mark.parametrize("keep", [100, 512, 700, 1024, 1500, 1536, 3000])
def test_a_tar_that_breaks_off_is_told(tmp_path, keep):
    path = write_tar(tmp_path / "a.tar", [(f"{index}.png", png(index)) for index in range(5)])
    path.write_bytes(path.read_bytes()[:keep])
    found = outcomes(path)
    assert "not a whole, plain tar" in found["a.tar"]


def test_a_damaged_header_is_told(tmp_path):
    path = write_tar(tmp_path / "a.tar", [(f"{index}.png", png(index)) for index in range(5)])
    data = path.read_bytes()
    place = data.index(b"2.png")
    path.write_bytes(data[:place] + b"?" * 512 + data[place + 512 :])
    found = outcomes(path)
    assert {"0", "1"} < set(found)
    assert f"no header and no end at byte {place}" in found["a.tar"]


def test_compressed_tars_are_told(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("1.png"))
    assert "not a whole, plain tar" in outcomes(tmp_path / "a.tar")["a.tar"]


def test_headers_that_lead_backwards_end(tmp_path):
    """A negative size would send the reader back to the same header for ever."""
    path = write_tar(tmp_path / "a.tar", [("1.png", png(1)), ("2.png", png(2))])
    data = bytearray(path.read_bytes())
    data[124:136] = b"\xff" * 10 + (-1536 & 0xFFFF).to_bytes(2, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    assert any("not a whole, plain tar" in str(value) for value in outcomes(path).values())


def test_refusals(tmp_path):
    for paths in ([], [tmp_path], [tmp_path / "none.tar"]):
        with pytest.raises(DataError, match="tar"):
            TarSource(paths)
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="buffer"):
        TarSource([tmp_path], buffer=0)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "b.tar")  # noqa: TID251
        with pytest.raises(DataError, match="tar file"):
            TarSource([tmp_path])
