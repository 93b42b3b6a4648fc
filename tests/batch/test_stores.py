"""Object stores: fsspec's memory, and S3 by a server on this machine."""

from __future__ import annotations

import functools
import http.server
import os
import sys
import threading
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from unittest.mock import Mock

import pytest

from moebius_batch import stores
from moebius_batch.errors import StoreError
from moebius_batch.keys import CONTROL
from moebius_batch.stores import Entry, LocalStore, joined, normal, store_of
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError

from .conftest import OWN, make_pictures, mask_of, mask_png, png, report, results
from .test_sources import pack, samples

CLOUD = "pip install 'moebius-edge[cloud]'"


@pytest.fixture
def memory():
    """A folder of fsspec's memory:// and its file system."""
    fsspec = pytest.importorskip("fsspec", reason=CLOUD)
    stores._store.cache_clear()
    files = fsspec.filesystem("memory")
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture(scope="module")
def server():
    """An S3 server with a bucket `b`, which s3fs finds by the environment."""
    pytest.importorskip("s3fs", reason=CLOUD)
    moto = pytest.importorskip("moto.server", reason="pip install 'moebius-edge[cloud,dev]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield server
    server.stop()


@pytest.fixture
def s3(server):
    import s3fs

    stores._store.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("bucket")
    yield files
    files.rm("bucket", recursive=True)
    stores._store.cache_clear()


def later(root, name):
    """A new time of change, however coarse the file system's clock is."""
    status = os.stat(joined(root, name))
    os.utime(joined(root, name), ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))


def test_versions_are_compared_where_both_sides_give_the_same_kind():
    listed = Entry("a", 3, "etag 1")
    assert listed.is_now(Entry("", 3, "etag 1"), 3)
    assert not listed.is_now(Entry("", 3, "etag 2"), 3)
    assert not listed.is_now(Entry("", 3, "etag 1"), 4)
    assert not listed.is_now(None, 3)
    assert listed.is_now(Entry("", 3, "mtime 5"), 3)
    assert listed.is_now(Entry("", 3), 3)
    assert Entry("a", -1).is_now(Entry("", 3, "etag 2"), 3)
    assert not Entry("a", -1, "etag 1").is_now(Entry("", 3, "etag 2"), 3)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"size": 3, "ETag": '"0f"', "LastModified": "x"}, Entry("n", 3, "etag 0f")),  # S3
        ({"size": 3, "etag": "0f", "last_modified": "x"}, Entry("n", 3, "etag 0f")),  # Azure
        ({"size": 3, "generation": "17", "mtime": "x"}, Entry("n", 3, "generation 17")),  # Google
        ({"size": 0, "mtime": 5.5}, Entry("n", 0, "mtime 5.500000")),  # SSH
        ({"size": 0, "created": datetime.fromtimestamp(5.5, timezone.utc)}, Entry("n", 0, "created 5.500000")),
        ({"size": None, "ETag": None}, Entry("n", -1)),  # a web server
    ],
)
def test_the_version_of_a_file_by_each_library_s_answer(info, expected):
    assert stores._entry("n", info) == expected


