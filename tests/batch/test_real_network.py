"""Jobs with a real network (preset tiny): shares in any number give the same bytes, and memory stays flat."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from moebius_batch.progress import JobProgress

from .conftest import OWN, make_pictures, mask_of, report, results
from .test_local import wait_for

pytestmark = pytest.mark.slow
MASKED = {"mode": "balanced", "steps": 2}  # with the masked decoder and guidance


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("source") / "in", 60, broken=4)


def test_four_processes_one_killed_and_three_give_the_bytes_of_one(source, start, job, fused_bundle, tmp_path):
    assert job(source, tmp_path / "one", masks=mask_of(source), bundle=fused_bundle, options=MASKED, threads=1) == 1
    wanted = results(tmp_path / "one")
    assert len(wanted) == 56

    def begin(out, share):
        options = ["--mode", "balanced", "--steps", 2, "--threads", 1]
        return start(source, out, "--masks", mask_of(source), "--bundle", fused_bundle, "--shard", share, *options)

    four = tmp_path / "four"
    processes = [begin(four, f"{share}/4") for share in (1, 2, 3, 4)]
    of_second = [f"{number:05d}.jsonl" for number in range(1, 16, 4)]
    wait_for(lambda: any((four / OWN / "open" / name).exists() for name in of_second), processes[1])
    processes[1].kill()
    for process in processes:
        process.communicate(timeout=300)
    assert [process.returncode for process in processes][1] == -9
    assert not (four / OWN / "report.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in four.rglob("p*.png")}
    again = begin(four, "2/4")
    again.communicate(timeout=300)
    assert results(four) == wanted
    assert {path: path.stat().st_mtime_ns for path in before} == before
    three = tmp_path / "three"
    for process in [begin(three, f"{share}/3") for share in (1, 2, 3)]:
        _, errors = process.communicate(timeout=300)
        assert process.returncode in (0, 1), errors
    assert results(three) == wanted
    for out in (four, three):
        lines = report(out)
        assert len(lines) == 60
        assert sum(line["status"] == "failed" for line in lines.values()) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="Linux gives a process's resident memory in /proc")
def test_memory_stays_flat_over_300_pictures(job, fused_bundle, tmp_path, monkeypatch):
    source = make_pictures(tmp_path / "in", 300)
    used: dict[int, int] = {}
    real = JobProgress.add

    def count(self, pictures, failed):
        real(self, pictures, failed)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used[self.done] = pages * mmap.PAGESIZE

    monkeypatch.setattr(JobProgress, "add", count)
    assert job(source, tmp_path / "out", masks=mask_of(source), bundle=fused_bundle, options=MASKED, threads=1) == 0
    assert len(used) == 300
    grown = used[300] - used[50]
    # Bytes. Kept latents and pixels of 250 pictures at the network's 128x128 would be over 60 MB; the allocator's own
    # movement from one picture to the next is below 4 MB.
    assert grown < 8 << 20, {count: used[count] >> 20 for count in (1, 50, 100, 200, 300)}
