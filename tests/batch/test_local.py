"""Jobs on folders, in this process, in several, killed and started again: the same bytes, nothing lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_batch import local, shards
from moebius_batch.destination import DEATHS, Destination
from moebius_batch.fill import Filled, Filler
from moebius_batch.keys import seed_of
from moebius_batch.progress import JobProgress
from moebius_batch.run import Request
from moebius_runtime import InpaintPipeline
from moebius_runtime.errors import InputError, MoebiusError
from moebius_runtime.images.masks import load_mask
from moebius_runtime.images.pictures import load_picture, picture_bytes
from moebius_runtime.pipeline import make_options

from .conftest import OPTIONS, OWN, SIDE, make_pictures, mask_of, mask_png, png, report, results

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux lists a process's children in /proc")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("source") / "in", 30, broken=3)


@pytest.fixture(scope="module")
def single(source, toy_bundle, tmp_path_factory):
    """The results of one process in one go, which all others are compared with."""
    from moebius_batch.run import run_job

    out = tmp_path_factory.mktemp("single") / "out"
    request = Request(source=str(source), out=str(out), masks=mask_of(source), bundle=toy_bundle.path, options=OPTIONS)
    assert run_job(request) == 1
    return out


def test_every_good_picture_once_and_every_broken_one_reported(source, single):
    lines = report(single)
    keys = {path.relative_to(source).with_suffix("").as_posix() for path in source.rglob("*.png")}
    assert lines.keys() == keys
    assert len(keys) == 30
    broken = {key for key, line in lines.items() if line["status"] == "failed"}
    assert broken == {key for key in keys if int(key[-5:]) % 10 == 9}
    assert results(single).keys() == {f"{key}.png" for key in keys - broken}
    for key in broken:
        assert "cannot be decoded" in lines[key]["error"]
        assert lines[key]["file"] is None
    summary = json.loads((single / OWN / "summary.json").read_text())
    assert (summary["pictures"], summary["filled"], summary["failed"], summary["shards"]) == (30, 27, 3, 16)
    assert not [path for path in single.rglob("*") if path.suffix == ".part"]
    assert not list((single / OWN / "open").iterdir())


def test_a_result_is_what_the_pipeline_gives_with_the_key_s_seed(source, single, toy_bundle):
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path)
    for key in ("0/p00000", "1/p00004"):
        picture = load_picture(source / f"{key}.png")
        mask = load_mask(mask_of(source), picture.shape)
        filled = pipeline.inpaint(picture, mask, make_options(**OPTIONS, seed=seed_of(key, 0))).picture
        assert results(single)[f"{key}.png"] == picture_bytes(filled, "x.png")[0]


def test_another_seed_gives_other_pictures(source, single, job, tmp_path):
    job(source, tmp_path / "out", masks=mask_of(source), seed=1)
    one, other = results(single), results(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_a_finished_job_does_nothing_again_and_keeps_its_exit_code(source, single, job, capsys, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in single.rglob("*.png")}
    monkeypatch.setattr(Filler, "__call__", lambda *_: pytest.fail("a finished picture was filled again"))
    assert job(source, single, masks=mask_of(source)) == 1
    assert {path: path.stat().st_mtime_ns for path in single.rglob("*.png")} == before
    assert "16 of 16 shards were finished before" in capsys.readouterr().out


@pytest.mark.parametrize(("workers", "shard_size"), [(1, 4), (2, 64)])
def test_neither_workers_nor_the_size_of_shards_change_a_byte(workers, shard_size, source, single, job, tmp_path):
    assert job(source, tmp_path / "out", masks=mask_of(source), workers=workers, shard_size=shard_size) == 1
    assert results(tmp_path / "out") == results(single)


def test_shares_in_any_number_make_the_same_job(source, single, job, tmp_path, capsys):
    """Two of four processes, then all of three: what the first ones finished is kept."""
    out = tmp_path / "out"
    run = partial(job, source, out, masks=mask_of(source))
    run(share=(2, 4))
    run(share=(3, 4))
    assert "8 of 16 shards of the job are not finished" in capsys.readouterr().out
    assert not (out / OWN / "report.jsonl").exists()
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    for index in (1, 2, 3):
        run(share=(index, 3))
    assert results(out) == results(single)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert report(out).keys() == report(single).keys()


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_killed_with_9_and_started_again(source, single, start, tmp_path):
    """Also within a shard: with one shard for all, what the killed process had finished is not filled again."""
    out = tmp_path / "out"
    arguments = (source, out, "--masks", mask_of(source), "--shard-size", 1000, "--shard", "1/1")
    process = start(*arguments)
    wait_for(lambda: len(list(out.rglob("p*.png"))) >= 3, process)
    process.kill()
    process.communicate()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("p*.png")}
    assert 3 <= len(before) < 27
    process = start(*arguments)
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "27 pictures filled, 3 failed" in text
    assert results(out) == results(single)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@LINUX
def test_a_worker_that_is_killed_is_replaced(source, single, start, tmp_path):
    out = tmp_path / "out"
    process = start(source, out, "--masks", mask_of(source), "--workers", 2)
    wait_for(lambda: any(out.rglob("p*.png")), process)
    workers = [pid for pid in children(process) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)  # noqa: TID251
    text, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert "27 pictures filled, 3 failed" in text
    assert "a worker process died (signal 9)" in errors
    assert results(out) == results(single)


@LINUX
def test_workers_end_when_the_command_is_killed(source, start, tmp_path):
    process = start(source, tmp_path / "out", "--masks", mask_of(source), "--workers", 2)
    wait_for(lambda: any((tmp_path / "out").rglob("p*.png")), process)
    workers = children(process)
    process.kill()
    process.communicate()
    end = time.monotonic() + 30
    while any(os.path.exists(f"/proc/{pid}") for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_picture_that_kills_its_process_becomes_a_line(source, toy_bundle, tmp_path):
    """As out of memory would: a process that dies at one picture again and again goes on without it."""
    settings = local.Settings(bundle=str(toy_bundle.path), out=str(tmp_path / "out"), options=OPTIONS)
    shard = shards_of(make_pictures(tmp_path / "in", 4))

    left = tmp_path / "out/2/.p00002.png.0123456789abcdef.part"  # of a result that the process was writing
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")

    class Dies(BaseException):
        """Stands for the end of the process: nothing of it may run."""

    class Fill(Filler):
        def __call__(self, item):
            if item.key == "2/p00002":
                raise Dies
            return super().__call__(item)

    for _ in range(DEATHS):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moebius_batch.destination.OpenShard.stopped", lambda self: None)
            with pytest.raises(Dies):
                shards.run_shard(settings, shard, Fill(settings))
    summary = shards.run_shard(settings, shard, Fill(settings))
    assert (summary.pictures, summary.failed) == (4, 1)
    lines = {line.key: line for line in Destination(settings.out).report(0)}
    assert "3 processes died while they filled it" in lines["2/p00002"].error
    assert not left.exists()


def test_a_finished_shard_that_is_run_again_fills_nothing(toy_bundle, tmp_path):
    """Ray does so where the result of a finished task was lost with its node."""
    settings = local.Settings(bundle=str(toy_bundle.path), out=str(tmp_path / "out"), options=OPTIONS)
    shard = shards_of(make_pictures(tmp_path / "in", 4, broken=1))
    first = shards.run_shard(settings, shard, Filler(settings))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = []

    class Fails(Filler):
        def __call__(self, item):
            raise AssertionError(item.key)

    assert shards.run_shard(settings, shard, Fails(settings), again.append) == first
    assert len(again) == 4
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


def test_interrupting_is_no_death(source, toy_bundle, tmp_path):
    settings = local.Settings(bundle=str(toy_bundle.path), out=str(tmp_path / "out"), options=OPTIONS)
    shard = shards_of(make_pictures(tmp_path / "in", 2))
    stop = Filler(settings)
    stop.__class__ = type("Stop", (Filler,), {"__call__": lambda self, item: (_ for _ in ()).throw(KeyboardInterrupt)})
    for _ in range(DEATHS + 2):
        with pytest.raises(KeyboardInterrupt):
            shards.run_shard(settings, shard, stop)
    assert shards.run_shard(settings, shard, Filler(settings)).failed == 0


def shards_of(folder):
    from moebius_batch.items import Shard
    from moebius_batch.sources import Columns, open_source

    for path in list(folder.rglob("p*.png")):
        path.with_suffix(".mask.png").write_bytes(mask_png())
    source = open_source(str(folder), str(folder.parent / "out"), None, Columns(), 64)
    items = tuple(sorted((item for shard in source.shards for item in shard.items), key=lambda item: item.key))
    return Shard(0, "00000", items)


def test_failed_pictures_are_filled_again_when_asked(job, tmp_path):
    source = make_pictures(tmp_path / "in", 12, broken=2)
    out = tmp_path / "out"
    run = partial(job, source, out, masks=mask_of(source))
    assert run() == 1
    for key, line in report(out).items():
        if line["status"] == "failed":  # repaired without a change of its size, which would be another source
            path = source / f"{key}.png"
            size = path.stat().st_size
            path.write_bytes(small_png(size))
    assert run() == 1
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("p*.png")}
    assert run(retry_failed=True) == 0
    assert len(results(out)) == 12
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert run(retry_failed=True) == 0


def small_png(size):
    """A whole picture of exactly so many bytes: a comment chunk fills it up."""
    buffer = io.BytesIO()
    Image.fromarray(np.arange(SIDE * SIDE, dtype=np.uint16).astype(np.uint8).reshape(SIDE, SIDE)).save(buffer, "PNG")
    data = buffer.getvalue()
    text = b"Comment\0" + b"x" * (size - len(data) - 12 - 8)
    chunk = struct.pack(">I", len(text)) + b"tEXt" + text + struct.pack(">I", zlib.crc32(b"tEXt" + text))
    whole = data[:-12] + chunk + data[-12:]
    assert len(whole) == size
    return whole


def test_a_picture_that_changes_meanwhile_is_a_line(job, tmp_path, monkeypatch):
    source = make_pictures(tmp_path / "in", 6)
    changed, gone = source / "0/p00000.png", source / "1/p00001.png"
    real = shards.run_shard
    done = []

    def run(*arguments):
        if not done:
            done.append(True)
            changed.write_bytes(png(99))
            gone.unlink()
        return real(*arguments)

    monkeypatch.setattr(local, "run_shard", run)
    assert job(source, tmp_path / "out", masks=mask_of(source)) == 1
    lines = report(tmp_path / "out")
    assert "has changed since the job listed it" in lines["0/p00000"]["error"]
    assert "No such file" in lines["1/p00001"]["error"]
    assert sum(line["status"] == "ok" for line in lines.values()) == 4


def test_a_job_that_fails_as_a_whole_is_stopped(job, tmp_path):
    source = make_pictures(tmp_path / "in", 60, broken=60)
    with pytest.raises(MoebiusError, match=r"over --max-error-share 0\.1") as caught:
        job(source, tmp_path / "out", masks=mask_of(source), max_error_share=0.1)
    assert caught.value.exit_code == 1
    lines = [line for path in (tmp_path / "out" / OWN).rglob("*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 6  # the first over a tenth of 50


def test_a_bundle_that_workers_cannot_run_ends_the_job_with_one_sentence(toy_bundle, source, job, tmp_path):
    broken = shutil.copytree(toy_bundle.path, tmp_path / "bundle")
    (broken / "unet/model.onnx").write_bytes(b"x")
    for workers in (1, 2):
        with pytest.raises(MoebiusError, match=r"unet/model\.onnx: 1 bytes, expected") as caught:
            job(source, tmp_path / f"out{workers}", masks=mask_of(source), bundle=broken, workers=workers)
        assert caught.value.exit_code == 2


def test_processes_that_die_at_once_end_the_job(source, job, tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_work", os._exit)  # its second argument is refused: the process ends with an error
    with pytest.raises(MoebiusError, match="worker processes died one after the other") as caught:
        job(source, tmp_path / "out", masks=mask_of(source), workers=2)
    assert caught.value.exit_code == 1


def test_a_link_that_leaves_the_destination_is_refused(source, job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out/0").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MoebiusError, match="is a link that leaves"):
        job(source, tmp_path / "out", masks=mask_of(source))
    assert not list((tmp_path / "elsewhere").iterdir())


def test_masks_by_name_and_masks_beside(job, tmp_path):
    source = make_pictures(tmp_path / "in", 3)
    masks = tmp_path / "masks"
    for path in list(source.rglob("*.png")):
        target = masks / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(mask_png())
    assert job(source, tmp_path / "one", masks=mask_of(source)) == 0
    assert job(source, tmp_path / "two", masks=str(masks)) == 0
    for path in list(source.rglob("*.png")):
        path.with_suffix(".mask.png").write_bytes(mask_png())
    assert job(source, tmp_path / "three") == 0
    assert results(tmp_path / "one") == results(tmp_path / "two") == results(tmp_path / "three")
    (masks / "0/p00000.png").unlink()
    (source / "0/p00000.mask.png").unlink()
    assert job(source, tmp_path / "four", masks=str(masks)) == 1
    assert "has no mask" in report(tmp_path / "four")["0/p00000"]["error"]


def test_the_destination_may_lie_in_the_source(job, tmp_path):
    source = make_pictures(tmp_path / "in", 3)
    for _ in range(2):
        assert job(source, source / "out", masks=mask_of(source)) == 0
    assert len(results(source / "out")) == 3
    with pytest.raises(InputError, match="is the source"):
        job(source, source, masks=mask_of(source))


class Unfilled(Filler):
    """Reads, decodes and encodes a picture, without a network between."""

    pipeline = None

    def take_notes(self):
        return []

    def __call__(self, item):
        data = picture_bytes(load_picture(item.picture.url), "x.png")[0]
        return Filled(data, f"{item.key}.png", ())


@pytest.mark.slow
@LINUX
def test_memory_stays_flat_over_10000_pictures(job, tmp_path, monkeypatch):
    source = make_pictures(tmp_path / "in", 10_000)
    used = {}

    def count(real, self, pictures, failed):
        real(self, pictures, failed)
        if self.done in (1000, 10_000):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            used[self.done] = pages * os.sysconf("SC_PAGE_SIZE")  # noqa: TID251

    monkeypatch.setattr(local, "Filler", Unfilled)
    monkeypatch.setattr(JobProgress, "add", partialmethod_of(count, JobProgress.add))
    assert job(source, tmp_path / "out", masks=mask_of(source)) == 0
    assert used.keys() == {1000, 10_000}
    assert used[10_000] - used[1000] < 8 << 20  # bytes; 9,000 kept pictures of 64x64 would be 110 MB


def partialmethod_of(function, real):
    def method(self, *arguments):
        return function(real, self, *arguments)

    return method
