from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import moebius.data
from moebius.data.datasets import Batch, SampleStream, batches, category_ids
from moebius.data.masks import MaskSettings
from moebius.data.photographs import PhotographSource
from moebius.data.pictures import PLAIN_CROP, BrokenPicture, CropSettings, crop
from moebius.data.sources import FolderSource, JoinedSource, JsonLinesSource, SceneSource
from moebius.data.tars import TarSource
from moebius.errors import DataError

MADE = runpy.run_path(str(Path(__file__).with_name("made.py")))
png, mask_png, write_tar = MADE["png"], MADE["mask_png"], MADE["write_tar"]
SIZE = 32


def taken(stream, count):
    return [next(stream) for _ in range(count)]


def same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert (one.name, one.task, one.epoch, one.number) == (other.name, other.task, other.epoch, other.number)
        np.testing.assert_array_equal(one.image, other.image)
        np.testing.assert_array_equal(one.mask, other.mask)


@pytest.fixture(params=["folder", "tars", "scenes", "joined"])
def source(request, folder, tmp_path):
    if request.param == "folder":
        return FolderSource(folder)
    if request.param == "scenes":
        return SceneSource(10, SIZE, fresh=True)
    if request.param == "joined":
        return JoinedSource([(SceneSource(4, SIZE), 1), (FolderSource(folder), 2)])
    for shard in range(2):
        write_tar(tmp_path / f"{shard}.tar", [(f"{index}.png", png(shard * 9 + index)) for index in range(9)])
    return TarSource([tmp_path / "0.tar", tmp_path / "1.tar"], buffer=5)


def test_samples(source):
    samples = taken(SampleStream(source, SIZE), 30)
    for sample in samples:
        assert (sample.image.shape, sample.image.dtype) == ((SIZE, SIZE, 3), np.uint8)
        assert (sample.mask.shape, sample.mask.dtype) == ((SIZE, SIZE), np.bool_)
        assert 0 < sample.mask.mean() <= 0.5
    assert {sample.epoch for sample in samples} >= {0, 1}
    assert len({sample.mask.tobytes() for sample in samples}) == 30  # also for the same picture in another epoch


def test_the_same_for_the_same_seed_whatever_the_threads(source):
    straight = taken(SampleStream(source, SIZE, seed=3), 40)
    same(straight, taken(SampleStream(source, SIZE, seed=3), 40))
    with SampleStream(source, SIZE, seed=3, threads=3) as threaded:
        same(straight, taken(threaded, 40))
    other = taken(SampleStream(source, SIZE, seed=4), 40)
    assert [sample.mask.tobytes() for sample in other] != [sample.mask.tobytes() for sample in straight]


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_equals_going_straight(source, threads):
    """Within an epoch and at its ends; through JSON, as a checkpoint would."""
    straight = taken(SampleStream(source, SIZE, seed=1), 40)
    for position in (0, 1, 9, 10, 11, 12, 13, 17, 18, 19, 27, 28, 29, 35):
        with SampleStream(source, SIZE, seed=1, threads=threads) as before:
            same(straight[:position], taken(before, position))
            state = json.loads(json.dumps(before.state_dict()))
        with SampleStream(source, SIZE, seed=1, threads=threads) as after:
            after.load_state_dict(state)
            assert after.state_dict() == state
            same(straight[position : position + 5], taken(after, min(5, 40 - position)))


def test_going_back_within_one_stream(source):
    with SampleStream(source, SIZE, threads=2) as stream:
        taken(stream, 3)
        state = stream.state_dict()
        first = taken(stream, 15)
        stream.load_state_dict(state)
        same(first, taken(stream, 15))


def test_two_processes_share_what_one_would_get(source):
    whole = taken(SampleStream(source, SIZE, seed=2, epochs=1), 10)
    halves = [taken(SampleStream(source, SIZE, seed=2, epochs=1, rank=rank, world=2), 5) for rank in (0, 1)]
    same(whole, [sample for pair in zip(*halves, strict=True) for sample in pair])


def test_epochs_end():
    stream = SampleStream(SceneSource(4, SIZE), SIZE, epochs=2)
    samples = list(stream)
    assert len(samples) == 8
    assert len({sample.name for sample in samples}) == 4
    assert list(stream) == []


