"""Tars and tables as sources, tars as destinations, and what is refused of them."""

from __future__ import annotations

import csv
import io
import json
import os
import tarfile

import pytest

from moebius_batch.errors import StoreError
from moebius_batch.items import Blob
from moebius_batch.sources import Columns, open_source
from moebius_runtime.errors import InputError, RuntimeUnavailableError

from .conftest import OWN, make_pictures, mask_of, mask_png, png, report, results


def pack(path, members):
    """A tar of (name, bytes), in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(first, count, **more):
    for number in range(first, first + count):
        yield f"k{number}.jpg".replace("jpg", "png"), png(number)
        yield f"k{number}.mask.png", mask_png()
        yield f"k{number}.json", json.dumps({"caption": f"number {number}"}).encode()


@pytest.fixture
def tars(tmp_path):
    """Two tars with three samples each, whose keys are the same."""
    for name in ("b", "a"):
        pack(tmp_path / "tars" / f"{name}.tar", samples(0, 3))
    return tmp_path / "tars"


def members(path):
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_tar_in_tar_out(tars, job, tmp_path):
    out = tmp_path / "out"
    assert job(tars, out) == 0
    assert results(out).keys() == {"a.tar", "b.tar"}
    found = members(out / "a.tar")
    assert list(found) == [f"k{n}.{s}" for n in range(3) for s in ("png", "json")]
    assert json.loads(found["k1.json"]) == {"caption": "number 1"}
    assert report(out).keys() == {f"{tar}/k{n}" for tar in "ab" for n in range(3)}
    # The same pictures as files, in one process or by shares.
    assert job(tars, tmp_path / "files", write="folder") == 0
    files = results(tmp_path / "files")
    assert files == {f"{tar}/{n}": d for tar in "ab" for n, d in members(out / f"{tar}.tar").items() if n[-3:] == "png"}
    assert files["a/k0.png"] != files["b/k0.png"]  # other keys, other seeds
    for share in ((2, 2), (1, 2)):
        assert job(tars, tmp_path / "shares", share=share) == 0
    assert results(tmp_path / "shares") == results(out)


def test_one_tar(tars, job, tmp_path):
    assert job(tars / "a.tar", tmp_path / "out") == 0
    assert list(results(tmp_path / "out")) == ["a.tar"]


def test_folder_in_tars_out(job, tmp_path):
    source = make_pictures(tmp_path / "in", 20, broken=2)
    assert job(source, tmp_path / "out", masks=mask_of(source), write="tars") == 1
    assert job(source, tmp_path / "files", masks=mask_of(source)) == 1
    packed = {name: data for path in (tmp_path / "out").glob("*.tar") for name, data in members(path).items()}
    assert packed == results(tmp_path / "files")


def test_a_tar_that_was_not_finished_keeps_its_pictures(tars, job, tmp_path, monkeypatch):
    from moebius_batch import fill

    real, done = fill.Filler.__call__, []

    def stops(self, item):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(item.key)
        return real(self, item)

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(fill.Filler, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            job(tars, out)
    assert not list(out.glob("*.tar"))
    with monkeypatch.context() as patch:
        patch.setattr(fill.Filler, "__call__", lambda self, item: (done.append(item.key), real(self, item))[1])
        assert job(tars, out) == 0
    assert sorted(done) == sorted(set(done))
    job(tars, tmp_path / "single")
    assert results(out) == results(tmp_path / "single")
    assert not list((out / OWN / "open").iterdir())


def test_failed_pictures_of_a_tar_are_filled_again(job, tmp_path):
    broken = bytearray(png(1))
    broken[60:80] = bytes(20)
    path = pack(tmp_path / "t/a.tar", [("k0.png", png(0)), ("k0.mask.png", mask_png()), ("k1.png", bytes(broken)),
                                       ("k1.mask.png", mask_png())])  # fmt: skip
    out = tmp_path / "out"
    assert job(path.parent, out) == 1
    before = members(out / "a.tar")
    assert list(before) == ["k0.png"]
    data = path.read_bytes()
    path.write_bytes(data.replace(bytes(broken), png(1)))
    assert job(path.parent, out, retry_failed=True) == 0
    after = members(out / "a.tar")
    assert list(after) == ["k0.png", "k1.png"]
    assert after["k0.png"] == before["k0.png"]


def refusal(source, tmp_path, masks=None, columns=None):
    with pytest.raises(InputError) as caught:
        open_source(str(source), str(tmp_path / "out"), masks, columns or Columns(), 64)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_truncated_tars(tars, tmp_path):
    """Cut anywhere: inside a header, inside a picture, and at the end of one."""
    whole = (tars / "a.tar").read_bytes()
    for length in (100, 512, 700, 600 + len(png(0)), 5120, len(whole) // 2):
        (tars / "a.tar").write_bytes(whole[:length])
        assert "is not a whole, plain tar" in refusal(tars, tmp_path)
    (tars / "a.tar").write_bytes(b"")
    assert "is not a whole, plain tar" in refusal(tars, tmp_path)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["../k.png"], "cannot name a result"),
        (["/k.png"], "cannot name a result"),
        (["a/../../k.png"], "cannot name a result"),
        (["k.png", "j.png", "k.mask.png"], "the key 'k' comes twice"),
        (["k.png", "k.png"], "has a picture already"),
        (["k.png", "k.jpg"], "has a picture already"),
        ([".png"], "cannot name a result"),
    ],
)
def test_hostile_and_ambiguous_tars(names, text, tmp_path):
    pack(tmp_path / "t/a.tar", [(name, png(0)) for name in names])
    assert text in refusal(tmp_path / "t", tmp_path)


def test_links_and_compressed_tars_are_refused(tmp_path):
    (tmp_path / "t").mkdir()
    with tarfile.open(tmp_path / "t/a.tar", "w") as tar:
        info = tarfile.TarInfo("k.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    assert "is not a plain file" in refusal(tmp_path / "t", tmp_path)
    with tarfile.open(tmp_path / "t/a.tar", "w:gz") as tar:
        info = tarfile.TarInfo("k.png")
        tar.addfile(info)
    assert "is not a whole, plain tar" in refusal(tmp_path / "t", tmp_path)


def test_two_tars_of_one_name(tars, tmp_path):
    pack(tars / "sub/a.tar", samples(0, 1))
    assert "have one name" in refusal(tars, tmp_path)


def test_a_tar_that_changes_ends_the_job_and_a_truncated_one_that_is_listed_later_too(tars, job, tmp_path, monkeypatch):
    from moebius_batch import local

    real = local.run_shard

    def run(*arguments):
        with open(tars / "b.tar", "ab") as stream:
            stream.write(bytes(512))
        return real(*arguments)

    monkeypatch.setattr(local, "run_shard", run)
    with pytest.raises(InputError, match=r"b\.tar has changed since the job listed it"):
        job(tars, tmp_path / "out")
    assert list(results(tmp_path / "out")) == ["a.tar"]


def test_a_tar_that_is_replaced_by_one_of_its_size(tars, job, tmp_path, monkeypatch):
    """Between its listing and its shard, and within its shard: pictures of two tars must not mix."""
    from moebius_batch import fill, local

    real, status = local.run_shard, os.stat(tars / "b.tar")

    def run(settings, shard, *more):
        if shard.name == "b":
            os.utime(tars / "b.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
        return real(settings, shard, *more)

    with monkeypatch.context() as patch:
        patch.setattr(local, "run_shard", run)
        with pytest.raises(InputError, match=r"b\.tar has changed since the job listed it"):
            job(tars, tmp_path / "out")
    filled = fill.Filler.__call__

    def fills(self, item):
        done = filled(self, item)
        if item.key == "a/k0":
            os.utime(tars / "a.tar", ns=(status.st_atime_ns, os.stat(tars / "a.tar").st_mtime_ns + 10**9))
        return done

    monkeypatch.setattr(fill.Filler, "__call__", fills)
    for write in ("tars", "folder"):
        with pytest.raises(StoreError, match=r"a\.tar has changed since the job listed it"):
            job(tars, tmp_path / f"as-{write}", write=write)
    assert results(tmp_path / "as-folder").keys() == {"a/k0.png"}


# --- tables ---------------------------------------------------------------------------------------------------------


def write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pa = pytest.importorskip("pyarrow", reason="pip install 'moebius-edge[cloud]'")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables(suffix, job, tmp_path):
    source = make_pictures(tmp_path / "in", 4)
    (tmp_path / "m.png").write_bytes(mask_png())
    rows = [
        {"url": str(path) if number % 2 else path.relative_to(tmp_path).as_posix(), "mask": "m.png"}
        for number, path in enumerate(sorted(source.rglob("*.png")))
    ]
    table = write_table(tmp_path / f"table{suffix}", rows)
    assert job(table, tmp_path / "out") == 0
    assert results(tmp_path / "out").keys() == {f"p{number:05d}.png" for number in range(4)}
    named = [{**row, "name": f"n/{number}"} for number, row in enumerate(rows)]
    table = write_table(tmp_path / f"named{suffix}", named)
    assert job(table, tmp_path / "named", columns=Columns(key="name")) == 0
    assert results(tmp_path / "named").keys() == {f"n/{number}.png" for number in range(4)}


def test_a_table_s_missing_files_are_lines(job, tmp_path):
    source = make_pictures(tmp_path / "in", 2)
    rows = [{"url": "in/0/p00000.png"}, {"url": "in/none.png"}]
    table = write_table(tmp_path / "t.csv", rows)
    assert job(table, tmp_path / "out", masks=mask_of(source)) == 1
    lines = report(tmp_path / "out")
    assert lines["p00000"]["status"] == "ok"
    assert "No such file" in lines["none"]["error"]


def test_a_table_s_files_that_change_are_lines_and_a_changed_mask_for_all_ends_the_job(job, tmp_path, monkeypatch):
    from moebius_batch import local

    source = make_pictures(tmp_path / "in", 3)
    (tmp_path / "m.png").write_bytes(mask_png())
    rows = [{"url": f"in/{number}/p0000{number}.png", "mask": "m.png" if number else ""} for number in range(3)]
    table = write_table(tmp_path / "t.csv", rows)
    real, status = local.run_shard, os.stat(tmp_path / "m.png")

    def changing(path, data):
        def run(*arguments):
            path.write_bytes(data)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
            return real(*arguments)

        monkeypatch.setattr(local, "run_shard", run)

    changing(source / "1/p00001.png", (source / "1/p00001.png").read_bytes())
    assert job(table, tmp_path / "out", masks=mask_of(source)) == 1
    lines = report(tmp_path / "out")
    assert {key: line["status"] for key, line in lines.items()} == {"p00000": "ok", "p00001": "failed", "p00002": "ok"}
    assert "has changed since the job listed it" in lines["p00001"]["error"]
    changing(tmp_path / "in.mask.png", png(5))
    with pytest.raises(StoreError, match=r"the mask of all pictures, is not the file that it was when the job began"):
        job(table, tmp_path / "masked", masks=mask_of(source))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("t.csv", "link,mask\na.png,m.png\n", "has no column 'url' (its columns: 'link', 'mask')"),
        ("t.csv", "", "has no column 'url' (its columns: none)"),
        ("t.csv", "url,mask\n", "has no rows"),
        ("t.csv", "url,mask\na/x.png,m.png\nb/x.png,m.png\n", "the key 'x' comes twice"),
        ("t.csv", "url,mask,key\na.png,m.png,../a\n", "cannot name a result"),
        ("t.csv", "url,mask\n,m.png\n", "row 1: expected text in column 'url'"),
        ("t.csv", "url\na.png\n", "has a mask; give --masks"),
        ("t.csv", b"url\n\xff\xfe", "in UTF-8"),
        ("t.csv", 'url\n"a\n', "is not a whole .csv table"),
        ("t.jsonl", '{"url": "a.png"', "is not a whole .jsonl table"),
        ("t.jsonl", "[1]\n", "row 1 is no object"),
        ("t.jsonl", '{"url": 3}\n', "expected text in column 'url'"),
        ("t.jsonl", '{"url": "a.png", "mask": 3}\n', "in 'mask' text or nothing"),
        ("t.jsonl", "[" * 100000, "is not a whole .jsonl table"),
        ("t.parquet", b"PAR1", "is not a whole parquet file"),
        ("t.png", b"x", "is a file; expected a folder, a .tar or a table"),
    ],
)
def test_refused_tables(name, content, text, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow", reason="pip install 'moebius-edge[cloud]'")
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert text in refusal(path, tmp_path)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(RuntimeUnavailableError, match=r"moebius-edge\[cloud\]"):
        open_source(str(tmp_path / "t.parquet"), str(tmp_path / "out"), None, Columns(), 64)


# --- folders --------------------------------------------------------------------------------------------------------


def test_refused_folders(tmp_path):
    assert "there is no" in refusal(tmp_path / "none", tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no picture in" in refusal(tmp_path / "empty", tmp_path)
    source = make_pictures(tmp_path / "in", 3)
    assert "no picture of" in refusal(source, tmp_path)
    assert "there is no" in refusal(source, tmp_path, masks=str(tmp_path / "nomask.png"))
    (source / "0/p00000.jpg").write_bytes(b"x")
    assert "have one key" in refusal(source, tmp_path, masks=mask_of(source))
    (source / "0/p00000.jpg").unlink()
    pack(source / "a.tar", samples(0, 1))
    assert "holds both tars (a.tar) and pictures" in refusal(source, tmp_path, masks=mask_of(source))
    assert "chained URLs" in refusal("zip::/x/a.zip", tmp_path)


def test_links_to_folders_and_hidden_files_are_not_entered(tmp_path):
    source = make_pictures(tmp_path / "in", 3)
    make_pictures(tmp_path / "elsewhere", 3)
    (source / "link").symlink_to(tmp_path / "elsewhere")
    (source / "loop").symlink_to(source)
    (source / ".hidden.png").write_bytes(png(0))
    found = open_source(str(source), str(tmp_path / "out"), mask_of(source), Columns(), 64)
    assert found.pictures == 3
    assert found.mask == Blob(mask_of(source))


# --- destinations ---------------------------------------------------------------------------------------------------


def test_destinations_of_others_are_refused(job, tmp_path):
    source = make_pictures(tmp_path / "in", 3)
    masks = mask_of(source)
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds notes\.txt, and no record of a job"):
        job(source, out, masks=masks)
    (out / "notes.txt").unlink()
    assert job(source, out, masks=masks) == 0
    before = results(out)
    for change, text in (
        ({"seed": 1}, "its seed was 0 and is now 1"),
        ({"quality": 80}, "its quality was 95 and is now 80"),
        ({"options": {"steps": 2}}, "its options was"),
        ({"masks": str(source / "0/p00000.png")}, "its mask was"),
        ({"device": "GPU"}, "its device was null"),
        ({"write": "tars"}, "its write was"),
    ):
        with pytest.raises(InputError, match=text):
            job(source, out, **{"masks": masks, **change})
    many = make_pictures(tmp_path / "many", 20)
    assert job(many, tmp_path / "of-many", masks=masks) == 0
    with pytest.raises(InputError, match=r"number of shards \(--shard-size\) was 16 and is now 20"):
        job(many, tmp_path / "of-many", masks=masks, shard_size=1)
    (many / "0/p00000.png").rename(many / "0/p.png")
    with pytest.raises(InputError, match="its list of pictures was"):
        job(many, tmp_path / "of-many", masks=masks)
    (source / "0/new.png").write_bytes(png(7))
    with pytest.raises(InputError, match="its number of pictures was 3 and is now 4"):
        job(source, out, masks=masks)
    assert results(out) == before
    (out / OWN / "job.json").write_text("{")
    with pytest.raises(InputError, match="is damaged"):
        job(source, out, masks=masks)
    with pytest.raises(InputError, match="is a file; name a folder"):
        job(source, tmp_path / "in.mask.png", masks=masks)
