"""`moebius-distill encode`, as a command of its own."""

from __future__ import annotations

import pytest
import typer

from moebius.data.encoded import EncodedStream
from moebius.data.shards import read_index
from moebius.distill.commands.encode import encode_command, weighted
from moebius.errors import CheckpointError, DataError, TrainingError

TINY = ["--vae", "stand-in", "--preset", "tiny", "--size", "32", "--threads", "0", "--device", "cpu"]


def encode(*arguments):
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(encode_command)
    return app(list(map(str, arguments)), standalone_mode=False)


def test_joined_data_to_a_folder_that_trains(tmp_path, capsys):
    out = tmp_path / "latents"
    arguments = ("scenes:4", "scenes:2:9@3", out, *TINY, "--count", 12, "--shard-size", 8, "--masks-per-picture", 2)
    encode(*arguments)
    shown = capsys.readouterr()
    assert f"{out}: 24 samples of 12 pictures" in shown.out
    assert "random test weights" in shown.err
    settings = read_index(out).encoding
    assert (settings.picture_size, settings.latent_size, settings.num_categories) == (32, 4, 12)
    assert (settings.dtype, settings.bf16, settings.masks_per_picture) == ("float16", False, 2)
    batch = next(EncodedStream(out, batch=24))
    assert len(batch.latents.flatten(1).unique(dim=0)) == 12  # each with two holes
    encode(*arguments)  # done already


def test_size_is_the_networks_by_default(tmp_path):
    encode("scenes:2", tmp_path / "out", *TINY[:4], "--count", 1, "--dtype", "float32", "--seed", 4)
    settings = read_index(tmp_path / "out").encoding
    assert (settings.picture_size, settings.latent_size, settings.dtype, settings.seed) == (128, 16, "float32", 4)


@pytest.mark.parametrize(
    ("text", "source", "times"),
    [
        ("scenes:4", "scenes:4", 1),
        ("scenes:4:1@20", "scenes:4:1", 20),
        ("a@b", "a@b", 1),
        ("a@0", "a@0", 1),
        ("a@3@2", "a@3", 2),
    ],
)
def test_weights_of_sources(text, source, times):
    part = weighted(text)
    assert (part.source, part.times) == (source, times)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (["scenes:4", "OUT", *TINY, "--count", 1, "--dtype", "int8"], DataError, "--dtype int8: expected float16"),
        (["nothing", "OUT", *TINY, "--count", 1], DataError, "data nothing: no such file or folder"),
        (["scenes:4", "OUT", *TINY, "--count", 1, "--size", 36], DataError, "a multiple of 8"),
        (["scenes:4", "OUT", *TINY, "--count", 1, "--preset", "huge"], CheckpointError, "no preset 'huge'"),
        (["scenes:4", "OUT", *TINY, "--count", 1, "--device", "cuda:99"], DataError, "--device cuda:99"),
        (["scenes:4", "OUT", *TINY, "--count", 1, "--device", "warp"], DataError, "--device warp"),
        (["scenes:4", "OUT", *TINY, "--count", 1, "--device", "meta"], DataError, "--device meta"),
        (["scenes:4", "OUT", *TINY, "--count", 1, "--vae", "no/file"], CheckpointError, "no/file"),
        (["scenes:4", "TAR", "OUT", *TINY, "--count", 1], TrainingError, "cannot be joined"),
    ],
)
def test_refusals(tmp_path, arguments, error, said):
    tar = tmp_path / "a.tar"
    tar.write_bytes(bytes(1024))
    places = {"OUT": tmp_path / "out", "TAR": tar}
    with pytest.raises(error) as caught:
        encode(*(places.get(str(argument), argument) for argument in arguments))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