def test_a_file_that_changes_while_it_is_read(tmp_path, memory, monkeypatch):
    """Without a listing before it, as a table itself: what is read then may be half of each."""
    path = tmp_path / "a"
    path.write_bytes(b"123")
    real = stores.read_plain

    def read(url, limit):
        data = real(url, limit)
        path.write_bytes(b"12345")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(stores, "read_plain", read)
        with pytest.raises(InputError, match="has changed while it was read; leave the source alone"):
            store_of(str(path)).read(str(path))
    memory.pipe_file("/b/a", b"123")
    fetch = memory.cat_file

    def fetched(url, **more):
        data = fetch(url, **more)
        memory.pipe_file("/b/a", b"321")
        return data

    monkeypatch.setattr(type(memory), "cat_file", lambda self, url, **more: fetched(url, **more))
    with pytest.raises(InputError, match="has changed while it was read; leave the source alone"):
        store_of("memory://b/a").read("memory://b/a")


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_every_store_does_the_same(kind, request, tmp_path):
    if kind != "local":
        request.getfixturevalue(kind)
    root = {"local": str(tmp_path / "x"), "memory": "memory://x", "s3": "s3://bucket/x"}[kind]
    store = store_of(root)
    assert store.kind(root) is None
    store.write(joined(root, "a/b.png"), b"123")
    store.write(joined(root, "c.png"), b"4")
    store.write(joined(root, ".hidden"), b"4")
    store.write(joined(root, f"{CONTROL}/job.json"), b"4")
    assert [(entry.name, entry.size) for entry in store.listing(root)] == [("a/b.png", 3), ("c.png", 1)]
    assert [store.kind(joined(root, name)) for name in ("", "a", "c.png", "d")] == ["folder", "folder", "file", None]
    store.write(joined(root, "c.png"), b"56")
    (entry,) = [entry for entry in store.listing(root) if entry.name == "c.png"]
    assert store.read(joined(root, "c.png"), entry) == b"56"
    with pytest.raises(InputError, match=r"c\.png: .*over 0 KiB|over 0 MiB"):
        store.read(joined(root, "c.png"), limit=1)
    assert store.entry(joined(root, "c.png")) == replace(entry, name="")
    assert store.entry(joined(root, "none.png")) is store.entry(root) is None
    for other in (b"789", b"65"):  # the latter has the same size
        store.write(joined(root, "c.png"), other)
        if kind == "local":
            later(root, "c.png")
        with pytest.raises(InputError, match="has changed since the job listed it"):
            store.read(joined(root, "c.png"), entry)
        assert store.read(joined(root, "c.png")) == other
    with pytest.raises(InputError, match=r"none\.png"):
        store.read(joined(root, "none.png"))
    (tmp_path / "local").write_bytes(b"local")
    store.put(joined(root, "d"), tmp_path / "local")
    store.get(joined(root, "d"), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"local"
    appended = [store.append(joined(root, "log"), text) for text in (b"1\n", b"2\n")]
    assert appended == [kind == "local"] * 2
    store.remove(joined(root, "a"))
    store.remove(joined(root, "d"))
    store.remove(joined(root, "never"))
    assert {entry.name for entry in store.listing(root)} == {"c.png"} | ({"log"} if kind == "local" else set())


def upload(files, folder, target):
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files.pipe_file(f"{target}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def remote_results(files, target):
    root = files._strip_protocol(target)
    found = {path.removeprefix(f"{root}/"): files.cat_file(path) for path in files.find(target)}
    return {name: data for name, data in found.items() if OWN not in name}


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_from_store_to_store(kind, request, job, tmp_path):
    files = request.getfixturevalue(kind)
    root = {"memory": "memory://b", "s3": "s3://bucket"}[kind]
    source = make_pictures(tmp_path / "in", 8, broken=2)
    assert job(source, tmp_path / "out", masks=mask_of(source)) == 1
    upload(files, source, f"{root}/in")
    files.pipe_file(f"{root}/m.png", mask_png())
    masks = f"{root}/m.png"
    assert job(f"{root}/in", f"{root}/out", masks=masks) == 1
    assert remote_results(files, f"{root}/out") == results(tmp_path / "out")
    assert job(f"{root}/in", f"{root}/out", masks=masks) == 1  # finished before
    assert not files.find(f"{root}/out/{OWN}/open")
    assert job(f"{root}/in", tmp_path / "down", masks=masks) == 1
    assert results(tmp_path / "down") == results(tmp_path / "out")
    files.pipe_file(f"{root}/table.csv", b"url,mask\nin/0/p00000.png,m.png\n")
    assert job(f"{root}/table.csv", f"{root}/of-table") == 0
    assert remote_results(files, f"{root}/of-table").keys() == {"p00000.png"}


@pytest.mark.parametrize("kind", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_tars_in_a_store(kind, request, job, tmp_path):
    files = request.getfixturevalue(kind)
    root = {"memory": "memory://b", "s3": "s3://bucket"}[kind]
    for name in "ab":
        pack(tmp_path / "tars" / f"{name}.tar", samples(0, 2))
    upload(files, tmp_path / "tars", f"{root}/tars")
    assert job(tmp_path / "tars", tmp_path / "out") == 0
    assert job(f"{root}/tars", f"{root}/out") == 0
    assert remote_results(files, f"{root}/out") == results(tmp_path / "out")
    assert job(f"{root}/tars/a.tar", f"{root}/one") == 0
    assert remote_results(files, f"{root}/one").keys() == {"a.tar"}
    files.pipe_file(f"{root}/tars/b.tar", (tmp_path / "tars/b.tar").read_bytes()[:1000])
    with pytest.raises(InputError, match=r"b\.tar is not a whole, plain tar"):
        job(f"{root}/tars", f"{root}/cut")


@pytest.mark.parametrize("kind", ["memory", "s3"])
def test_a_remote_object_that_changes_and_keeps_its_size_is_a_line(kind, request, job, tmp_path, monkeypatch):
    from moebius_batch import local

    files = request.getfixturevalue(kind)
    root = {"memory": "memory://b", "s3": "s3://bucket"}[kind]
    upload(files, make_pictures(tmp_path / "in", 3), f"{root}/in")
    files.pipe_file(f"{root}/m.png", mask_png())
    real, other = local.run_shard, bytearray(files.cat_file(f"{root}/in/0/p00000.png"))
    other[-20] ^= 1

    def run(*arguments):
        files.pipe_file(f"{root}/in/0/p00000.png", bytes(other))
        return real(*arguments)

    monkeypatch.setattr(local, "run_shard", run)
    assert job(f"{root}/in", tmp_path / "out", masks=f"{root}/m.png") == 1
    lines = report(tmp_path / "out")
    assert "has changed since the job listed it" in lines["0/p00000"]["error"]
    assert sum(line["status"] == "ok" for line in lines.values()) == 2


def test_a_killed_process_s_pictures_are_kept_in_a_store_too(memory, job, tmp_path, monkeypatch):
    """Without a journal, which such a store cannot append to: what is there counts, failures are recorded at once."""
    from moebius_batch import fill
    from moebius_batch.destination import OpenShard

    source = make_pictures(tmp_path / "in", 12, broken=3)
    real, done = fill.Filler.__call__, []

    class Dies(BaseException):
        pass

    def dies(self, item):
        done.append(item.key)
        if len(done) == 9:
            raise Dies
        return real(self, item)

    with monkeypatch.context() as patch:
        patch.setattr(fill.Filler, "__call__", dies)
        patch.setattr(OpenShard, "stopped", lambda self: None)
        with pytest.raises(Dies):
            job(source, "memory://b/out", masks=mask_of(source), shard_size=1000)
    again = []
    monkeypatch.setattr(fill.Filler, "__call__", lambda self, item: (again.append(item.key), real(self, item))[1])
    assert job(source, "memory://b/out", masks=mask_of(source), shard_size=1000) == 1
    assert not set(done[:8]) & set(again)
    assert {*done, *again} == {path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.png")}
    assert job(source, tmp_path / "single", masks=mask_of(source)) == 1
    assert remote_results(memory, "memory://b/out") == results(tmp_path / "single")


def test_a_store_without_whole_objects_gets_temporary_names(tmp_path, monkeypatch):
    """Such as a server by SSH; fsspec's own local files stand for it."""
    fsspec = pytest.importorskip("fsspec", reason=CLOUD)
    store = stores.RemoteStore("file")
    target = f"file://{tmp_path}/sub/a"
    store.write(target, b"1")
    store.write(target, b"22")
    assert (tmp_path / "sub/a").read_bytes() == b"22"
    with monkeypatch.context() as patch:
        patch.setattr(type(fsspec.filesystem("file")), "mv", Mock(side_effect=OSError("broken")))
        with pytest.raises(StoreError, match="broken"):
            store.write(target, b"333")
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["a"]


def test_a_web_server_that_fails_is_a_line_of_its_pictures(job, tmp_path):
    """A table's pictures may come from many servers; here: one that answers, and a port where nothing listens."""
    pytest.importorskip("fsspec", reason=CLOUD)
    pytest.importorskip("aiohttp", reason=CLOUD)
    (tmp_path / "www").mkdir()
    (tmp_path / "www/a.png").write_bytes(png(0))
    handler = functools.partial(Quiet, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        (tmp_path / "t.csv").write_text(f"url\n{root}/a.png\n{root}/none.png\nhttp://127.0.0.1:9/b.png\n")
        (tmp_path / "m.png").write_bytes(mask_png())
        assert job(tmp_path / "t.csv", tmp_path / "out", masks=str(tmp_path / "m.png")) == 1
        server.shutdown()
    lines = report(tmp_path / "out")
    assert {key: line["status"] for key, line in lines.items()} == {"a": "ok", "none": "failed", "b": "failed"}
    assert "there is no http://" in lines["none"]["error"]
    assert "cannot be reached" in lines["b"]["error"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(call, text, kind=MoebiusError):
    with pytest.raises(kind, match=text) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_fsspec_is_not_needed_for_paths_and_named_for_urls(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "fsspec", None)
    stores._store.cache_clear()
    assert isinstance(store_of(str(tmp_path)), LocalStore)
    refused(lambda: store_of("s3://bucket/x"), r"needs fsspec\. .*moebius-edge\[cloud\]", RuntimeUnavailableError)
    stores._store.cache_clear()


def test_unknown_protocols_and_missing_libraries(memory):
    refused(lambda: store_of("quark://x/y"), "quark:// is no protocol of fsspec", InputError)
    if not _installed("gcsfs"):
        refused(lambda: store_of("gs://x/y"), "Install it: pip install", RuntimeUnavailableError)


def _installed(name):
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_an_unreachable_store(job, server, monkeypatch, tmp_path):
    import s3fs

    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nothing listens there
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    stores._store.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    source = make_pictures(tmp_path / "in", 2)
    refused(lambda: job("s3://bucket/in", tmp_path / "out"), "cannot be reached", StoreError)
    refused(lambda: job(source, "s3://bucket/out", masks=mask_of(source)), "cannot be reached", StoreError)
    stores._store.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def test_missing_credentials(job, server, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    stores._store.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()
    refused(lambda: job("s3://bucket/in", tmp_path / "out"), "no credentials|access denied", StoreError)
    stores._store.cache_clear()
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_missing_bucket(job, s3, tmp_path):
    source = make_pictures(tmp_path / "in", 2)
    refused(lambda: job("s3://none/in", tmp_path / "out"), "there is no s3://none/in", InputError)
    refused(lambda: job(source, "s3://none/out", masks=mask_of(source)), "s3://none/out", StoreError)


def test_a_destination_that_cannot_be_written_ends_the_job(job, tmp_path):
    if sys.platform == "win32" or os.getuid() == 0:  # noqa: TID251
        (tmp_path / "file").write_text("x")
        target = tmp_path / "file/out"
    else:
        (tmp_path / "locked").mkdir(mode=0o555)
        target = tmp_path / "locked/out"
    source = make_pictures(tmp_path / "in", 2)
    refused(lambda: job(source, target, masks=mask_of(source)), "cannot (write|list)", StoreError)


def test_normal_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert normal("a/../b/") == str(Path(tmp_path) / "b")
    assert normal("s3://bucket/x/") == "s3://bucket/x"
    assert normal(f"file://{tmp_path}/a") == str(tmp_path / "a")
