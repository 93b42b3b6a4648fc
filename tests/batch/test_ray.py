"""The engine `ray` on two nodes of this machine, one of which is killed; and what is refused of a cluster.

Tests with a cluster are `slow`: its start alone takes 20 seconds on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from moebius_batch import ray_engine
from moebius_runtime.errors import InputError, MoebiusError, RuntimeUnavailableError

from .conftest import OWN, ROOT, make_pictures, mask_of, mask_png, png, report, results

NEEDS_RAY = "pip install 'moebius-edge[ray]'"
MEMORY = 80 << 20  # bytes of each node's object store; Ray's least is 75 MiB


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes with two logical CPUs each; tests that kill a node add it again."""
    pytest.importorskip("ray", reason=NEEDS_RAY)
    pytest.importorskip("ray.data", reason=NEEDS_RAY)
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        folders = [ROOT, *(ROOT / name for name in ("runtimes", "export", "benchmarks"))]
        before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        patch.setenv("PYTHONPATH", os.pathsep.join([*before, *map(str, folders)]))  # for the nodes' workers
        cluster = Cluster()
        cluster.second = None
        checks = {"health_check_period_ms": 1000, "health_check_failure_threshold": 4}  # of nodes, by the head
        add_node(cluster, include_dashboard=False, _system_config=checks)
        yield cluster
        import ray

        ray.shutdown()
        cluster.shutdown()


def add_node(cluster, tries=4, **more):
    """Adds a node. Ray gives its processes 15 s to start, which a loaded machine exceeds: then it is tried again."""
    for left in range(tries - 1, -1, -1):
        try:
            return cluster.add_node(num_cpus=2, object_store_memory=MEMORY, **more)
        except Exception:
            if not left:
                raise
    return None


@pytest.fixture
def on_ray(cluster, job):
    if cluster.second is None:
        cluster.second = add_node(cluster)

    def run(source, out, **fields):
        return job(source, out, engine="ray", address=cluster.address, **fields)

    return run


def kill_second_node(cluster, condition):
    """Kills the node once the condition holds, in a thread."""

    def kill():
        end = time.monotonic() + 300
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)
        cluster.remove_node(cluster.second, allow_graceful=False)

    thread = threading.Thread(target=kill)
    thread.start()
    return thread


