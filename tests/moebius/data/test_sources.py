from __future__ import annotations

import io
import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius.data.photographs import MORE_PHOTOGRAPHS, PHOTOGRAPHS, MorePhotographSource, PhotographSource
from moebius.data.pictures import BrokenPicture, decode, decode_mask
from moebius.data.sources import FolderSource, JoinedSource, JsonLinesSource, SceneSource
from moebius.errors import DataError

MADE = runpy.run_path(str(Path(__file__).with_name("made.py")))
mask_png, png = MADE["mask_png"], MADE["png"]


def names(source, epoch=0, seed=0, start=0):
    return [entry.name for entry in source.entries(epoch, seed, start)]


def test_a_folder(folder):
    (folder / "notes.txt").write_text("not a picture")
    source = FolderSource(folder)
    assert len(source) == 12
    assert sorted(names(source)) == sorted(source.names)
    assert "b/c/00.png" in source.names
    assert names(source) == names(source)
    assert names(source) != names(source, epoch=1)
    assert names(source) != names(source, seed=1)
    assert names(source, start=5) == names(source)[5:]
    entry = next(iter(source.entries(0, 0)))
    item = entry.load()
    assert item.image.mode == "RGB"
    assert item.image.getpixel((0, 0))[0] == int(entry.name[-6:-4]) * 20
    assert (item.mask, item.task) == (None, "background")


def test_folders_without_pictures_are_refused(tmp_path):
    for bad in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError):
            FolderSource(bad)


@pytest.mark.skipif(os.name == "nt", reason="links and pipes")
def test_links_and_pipes_do_not_lead_out(folder, tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(png(1))
    (folder / "out.png").symlink_to(outside)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "inside.png").symlink_to(folder / "a" / "01.png")
    os.mkfifo(folder / "pipe.png")  # noqa: TID251
    (folder / "dir.png").mkdir()
    entries = {entry.name: entry for entry in FolderSource(folder).entries(0, 0)}
    assert "dir.png" not in entries
    assert entries["inside.png"].load().image.size == (48, 40)
    for name, why in (
        ("out.png", "outside its folder"),
        ("pipe.png", "not a plain file"),
        ("loop.png", "oop|many levels"),
    ):
        with pytest.raises(BrokenPicture, match=why):
            entries[name].load()


def lines(tmp_path, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return path


def test_json_lines(tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").write_bytes(png(7))
    (tmp_path / "m.png").write_bytes(mask_png())
    path = lines(tmp_path, {"image": "p/a.png"}, b"  ", {"image": "p/a.png", "mask": "m.png", "task": "foreground"})
    source = JsonLinesSource(path)
    assert len(source) == 2
    first, second = (source.entry(index, 0).load() for index in range(2))
    assert (first.mask, first.task) == (None, "background")
    assert second.task == "foreground"
    assert np.asarray(second.mask).sum() == 255 * 20 * 15
    other = JsonLinesSource(lines(tmp_path, {"image": "p/a.png"}))
    assert other.fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (b"{", "not JSON"),
        (b"[" * 50_000, "not JSON"),
        (b'{"image": "\xff.png"}', "not JSON"),
        (b'"a.png"', "expected an object"),
        (b"7", "expected an object"),
        ({}, "expected a path"),
        ({"image": 3}, "expected a path"),
        ({"image": ""}, "expected a path"),
        ({"image": "a\0.png"}, "expected a path"),
        ({"image": "a\\..\\b.png"}, "expected a path"),
        ({"image": "/etc/passwd"}, "leads out"),
        ({"image": "C:/a.png"}, "leads out"),
        ({"image": "a/../../b.png"}, "leads out"),
        ({"image": "a.png", "mask": "../m.png"}, "leads out"),
        ({"image": "a.png", "maks": "m.png"}, "maks; expected an object"),
        ({"image": "a.png", "task": "sky"}, "task sky; expected background or foreground"),
        ({"image": "a.png", "task": ["background"]}, "expected background or foreground"),
        ({"image": "a.png", "task": "foreground"}, "without a mask"),
        ({"image": "a" * 70_000}, "over 65536 bytes"),
        ({"image": "\x1b[31m\n/a", "x": 1}, "expected an object"),
    ],
)
def test_hostile_lines(tmp_path, row, why):
    with pytest.raises(DataError, match=why) as caught:
        JsonLinesSource(lines(tmp_path, {"image": "a.png"}, row))
    assert "line 2" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 700


def test_json_lines_that_are_missing_or_empty(tmp_path):
    with pytest.raises(DataError, match="cannot read"):
        JsonLinesSource(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no row"):
        JsonLinesSource(lines(tmp_path, b"\n\n"))


def test_pictures_of_many_kinds():
    def saved(image, kind, **options):
        stream = io.BytesIO()
        image.save(stream, kind, **options)
        return stream.getvalue()

    deep = Image.fromarray(np.full((40, 40), 257 * 100, np.uint16))
    assert decode(saved(deep, "PNG")).getpixel((0, 0)) == (100, 100, 100)
    for mode in ("1", "L", "P", "RGBA", "LA"):
        assert decode(saved(Image.new(mode, (40, 40), 1), "PNG")).mode == "RGB"
    assert decode(saved(Image.new("CMYK", (40, 40)), "JPEG")).getpixel((5, 5)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(saved(Image.new("RGB", (64, 40)), "JPEG", exif=exif)).size == (40, 64)  # upright


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a",
        png(3)[:-100],
        png(3)[:60],
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 100,
        png(3, size=(31, 64)),
        b"<svg/>",
    ],
    ids=["empty", "gif", "cut", "header", "garbage", "small", "svg"],
)
def test_broken_pictures(data):
    with pytest.raises(BrokenPicture) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    data = png(3, size=(64, 64)).replace((64).to_bytes(4, "big") * 2, (60_000).to_bytes(4, "big") * 2)
    import zlib

    header = b"IHDR" + data[16:29]
    data = data[:29] + zlib.crc32(header).to_bytes(4, "big") + data[33:]
    with pytest.raises(BrokenPicture):
        decode(data)


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(BrokenPicture, match="48 x 40"):
        decode_mask(mask_png(), (40, 48))