def test_broken_pictures_are_counted_and_told(folder):
    (folder / "bad.png").write_bytes(png(1)[:200])
    (folder / "small.png").write_bytes(png(1, size=(20, 20)))
    told = []
    stream = SampleStream(FolderSource(folder), SIZE, epochs=2, on_skip=lambda name, why: told.append((name, why)))
    assert len(list(stream)) == 24
    assert stream.skipped == len(told) == sum(stream.reasons.values()) == 4
    assert {name for name, _ in told} == {"bad.png", "small.png"}
    assert any("expected sides of 32" in why for _, why in told)
    resumed = SampleStream(FolderSource(folder), SIZE, epochs=2)
    resumed.load_state_dict(stream.state_dict())
    assert resumed.skipped == 4
    assert list(resumed) == []


@pytest.mark.parametrize("threads", [0, 2])
def test_resuming_with_broken_pictures(folder, threads):
    for index in range(8):
        (folder / f"bad{index}.png").write_bytes(b"bad")
    straight = SampleStream(FolderSource(folder), SIZE)
    expected = taken(straight, 30)
    for position in range(0, 25, 4):
        with SampleStream(FolderSource(folder), SIZE, threads=threads) as before:
            taken(before, position)
            after = SampleStream(FolderSource(folder), SIZE)
            after.load_state_dict(before.state_dict())
        same(expected[position : position + 5], taken(after, 5))
        taken(after, 25 - position)
        assert after.skipped == straight.skipped


def test_broken_pictures_can_be_refused(folder):
    (folder / "bad.png").write_bytes(b"bad")
    stream = SampleStream(FolderSource(folder), SIZE, broken="refuse", epochs=1)
    for _ in range(2):  # and again when asked again
        with pytest.raises(DataError, match=r"bad\.png: not a whole picture.*repair or remove it"):
            list(stream)
    assert stream.skipped == 0


@pytest.mark.parametrize("epochs", [None, 1])
@pytest.mark.parametrize("threads", [0, 2])
def test_nothing_but_broken_pictures_ends(tmp_path, epochs, threads):
    (tmp_path / "bad.png").write_bytes(b"bad")
    stream = SampleStream(FolderSource(tmp_path), SIZE, epochs=epochs, threads=threads)
    with stream, pytest.raises(DataError, match="no picture of a whole epoch"):
        next(stream)
    assert stream.skipped >= 1


def test_fewer_pictures_than_processes_are_refused(tmp_path):
    write_tar(tmp_path / "empty.tar", [])
    for source, world in ((SceneSource(2, SIZE), 3), (TarSource([tmp_path]), 1)):
        with pytest.raises(DataError, match="no picture for process"):
            next(SampleStream(source, SIZE, rank=world - 1, world=world))


def test_positions_of_other_data_are_refused(folder):
    state = SampleStream(FolderSource(folder), SIZE).state_dict()
    for other, what in (
        (SampleStream(FolderSource(folder), SIZE, seed=1), "seed"),
        (SampleStream(FolderSource(folder), SIZE, world=2), "number of processes"),
        (SampleStream(FolderSource(folder / "a"), SIZE), "set of pictures"),
    ):
        with pytest.raises(DataError, match=what):
            other.load_state_dict(state)
    stream = SampleStream(FolderSource(folder), SIZE)
    for change in ({"epoch": -1}, {"number": "x"}, {"skipped": True}, {"more": 1}):
        with pytest.raises(DataError, match="data position"):
            stream.load_state_dict({**state, **change})


@pytest.mark.parametrize(
    "bad",
    [{"size": 8}, {"seed": -1}, {"threads": -1}, {"rank": 1}, {"rank": -1}, {"epochs": 0}, {"broken": "ignore"}],
)
def test_refusals(bad):
    with pytest.raises(DataError, match="expected"):
        SampleStream(SceneSource(1, SIZE), **{"size": SIZE, **bad})


