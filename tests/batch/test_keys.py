"""Keys decide shards and seeds: the rules of docs/bulk.md, written again here, and keys that are refused."""

import hashlib

import pytest

from moebius_batch.items import LEAST_SHARDS, Blob, Item, Shard, cut
from moebius_batch.keys import check_key, parse_share, seed_of, shard_of
from moebius_runtime.errors import InputError


def test_shard_and_seed_are_those_of_the_documented_hash():
    for key in ("a", "folder/ü 1", "0/p00001"):
        whole = int(hashlib.sha256(b"shard\0" + key.encode()).hexdigest(), 16)
        assert shard_of(key, 1000) == (whole >> 192) % 1000
        assert seed_of(key, 7) == int(hashlib.sha256(b"seed\x007\0" + key.encode()).hexdigest()[:8], 16)


def test_golden_values():
    """Results of finished jobs follow from these: they may never change."""
    assert [shard_of(key, 16) for key in ("a", "b", "0/p00001")] == [2, 12, 0]
    assert [seed_of("a", 0), seed_of("a", 1), seed_of("b", 0)] == [1676974610, 2879166356, 3219761382]


def test_seeds_differ_between_keys_and_jobs():
    seeds = {seed_of(f"p{number}", seed) for number in range(1000) for seed in (0, 1)}
    assert len(seeds) == 2000


@pytest.mark.parametrize(
    "key",
    ["", "../a", "a/../b", "/a", "a//b", "a/", "./a", "a\\b", "c:a", "a\0b", "a\nb", ".hidden", "a/.b", "a ", "a.",
     "x" * 500, "ü" * 150, "_moebius-batch/job", "_Moebius-Batch", "a?b"],
)  # fmt: skip
def test_keys_that_could_leave_the_folder_or_the_file_system_are_refused(key):
    with pytest.raises(InputError, match="cannot name a result") as caught:
        check_key(key, "the table")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("the table: ")


@pytest.mark.parametrize("key", ["a", "a/b/c", "Bild 1", "ü", "a.b", "a-b_c(1)", "_moebius-batch-2/x"])
def test_plain_keys_pass(key):
    assert check_key(key, "here") == key


def items(count):
    return [
        Item(f"p{number}", f"p{number}.png", Blob(f"/x/p{number}.png", 3, "t"), Blob("m")) for number in range(count)
    ]


def test_every_picture_is_in_one_shard_that_depends_on_its_key_alone():
    shards = cut(items(1000), 50)
    assert len(shards) == 20
    assert sorted(item.key for shard in shards for item in shard.items) == sorted(item.key for item in items(1000))
    for shard in shards:
        assert all(shard_of(item.key, 20) == shard.number for item in shard.items)
        assert [item.key for item in shard.items] == sorted(item.key for item in shard.items)
    assert cut(reversed(items(1000)), 50) == shards


def test_small_jobs_are_cut_so_that_several_processes_find_work():
    assert len(cut(items(40), 64)) == LEAST_SHARDS
    assert len(cut(items(5), 64)) == 5
    assert cut([], 64) == []


def test_a_shard_travels_as_json():
    for shard in (*cut(items(20), 10), Shard(3, "part", tar=Blob("s3://b/part.tar", 12))):
        assert Shard.from_json(shard.to_json()) == shard


def slurm(task, low, count, **more):
    names = {"ID": task, "MIN": low, "COUNT": count, **more}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}


def test_shares():
    assert parse_share("2/16", slurm(1, 1, 4)) == (2, 16)
    assert parse_share(None, {}) == (1, 1)
    assert [parse_share(None, slurm(task, 3, 4)) for task in (3, 6)] == [(1, 4), (4, 4)]
    assert parse_share(None, slurm(8, 0, 4, STEP=4)) == (3, 4)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "1/0", "a/b", "-1/4", "1/4/2", "１/4", "1 / 4", ""])
def test_wrong_shares_are_refused(text):
    with pytest.raises(InputError, match="expected I/N"):
        parse_share(text, {})


@pytest.mark.parametrize("environment", [slurm(7, 3, 2), slurm(5, 0, 4, STEP=4), slurm("x", 0, 4), slurm(0, 1, 4)])
def test_an_array_with_gaps_is_refused(environment):
    with pytest.raises(InputError, match="give --shard"):
        parse_share(None, environment)