def kill_a_node_half_way(cluster, on_ray, job, tmp_path, pictures, broken, **fields):
    source = make_pictures(tmp_path / "in", pictures, broken)
    out, masks = tmp_path / "out", mask_of(source)
    finished = out / OWN / "shards"
    shards = max(16, -(-pictures // 64))
    half = lambda: finished.exists() and len(list(finished.glob("*.jsonl"))) >= shards // 2  # noqa: E731
    thread = kill_second_node(cluster, half)
    try:
        assert on_ray(source, out, masks=masks, workers=3, **fields) == 1
        left = len(list(finished.glob("*.jsonl")))
    finally:
        thread.join()
        cluster.second = None
    assert left == shards
    lines = report(out)
    assert len(lines) == pictures
    assert sum(line["status"] == "failed" for line in lines.values()) == broken
    assert len(results(out)) == pictures - broken
    assert job(source, tmp_path / "single", masks=masks, **fields) == 1
    assert results(out) == results(tmp_path / "single")
    summary = json.loads((out / OWN / "summary.json").read_text())
    assert (summary["pictures"], summary["failed"]) == (pictures, broken)


@pytest.mark.slow
def test_a_node_is_killed_half_way(cluster, on_ray, job, tmp_path):
    kill_a_node_half_way(cluster, on_ray, job, tmp_path, 60, 4)


@pytest.mark.slow
def test_a_node_is_killed_half_way_through_2000_pictures(cluster, on_ray, job, fused_bundle, tmp_path):
    """With a real network, as the killed node's actors load it again elsewhere."""
    kill_a_node_half_way(cluster, on_ray, job, tmp_path, 2000, 20, bundle=fused_bundle)


def test_a_finished_job_needs_no_cluster(job, tmp_path, monkeypatch):
    source = make_pictures(tmp_path / "in", 3)
    assert job(source, tmp_path / "out", masks=mask_of(source)) == 0
    monkeypatch.setattr(ray_engine, "connect", lambda address: pytest.fail("a cluster was asked for"))
    assert job(source, tmp_path / "out", masks=mask_of(source), engine="ray") == 0


@pytest.mark.slow
def test_a_bundle_that_the_workers_cannot_read(on_ray, toy_bundle, tmp_path):
    source = make_pictures(tmp_path / "in", 3)
    broken = shutil.copytree(toy_bundle.path, tmp_path / "bundle")
    (broken / "unet/model.onnx").write_bytes(b"x")
    with pytest.raises(MoebiusError, match=r"unet/model\.onnx: 1 bytes, expected") as caught:
        on_ray(source, tmp_path / "out", masks=mask_of(source), bundle=broken)
    assert caught.value.exit_code == 2


@pytest.mark.slow
def test_more_workers_than_fit_are_refused_before_they_wait_for_ever(on_ray, tmp_path):
    source = make_pictures(tmp_path / "in", 3)
    with pytest.raises(InputError, match=r"4 CPUs and 0 GPUs, which hold 3 workers .* 4 are wanted"):
        on_ray(source, tmp_path / "out", masks=mask_of(source), workers=4)
    with pytest.raises(InputError, match=r"hold 0 workers with 3 CPUs each"):
        on_ray(source, tmp_path / "out", masks=mask_of(source), threads=3)
    assert not (tmp_path / "out" / OWN / "shards").exists()  # so that another request may take its place
    with pytest.raises(InputError, match=r"hold 0 workers with 1 CPU and a GPU each"):
        on_ray(source, tmp_path / "out", masks=mask_of(source), runtime="ort-cuda")


@pytest.mark.parametrize("what", ["bundle", "source", "masks", "out"])
def test_a_path_that_the_driver_has_and_a_worker_lacks(what, toy_bundle, job, tmp_path, monkeypatch):
    """The worker of another machine, whose disk has all but one of them: it must not begin a folder of its own."""
    source = make_pictures(tmp_path / "in", 3)
    bundle = shutil.copytree(toy_bundle.path, tmp_path / "bundle")
    paths = {"bundle": bundle, "source": source, "masks": tmp_path / "in.mask.png", "out": tmp_path / "out"}
    asked = []
    monkeypatch.setattr(ray_engine, "run_ray", lambda settings, shards, *rest: asked.append((settings, shards)))
    with pytest.raises(MoebiusError):  # there is no report, as nothing is filled
        job(source, paths["out"], masks=mask_of(source), bundle=bundle, engine="ray")
    (settings, shards) = asked[0]
    paths[what].rename(tmp_path / "elsewhere")
    monkeypatch.setattr(ray_engine.socket, "gethostname", lambda: "node7")
    worker = ray_engine.ShardWorker(settings.model_dump_json())
    (text,) = worker({"shard": [shards[0].to_json()]})["result"]
    found = json.loads(text)
    assert found["exit_code"] == 2
    assert found["error"].startswith(f"the worker on node7 has no {paths[what]}")
    assert "every machine of the cluster needs it" in found["error"]
    assert what != "out" or not paths["out"].exists()
    (tmp_path / "elsewhere").rename(paths[what])
    (text,) = worker({"shard": [shards[0].to_json()]})["result"]
    assert json.loads(text)["failed"] == 0


def test_the_paths_of_urls_and_hubs_are_not_looked_for(tmp_path):
    pytest.importorskip("fsspec", reason="pip install 'moebius-edge[cloud]'")
    urls = {"bundle": "hub:owner/bundle", "source": "s3://none/in", "out": "memory://none", "mask": {"url": "s3://m"}}
    ray_engine.ShardWorker(ray_engine.Settings(**urls).model_dump_json()).check_paths()


def nodes(*sizes):
    """Ray's module, as far as `pool_size` asks it: nodes with (CPUs, GPUs); None is a dead one."""
    found = [
        {"Alive": size is not None, "Resources": {} if size is None else {"CPU": size[0], "GPU": size[1]}}
        for size in sizes
    ]
    return SimpleNamespace(nodes=lambda: found)


@pytest.mark.parametrize(
    ("sizes", "cpus", "gpus", "expected"),
    [
        ([(2, 0), (2, 0)], 1, 0, 3),
        ([(1, 0), (1, 0)], 1, 0, 1),
        ([(8, 0)], 2, 0, 3),
        ([(9, 0)], 2, 0, 4),
        ([(9, 0), None], 4, 0, 2),
        ([(8, 2), (8, 2)], 1, 1, 4),
        ([(2, 8)], 1, 1, 1),
    ],
)
def test_one_cpu_is_left_for_ray_s_own_tasks(sizes, cpus, gpus, expected):
    assert ray_engine.pool_size(nodes(*sizes), None, cpus, gpus) == expected
    with pytest.raises(InputError, match=f"{expected + 1} are wanted"):
        ray_engine.pool_size(nodes(*sizes), expected + 1, cpus, gpus)


def test_a_cluster_of_one_cpu_is_refused():
    with pytest.raises(InputError, match="1 nodes with 1 CPUs"):
        ray_engine.pool_size(nodes((1, 0)), None, 1, 0)


def test_no_cluster_at_the_address(job, tmp_path):
    ray = pytest.importorskip("ray", reason=NEEDS_RAY)
    source = make_pictures(tmp_path / "in", 3)
    ray.shutdown()
    mismatch = "Version mismatch: The cluster was started with:\n    Ray: 2.9.0\n    Python: 3.10.1"
    for error, text in (
        (ConnectionError("Could not find any running Ray"), r"no Ray cluster at --address auto .*ray start --head"),
        (RuntimeError(mismatch), r"Ray: 2\.9\.0 .*install one version on all machines"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ray, "init", Mock(side_effect=error))
            with pytest.raises(InputError, match=text) as caught:
                job(source, tmp_path / "out", masks=mask_of(source), engine="ray")
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_quality_on_the_cluster_is_that_of_one_process(cluster, on_ray, tmp_path):
    """To the last bit: the pairs are reduced in their order."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("torchmetrics", reason="pip install 'moebius-edge[quality]'")
    quality = pytest.importorskip("moebius_bench.paper.quality")

    class Features(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return torch.cat([image.float().mean(dim=[2, 3]), image.float().std(dim=[2, 3])], dim=1)

    class Distance(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean()

    weights = []
    for module in (Features(), Distance()):
        weights.append(tmp_path / f"{type(module).__name__}.pt")
        torch.jit.script(module).save(str(weights[-1]))
    real, fake, masks = tmp_path / "real", tmp_path / "fake", tmp_path / "masks"
    for folder in (real, fake, masks):
        folder.mkdir()
    for number in range(70):  # three rows, the last one not full
        (real / f"{number}.png").write_bytes(png(number))
        (fake / f"{number}.png").write_bytes(png(number + 1 if number % 5 else number))
        (masks / f"{number}.png").write_bytes(mask_png())
    on_cluster = quality.Cluster(cluster.address, 2)
    one = quality.measure_quality(real, fake, masks, *weights)
    assert quality.measure_quality(real, fake, masks, *weights, cluster=on_cluster) == one
    assert one.identical == 14
    with pytest.raises(MoebiusError, match="there is no such file"):
        quality.measure_quality(real, fake, None, None, tmp_path / "none.pt", cluster=on_cluster)


def test_ray_that_is_not_installed(job, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    source = make_pictures(tmp_path / "in", 3)
    with pytest.raises(RuntimeUnavailableError, match=r"pip install 'moebius-edge\[ray\]'"):
        job(source, tmp_path / "out", masks=mask_of(source), engine="ray")