def test_batches(tmp_path):
    (tmp_path / "a.png").write_bytes(png(255))
    (tmp_path / "m.png").write_bytes(mask_png())
    rows = [{"image": "a.png"}, {"image": "a.png", "mask": "m.png", "task": "foreground"}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    stream = SampleStream(JsonLinesSource(tmp_path / "rows.jsonl"), SIZE, epochs=2)
    samples = list(SampleStream(JsonLinesSource(tmp_path / "rows.jsonl"), SIZE, epochs=2))
    drawn = list(batches(stream, 3))
    assert [len(batch.image) for batch in drawn] == [3, 1]
    batch = drawn[0]
    assert isinstance(batch, Batch)
    assert (batch.image.shape, batch.image.dtype) == ((3, 3, SIZE, SIZE), torch.float32)
    assert batch.image.is_contiguous()
    assert (batch.image[:, 0] > 0.99).all()  # red is 255
    assert batch.image.min() >= -1
    assert (batch.mask.shape, batch.mask.dtype) == ((3, 1, SIZE, SIZE), torch.float32)
    assert set(batch.mask.unique().tolist()) == {0.0, 1.0}
    for sample, ids in zip(samples, batch.categories, strict=False):
        assert ids.tolist() == (list(range(10)) if sample.task == "background" else list(range(10, 20)))
        expected = torch.from_numpy(sample.image.astype(np.float32).transpose(2, 0, 1) / 127.5 - 1)
    torch.testing.assert_close(batch.image[2], expected)
    assert category_ids("foreground", 12) == [6, 7, 8, 9, 10, 11]


def test_batches_draw_no_further_than_they_give():
    stream = SampleStream(SceneSource(20, SIZE), SIZE, threads=2)
    with stream:
        next(batches(stream, 4))
        assert stream.state_dict()["number"] == 4


def test_smaller_masks():
    stream = SampleStream(SceneSource(20, SIZE), SIZE, masks=MaskSettings(width=40, box_side=(30, 100), most=0.2))
    assert max(sample.mask.mean() for sample in taken(stream, 40)) <= 0.2


def rng(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_a_crop_takes_picture_and_mask_alike():
    """The picture is the mask's own drawing: after any crop and flip they still agree."""
    mask = Image.new("L", (300, 200))
    mask.paste(255, (120, 60, 200, 150))
    for seed in range(30):
        image, hole = crop(rng(seed), mask.convert("RGB"), mask, 64, CropSettings(0.3, 1.0))
        bright = np.asarray(image)[..., 0] > 127
        assert (bright ^ hole).mean() < 0.06  # the hole takes pixels that are partly in it
        assert hole[bright].mean() > 0.99
        assert 0 < hole.mean() < 1


def test_crops_vary_and_the_plain_one_does_not():
    ramp = Image.fromarray(
        np.arange(200 * 300, dtype=np.uint32).reshape(200, 300).view(np.uint8).reshape(200, 300, 4)[..., :3]
    )
    assert len({crop(rng(seed), ramp, None, 32, CropSettings())[0].tobytes() for seed in range(20)}) == 20
    plain = {crop(rng(seed), ramp, None, 200, PLAIN_CROP)[0].tobytes() for seed in range(5)}
    assert plain == {ramp.crop((50, 0, 250, 200)).tobytes()}
    flips = [crop(rng(seed), ramp, None, 32, CropSettings(1, 1, shift=False))[0].tobytes() for seed in range(60)]
    assert len(set(flips)) == 2
    assert 15 < flips.count(flips[0]) < 45


def test_masks_that_leave_nothing_are_broken():
    image = Image.new("RGB", (64, 64))
    for value in (0, 255):
        with pytest.raises(BrokenPicture, match="empty or full"):
            crop(rng(), image, Image.new("L", (64, 64), value), 32, CropSettings())


@pytest.mark.parametrize("bad", [(0, 1), (0.5, 0.4), (0.5, 1.1)])
def test_refused_crops(bad):
    with pytest.raises(DataError, match="expected 0 < least"):
        CropSettings(*bad)


def test_photographs_and_scenes_together():
    """The set that the small model learns from, and the one that it is judged on."""
    train = JoinedSource([(SceneSource(20, SIZE), 1), (PhotographSource(), 3)])
    held_out = JoinedSource([(SceneSource(8, SIZE, held_out=True), 1), (PhotographSource(held_out=True), 1)])
    seen = list(SampleStream(train, SIZE, epochs=1, broken="refuse"))
    judged = list(SampleStream(held_out, SIZE, crops=PLAIN_CROP, epochs=1, broken="refuse"))
    assert (len(seen), len(judged)) == (20 + 8 * 3, 8 + 3)
    assert not {sample.name for sample in seen} & {sample.name for sample in judged}
    assert not {sample.image.tobytes() for sample in seen} & {sample.image.tobytes() for sample in judged}


def test_the_package_needs_torch_numpy_and_pillow_only():
    """But for encoded samples, which are safetensors with an index that is checked, and come from a VAE."""
    plain = {*sys.stdlib_module_names, "numpy", "PIL", "torch", "moebius"}
    more = {"shards.py": {"pydantic", "safetensors", "moebius_runtime"}}
    more |= {"encoding.py": {"safetensors", "moebius_runtime"}, "encoded.py": {"safetensors"}}
    for path in Path(moebius.data.__file__).parent.glob("*.py"):
        allowed, parts = plain | more.get(path.name, set()), ("moebius.data", "moebius.errors")
        if path.name == "encoding.py":
            parts += ("moebius.network.vae", "moebius.network.config")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name}: {name}"
                assert not name.startswith("moebius.") or name.startswith(parts)
                assert name.split(".")[0] != "pickle"