def test_scenes():
    source = SceneSource(5, 32, seed=2)
    assert sorted(names(source)) == [f"scene 2:{index}" for index in range(5)]
    assert sorted(names(source, epoch=1)) == sorted(names(source))
    fresh = SceneSource(5, 32, seed=2, fresh=True)
    assert not set(names(fresh, epoch=1)) & set(names(fresh))
    image = source.entry(3, 0).load().image
    assert image.size == (32, 32)
    held = SceneSource(5, 32, seed=2, held_out=True)
    assert held.entry(3, 0).load().image.tobytes() != image.tobytes()
    assert len({source.fingerprint(), fresh.fingerprint(), held.fingerprint()}) == 3
    with pytest.raises(DataError):
        SceneSource(0, 32)


def test_joined(folder):
    scenes, pictures = SceneSource(3, 32), FolderSource(folder)
    joined = JoinedSource([(scenes, 2), (pictures, 1)])
    assert len(joined) == 18
    drawn = names(joined)
    assert drawn.count("scene 0:1") == 2
    assert all(drawn.count(name) == 1 for name in pictures.names)
    with pytest.raises(DataError):
        JoinedSource([])
    with pytest.raises(DataError):
        JoinedSource([(scenes, 0)])


def test_photographs():
    train, held_out = PhotographSource(), PhotographSource(held_out=True)
    assert not set(names(train)) & set(names(held_out))
    assert {photograph.file for photograph in PHOTOGRAPHS} == set(names(train)) | set(names(held_out))
    assert len({photograph.sha256 for photograph in PHOTOGRAPHS}) == len(PHOTOGRAPHS) == 11
    assert {"chelsea.png", "coffee.png"} < set(names(held_out))  # the golden files and the demo show them
    assert len(held_out) == 3
    for source in (train, held_out):
        for entry in source.entries(0, 0):
            assert min(entry.load().image.size) >= 300
    assert all("CC0" in photograph.rights or "public domain" in photograph.rights for photograph in PHOTOGRAPHS)


def test_their_rights_are_what_scikit_image_says():
    """The docstring of each function names CC0 or the public domain."""
    import skimage.data

    functions = {"clock_motion.png": "clock"}
    for photograph in PHOTOGRAPHS:
        function = getattr(skimage.data, functions.get(photograph.file, photograph.file.split(".")[0]))
        text = " ".join(function.__doc__.split())
        assert any(words in text for words in ("CC0", "public domain")), photograph.file


def test_a_third_of_all_photographs_is_held_out_and_every_licence_is_free():
    every = [*PHOTOGRAPHS, *MORE_PHOTOGRAPHS]
    assert len({photograph.sha256 for photograph in every}) == len({photograph.file for photograph in every}) == 21
    assert sum(photograph.held_out for photograph in every) == 7
    free = ("CC0", "public domain", "CC BY 2.0, ")  # the last one with the photographer's name
    assert all(any(licence in photograph.rights for licence in free) for photograph in every)


def test_photographs_of_other_packages_are_found_by_hash(monkeypatch, tmp_path):
    """In any folder below, beside other files of the same name."""
    import hashlib

    from moebius.data import photographs
    from moebius.data.photographs import Photograph

    with pytest.raises(DataError, match="not a folder"):
        MorePhotographSource(tmp_path / "none")
    with pytest.raises(DataError, match="does not hold img-"):
        MorePhotographSource(tmp_path)
    made = {}
    for number in range(2):
        place = tmp_path / "node_modules" / f"copy{number}" / "img-a" / "data"
        place.mkdir(parents=True)
        made[number] = png(number + 1)
        (place / "image.png").write_bytes(made[number])
    listed = [
        Photograph("img-a/data/image.png", hashlib.sha256(made[1]).hexdigest(), "CC0", held_out, "p")
        for held_out in (False, True)
    ]
    monkeypatch.setattr(photographs, "MORE_PHOTOGRAPHS", tuple(listed))
    source = MorePhotographSource(tmp_path)
    assert len(source) == 1
    (entry,) = source.entries(0, 0)
    assert entry.load().image.tobytes() == decode(made[1]).tobytes()
    moved = tmp_path / "elsewhere"
    (tmp_path / "node_modules").rename(moved)
    assert MorePhotographSource(moved).fingerprint() == source.fingerprint()
    (moved / "copy1" / "img-a" / "data" / "image.png").write_bytes(made[0])
    with pytest.raises(DataError, match=r"does not hold img-a/data/image.png of p, or another version"):
        MorePhotographSource(moved)


def test_another_file_or_no_scikit_image_is_refused(monkeypatch, tmp_path):
    from moebius.data import photographs

    monkeypatch.setattr(photographs, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="not installed"):
        PhotographSource()
    place = tmp_path / "skimage"
    (place / "data").mkdir(parents=True)
    monkeypatch.setattr(
        photographs, "find_spec", lambda name: type("Spec", (), {"submodule_search_locations": [str(place)]})
    )
    with pytest.raises(DataError, match=r"scikit-image's astronaut.png"):
        PhotographSource()
    (place / "data" / "astronaut.png").write_bytes(png(1))
    with pytest.raises(DataError, match="another file"):
        PhotographSource()
