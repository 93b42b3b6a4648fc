"""The stream of encoded samples: order, processes, resuming, and folders that someone changed."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebius.data import encoded
from moebius.data.encoded import EncodedStream
from moebius.data.shards import Encoding, Index, Position, Shard, read_index, shard_name, write_index
from moebius.errors import DataError

COUNT, HOLES, SHARD = 7, 2, 3


@pytest.fixture
def latents(tmp_path):
    """Seven pictures of two holes in three shards. Numbers tell them: the latent its picture, the masked one both."""
    encoding = Encoding(
        count=COUNT,
        masks_per_picture=HOLES,
        shard_size=SHARD,
        batch=2,
        picture_size=32,
        latent_size=4,
        latent_channels=4,
        downscale=8,
        scaling_factor=0.13025,
        dtype="float16",
        bf16=False,
        num_categories=12,
        vae_sha256="0" * 64,
        vae_stand_in=True,
        source="0" * 16,
        drawing="0" * 16,
        seed=0,
    )
    folder = tmp_path / "latents"
    folder.mkdir()
    shards = []
    for number in range(encoding.shards):
        tensors = {name: torch.zeros(shape, dtype=kind) for name, (shape, kind) in encoding.shapes(number).items()}
        for row in range(encoding.pictures(number)):
            picture = number * SHARD + row
            tensors["latents"][row] = picture
            tensors["categories"][row] = picture
            for hole in range(HOLES):
                tensors["masked_latents"][row, hole] = picture + hole / 4
                tensors["mask"][row, hole, 0, hole] = 1
        save_file(tensors, folder / shard_name(number))
        data = (folder / shard_name(number)).read_bytes()
        shards.append(Shard(size=len(data), sha256=hashlib.sha256(data).hexdigest()))
    position = Position(epoch=0, number=7, skipped=0, seed=0, world=1, source="0" * 16)
    write_index(Index(encoding=encoding, shards=shards, position=position), folder)
    return folder


def told(batch):
    """Which samples a batch holds: (picture, hole), found in each of its tensors."""
    pictures = batch.latents[:, 0, 0, 0].tolist()
    assert batch.categories[:, 0].tolist() == pictures
    holes = [4 * (value - picture) for value, picture in zip(batch.masked[:, 3, 3, 3].tolist(), pictures, strict=True)]
    assert batch.mask[:, 0, :, 0].argmax(dim=1).tolist() == holes
    return list(zip(pictures, holes, strict=True))


def taken(stream, count):
    return [pair for _ in range(count) for pair in told(next(stream))]


def test_batches(latents):
    stream = EncodedStream(latents, batch=5)
    assert len(stream) == COUNT * HOLES
    batch = next(iter(stream))
    assert [tuple(value.shape) for value in batch[:4]] == [(5, 4, 4, 4), (5, 4, 4, 4), (5, 1, 4, 4), (5, 6)]
    assert [value.dtype for value in batch[:4]] == [torch.float32] * 3 + [torch.int64]
    assert set(batch.mask.unique().tolist()) == {0, 1}
    assert batch.start is None


def test_each_epoch_is_another_permutation_of_all_samples(latents):
    pairs = taken(EncodedStream(latents, batch=7), 6)
    epochs = [pairs[start : start + 14] for start in (0, 14, 28)]
    everything = sorted((picture, hole) for picture in range(COUNT) for hole in range(HOLES))
    assert all(sorted(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert taken(EncodedStream(latents, batch=7, seed=1), 2) != epochs[0]
    assert taken(EncodedStream(latents, batch=4), 7) == pairs[:28]  # the order is the batches' size's no matter


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_what_one_would_get(latents, world):
    """Also where an epoch does not divide by their number: 14 samples."""
    alone = EncodedStream(latents, batch=2 * world)
    several = [EncodedStream(latents, batch=2, rank=rank, world=world) for rank in range(world)]
    for _ in range(9):
        whole = next(alone)
        parts = [next(stream) for stream in several]
        for name in whole._fields[:4]:
            for rank, part in enumerate(parts):
                assert torch.equal(getattr(part, name), getattr(whole, name)[rank::world])


def test_resuming_equals_going_straight(latents):
    straight = taken(EncodedStream(latents, batch=3, rank=1, world=2), 9)
    for position in range(9):
        with EncodedStream(latents, batch=3, rank=1, world=2) as before:
            taken(before, position)
            state = json.loads(json.dumps(before.state_dict()))
        after = EncodedStream(latents, batch=3, rank=1, world=2)
        next(after)
        after.load_state_dict(state)
        assert taken(after, 9 - position) == straight[3 * position :]


def test_a_position_fits_a_copy_and_nothing_else(latents, tmp_path):
    stream = EncodedStream(latents, batch=3)
    next(stream)
    state = stream.state_dict()
    shutil.copytree(latents, tmp_path / "copy")
    EncodedStream(tmp_path / "copy", batch=3).load_state_dict(state)
    index = json.loads((latents / "index.json").read_text())
    index["encoding"]["seed"] = 1
    (tmp_path / "copy" / "index.json").write_text(json.dumps(index))
    for other, said in (
        (EncodedStream(tmp_path / "copy", batch=3), "another set of pictures"),
        (EncodedStream(latents, batch=3, seed=1), "another seed"),
        (EncodedStream(latents, batch=3, world=2), "another number of processes"),
    ):
        with pytest.raises(DataError, match=said):
            other.load_state_dict(state)
    for broken in ({}, {**state, "position": -1}, {**state, "position": True}, {**state, "more": 1}):
        with pytest.raises(DataError, match="a data position of"):
            stream.load_state_dict(broken)
    assert stream.state_dict() == state


def test_few_files_are_open(latents, monkeypatch):
    monkeypatch.setattr(encoded, "_OPEN_SHARDS", 2)
    stream = EncodedStream(latents, batch=14)
    for _ in range(3):
        assert len(set(told(next(stream)))) == 14
        assert len(stream._open) == 2
    stream.close()
    assert not stream._open
    assert len(set(told(next(stream)))) == 14


def test_arguments(latents):
    for wrong in ({"batch": 0}, {"seed": -1}, {"rank": 1}, {"rank": -1}, {"world": 0}):
        with pytest.raises(DataError, match="expected batch >= 1"):
            EncodedStream(latents, **{"batch": 2, **wrong})


def test_a_changed_shard_is_found_when_it_is_asked_for_or_at_once(latents):
    path = latents / shard_name(1)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    stream = EncodedStream(latents, batch=14)
    with pytest.raises(DataError, match=r"shard-00001.safetensors: its SHA-256 is not the index's"):
        next(stream)
    with pytest.raises(DataError, match="SHA-256"):
        EncodedStream(latents, batch=1, check_all=True)
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"bytes, expected .* by the index"):
        EncodedStream(latents, batch=1)
    path.unlink()
    with pytest.raises(DataError, match="No such file"):
        EncodedStream(latents, batch=1)
    path.symlink_to(path)
    with pytest.raises(DataError, match="shard-00001"):
        EncodedStream(latents, batch=1)


def test_a_link_out_of_the_folder_is_refused(latents, tmp_path):
    path = latents / shard_name(0)
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a link that leaves the folder"):
        EncodedStream(latents, batch=1)


def forged(latents, number, change):
    """A shard with other tensors, and an index that vouches for it."""
    path = latents / shard_name(number)
    if isinstance(change, bytes):
        path.write_bytes(change)
    else:
        tensors = load_file(path)
        tensors.update(change(tensors))
        save_file({name: value for name, value in tensors.items() if value is not None}, path)
    index = read_index(latents)
    shards = list(index.shards)
    data = path.read_bytes()
    shards[number] = Shard(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    write_index(index.model_copy(update={"shards": shards}), latents)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda held: {"mask": None}, "mask is not there; expected mask [3, 2, 1, 4, 4] uint8"),
        (lambda held: {"more": held["mask"] + 1}, "more [3, 2, 1, 4, 4] uint8; expected more is not there"),
        (lambda held: {"latents": held["latents"].float()}, "latents [3, 4, 4, 4] float32; expected latents"),
        (lambda held: {"latents": held["latents"][:2]}, "latents [2, 4, 4, 4] float16; expected latents"),
        (lambda held: {"latents": held["latents"] / 0}, "latents holds NaN or infinite"),
        (lambda held: {"masked_latents": held["masked_latents"] * torch.nan}, "masked_latents holds NaN"),
        (lambda held: {"mask": held["mask"] * 2}, "mask holds other numbers than 0 and 1"),
        (lambda held: {"categories": held["categories"] + 12}, "categories holds ids outside 0 to 11"),
        (lambda held: {"categories": held["categories"] - 12}, "categories holds ids outside 0 to 11"),
        (b"\xff" * 64, "not a safetensors file"),
    ],
)
def test_forged_shards(latents, change, said):
    forged(latents, 0, change)
    with pytest.raises(DataError) as caught:
        EncodedStream(latents, batch=1, check_all=True)
    assert said in str(caught.value)
    with pytest.raises(DataError):
        next(EncodedStream(latents, batch=14))


def edited(content, path, value):
    *parents, last = path
    held = content
    for name in parents:
        held = held[name]
    if value is None:
        del held[last]
    else:
        held[last] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("schema_version",), 2, "schema version 2, expected 1"),
        (("schema_version",), True, "schema version True, expected 1"),
        (("encoding", "count"), "7", "encoding.count"),
        (("encoding", "count"), 9.0, "encoding.count"),
        (("encoding", "count"), 10, "3 shards, expected 4"),
        (("encoding", "scaling_factor"), float("inf"), "encoding.scaling_factor"),
        (("encoding", "dtype"), "int8", "encoding.dtype"),
        (("encoding", "latent_size"), 1 << 40, "encoding.latent_size"),
        (("encoding", "vae_sha256"), None, "encoding.vae_sha256"),
        (("encoding", "more"), 1, "encoding.more"),
        (("shards", 0, "sha256"), "../x", "shards.0.sha256"),
        (("shards", 0, "size"), 0, "shards.0.size"),
        (("shards",), [], "0 shards, expected 3"),
        (("position", "number"), -1, "position.number"),
    ],
)
def test_edited_indexes(latents, path, value, said):
    file = latents / "index.json"
    file.write_text(edited(json.loads(file.read_text()), path, value))
    with pytest.raises(DataError) as caught:
        EncodedStream(latents, batch=1)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_that_are_none_of_ours(latents, tmp_path):
    file = latents / "index.json"
    for content in (b"[]", b"{", b"\xff", b"[" * 100_000, b"null"):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"index.json: (not JSON|schema version None)"):
            EncodedStream(latents, batch=1)
    file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match="it is a folder; expected a folder that"):
        EncodedStream(latents, batch=1)
    file.rmdir()
    (latents / "progress.json").write_text("{}")
    with pytest.raises(DataError, match="the encoding is not finished; run the same"):
        EncodedStream(latents, batch=1)
    with pytest.raises(DataError, match="No such file"):
        EncodedStream(tmp_path / "nothing", batch=1)
