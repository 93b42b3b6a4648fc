"""--batch: several pictures at once, the same bytes, and what happens when one of them fails."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moebius_batch import shards
from moebius_batch.destination import DEATHS, Destination
from moebius_batch.fill import Filler
from moebius_batch.items import Shard
from moebius_batch.job import Settings
from moebius_batch.sources import Columns, open_source
from moebius_runtime.backends.ort import OrtBackend
from moebius_runtime.errors import InputError

from .conftest import OPTIONS, OWN, make_pictures, mask_of, report, results


@pytest.fixture(scope="module")
def open_toy(tmp_path_factory, make_toy):
    return make_toy(tmp_path_factory.mktemp("open") / "bundle", batch="batch")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("source") / "in", 25, broken=3)


@pytest.fixture
def run(job, open_toy, source, tmp_path):
    def call(name, **fields):
        assert job(source, tmp_path / name, masks=mask_of(source), bundle=open_toy.path, **fields) == 1
        return results(tmp_path / name)

    return call


def test_the_size_of_a_batch_changes_no_byte(run, tmp_path, monkeypatch):
    sizes = []
    real = OrtBackend.run
    one = run("one", shard_size=1000)

    def spy(self, graph, inputs):
        sizes.append(len(next(iter(inputs.values()))))
        return real(self, graph, inputs)

    monkeypatch.setattr(OrtBackend, "run", spy)
    for batch in (2, 64):
        sizes.clear()
        assert run(str(batch), batch=batch, shard_size=1000) == one
        assert max(sizes) == min(batch, 3)  # 25 pictures in 16 shards: the largest has 3 good ones
        assert report(tmp_path / str(batch)).keys() == report(tmp_path / "one").keys()
    for key, line in report(tmp_path / "64").items():
        assert line["status"] == report(tmp_path / "one")[key]["status"]
        assert line["error"] == report(tmp_path / "one")[key]["error"]
    run("64", batch=3)  # another batch goes on with the same job


def test_a_picture_that_fails_in_the_network_takes_no_other_with_it(run, tmp_path, monkeypatch):
    one = run("one")
    poisoned = list(one)[3]
    first = {name: data for name, data in one.items() if name != poisoned}
    real = Filler._read

    def read(self, item):
        found = real(self, item)
        if f"{item.key}.png" != poisoned:
            return found
        pixels = np.full_like(found.picture.pixels, 77)  # by which the network below knows it
        return replace(found, picture=replace(found.picture, pixels=pixels))

    def poison(self, handle, inputs):
        output = run_graph(self, handle, inputs)
        for image, result in zip(inputs.get("image", ()), output, strict=False):
            if np.abs(image[:, :8, :8] - (77 / 127.5 - 1)).max() < 1e-4:
                result[:] = np.nan
        return output

    run_graph = OrtBackend._run
    monkeypatch.setattr(Filler, "_read", read)
    monkeypatch.setattr(OrtBackend, "_run", poison)
    assert run("many", batch=4) == first
    assert "holds NaN" in report(tmp_path / "many")[poisoned[:-4]]["error"]


def test_after_a_death_pictures_go_alone_until_the_one_that_kills_is_found(open_toy, source, tmp_path, monkeypatch):
    settings = Settings(bundle=str(open_toy.path), out=str(tmp_path / "out"), options=OPTIONS, batch=4)
    found = open_source(str(source), settings.out, mask_of(source), Columns(), 64)
    settings = settings.model_copy(update={"mask": {"url": mask_of(source)}})
    items = tuple(sorted((item for shard in found.shards for item in shard.items), key=lambda item: item.key))[:12]
    shard, fatal, seen = Shard(0, "00000", items), items[6].key, []

    class Dies(BaseException):
        """Stands for the end of the process: nothing of it may run."""

    class Fill(Filler):
        def several(self, group):
            seen.append(len(group))
            if any(item.key == fatal for item in group):
                raise Dies
            return super().several(group)

        def __call__(self, item):
            seen.append(1)
            if item.key == fatal:
                raise Dies
            return super().__call__(item)

    with monkeypatch.context() as patch:
        patch.setattr("moebius_batch.destination.OpenShard.stopped", lambda self: None)
        deaths = 0
        while True:
            try:
                summary = shards.run_shard(settings, shard, Fill(settings))
                break
            except Dies:
                deaths += 1
                assert deaths <= DEATHS + 1
    assert deaths == DEATHS + 1
    assert seen == [4, 4, 1, 1, 1, 1, 1, 4, 1]
    lines = {line.key: line for line in Destination(settings.out).report(0)}
    assert summary.pictures == 12
    assert "3 processes died" in lines[fatal].error
    assert sum(line.status == "ok" for line in lines.values()) == 9  # two are broken


def test_a_fixed_batch_is_refused_before_anything_is_listed(job, toy_bundle, source, tmp_path):
    with pytest.raises(InputError, match=r"batch 2: vae_encoder of .*takes one square.*--dynamic-batch"):
        job(tmp_path / "none", tmp_path / "out", bundle=toy_bundle.path, batch=2)
    assert not (tmp_path / "out" / OWN).exists()
