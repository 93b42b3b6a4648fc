"""Pictures to latents in shards: what they hold, going on after a kill, refusals."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from moebius.data import encoding
from moebius.data.datasets import SampleStream, category_ids, collate
from moebius.data.encoded import EncodedStream
from moebius.data.encoding import Autoencoder, EncodeOptions, encode_samples
from moebius.data.masks import MaskSettings
from moebius.data.sources import FolderSource, JsonLinesSource, SceneSource, digest
from moebius.errors import DataError
from moebius.network.config import preset
from moebius.network.vae import VaeEncoder
from moebius.weights.load import load_vae
from moebius_runtime.regions.smooth_fill import fill_pixels

MADE = runpy.run_path(str(Path(__file__).with_name("made.py")))
SIZE = 32
OPTIONS = EncodeOptions(count=11, masks_per_picture=2, shard_size=4, batch=3, dtype="float32", num_categories=12)


def made_vae():
    config = preset("tiny").vae
    network, weights = load_vae("stand-in", config)
    return Autoencoder(VaeEncoder(network.requires_grad_(False)), config, weights.sha256, stand_in=True)


@pytest.fixture(scope="module")
def vae():
    return made_vae()


def stream(seed=0, count=7):
    """An epoch is shorter than what is encoded."""
    return SampleStream(SceneSource(count, SIZE), SIZE, seed=seed)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_shards_hold_what_the_stream_gave(vae, tmp_path):
    told = []
    index = encode_samples(stream(), vae, tmp_path, OPTIONS, told.append)
    assert told == [0, 3, 4, 7, 8, 11]
    names = [f"shard-0000{number}.safetensors" for number in range(3)]
    assert sorted(content(tmp_path)) == ["index.json", *names]
    assert json.loads((tmp_path / "index.json").read_text()) == json.loads(index.model_dump_json())
    assert (index.encoding.latent_size, index.encoding.downscale, index.encoding.vae_stand_in) == (4, 8, True)
    held = [load_file(tmp_path / name) for name in names]
    samples = [sample for sample, _ in zip(stream(), range(11), strict=False)]
    at = 0
    for tensors, pictures in zip(held, (4, 4, 3), strict=True):
        assert tensors["masked_latents"].shape == (pictures, 2, 4, 4, 4)
        assert tensors["mask"].dtype == torch.uint8
        for row in range(pictures):
            batch = collate([samples[at]], 12)
            mode = vae.encoder(batch.image)[0]
            torch.testing.assert_close(tensors["latents"][row], mode, atol=1e-5, rtol=1e-4)
            masked = vae.encoder(batch.image * (1 - batch.mask))[0]
            torch.testing.assert_close(tensors["masked_latents"][row, 0], masked, atol=1e-5, rtol=1e-4)
            assert torch.equal(tensors["mask"][row, 0], torch.tensor(samples[at].mask[None, ::8, ::8]).byte())
            assert tensors["categories"][row].tolist() == category_ids("background", 12)
            at += 1


def test_the_further_holes_are_other_ones_and_their_latents_belong_to_them(vae, tmp_path):
    source = stream()
    encode_samples(source, vae, tmp_path, OPTIONS)
    tensors = load_file(tmp_path / "shard-00000.safetensors")
    for row, sample in zip(range(4), stream(), strict=False):
        first, second = encoding._masks(sample, source, 2)
        assert (first == sample.mask).all()
        assert (first != second).any()
        assert torch.equal(tensors["mask"][row, 1, 0], torch.tensor(second[::8, ::8]).byte())
        batch = collate([sample], 12)
        masked = vae.encoder(batch.image * ~torch.tensor(second))[0]
        torch.testing.assert_close(tensors["masked_latents"][row, 1], masked, atol=1e-5, rtol=1e-4)


def test_a_picture_with_its_own_mask_keeps_it(vae, folder, tmp_path):
    (folder / "m.png").write_bytes(MADE["mask_png"]())
    row = {"image": "a/01.png", "mask": "m.png", "task": "foreground"}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    source = SampleStream(JsonLinesSource(folder / "rows.jsonl"), SIZE)
    encode_samples(source, vae, tmp_path / "out", EncodeOptions(2, 3, num_categories=12))
    tensors = load_file(tmp_path / "out" / "shard-00000.safetensors")
    assert tensors["latents"].dtype == tensors["masked_latents"].dtype == torch.float16
    assert tensors["categories"].tolist() == [category_ids("foreground", 12)] * 2
    assert all(torch.equal(tensors["mask"][:, 0], tensors["mask"][:, hole]) for hole in (1, 2))


def test_starts_are_the_pictures_with_smooth_values_under_each_mask(vae, tmp_path):
    source = stream()
    index = encode_samples(source, vae, tmp_path, replace(OPTIONS, starts=True))
    assert index.encoding.starts
    tensors = load_file(tmp_path / "shard-00000.safetensors")
    for row, sample in zip(range(4), stream(), strict=False):
        for number, mask in enumerate(encoding._masks(sample, source, 2)):
            filled = fill_pixels(sample.image, mask)
            expected = vae.encoder(torch.tensor(filled.transpose(2, 0, 1)[None] / 127.5 - 1, dtype=torch.float32))[0]
            torch.testing.assert_close(tensors["start_latents"][row, number], expected, atol=1e-5, rtol=1e-4)
    batch = next(EncodedStream(tmp_path, batch=4, check_all=True))
    assert batch.start is not None
    assert batch.start.shape == batch.latents.shape
    without = encode_samples(stream(), vae, tmp_path / "without", OPTIONS)
    assert next(EncodedStream(tmp_path / "without", batch=4)).start is None
    old = without.encoding.model_dump_json(exclude={"starts"})  # the fingerprint of version 0.1
    assert without.fingerprint() == digest(["latents", old, *(shard.sha256 for shard in without.shards)])
    with pytest.raises(DataError, match="starts = True"):
        encode_samples(stream(), vae, tmp_path, OPTIONS)


class Killed(BaseException):
    """Raised where a kill would come."""


@pytest.mark.parametrize("at", range(1, 9))
def test_stopped_at_any_write_it_goes_on_to_the_same_bytes(vae, tmp_path, monkeypatch, at):
    """Eight writes: the progress file at first and after each of three shards, the shards, the index."""
    encode_samples(stream(), vae, tmp_path / "straight", OPTIONS)
    done, write = [], encoding.shards.write_whole

    def dying(path, data):
        done.append(path.name)
        if len(done) == at:
            (path.parent / f".{path.name}.0123456789abcdef.part").write_bytes(data[: len(data) // 2])
            raise Killed
        write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(encoding.shards, "write_whole", dying)
        with pytest.raises(Killed):
            encode_samples(stream(), vae, tmp_path / "broken", OPTIONS)
    told = []
    encode_samples(stream(), vae, tmp_path / "broken", OPTIONS, told.append)
    assert told[0] == (0, 0, 0, 4, 4, 8, 8, 11)[at - 1]  # what is behind a progress file is not done again
    assert content(tmp_path / "broken") == content(tmp_path / "straight")


@pytest.mark.slow
def test_killed_by_a_signal(vae, tmp_path):
    """A process of its own, killed within the second shard; this process goes on."""
    code = f"""
import runpy, sys, time
here = runpy.run_path({str(Path(__file__))!r})

def on_progress(pictures):
    if pictures == 7:
        print("seven", flush=True)
        time.sleep(600)

here["encode_samples"](here["stream"](), here["made_vae"](), {str(tmp_path / "out")!r}, here["OPTIONS"], on_progress)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "seven\n"
    finally:
        process.kill()
        process.communicate()
    assert sorted(content(tmp_path / "out")) == ["progress.json", "shard-00000.safetensors"]
    encode_samples(stream(), vae, tmp_path / "out", OPTIONS)
    encode_samples(stream(), vae, tmp_path / "straight", OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_a_finished_folder_is_left_as_it_is(vae, tmp_path):
    first = encode_samples(stream(), vae, tmp_path, OPTIONS)
    before = content(tmp_path)
    (tmp_path / "progress.json").write_bytes((tmp_path / "index.json").read_bytes())  # killed before it was removed
    told = []
    assert encode_samples(stream(), vae, tmp_path, OPTIONS, told.append) == first
    assert told == [11]
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 12}, "count = 11 (now 12)"),
        ({"masks_per_picture": 1}, "masks_per_picture = 2 (now 1)"),
        ({"dtype": "float16"}, "dtype = float32 (now float16)"),
        ({"batch": 4}, "batch = 3 (now 4)"),
        ({"bf16": True}, "bf16 = False (now True)"),
        ({"num_categories": 20}, "num_categories = 12 (now 20)"),
    ],
)
def test_another_encoding_is_refused(vae, tmp_path, change, said):
    encode_samples(stream(), vae, tmp_path, OPTIONS)
    with pytest.raises(DataError) as caught:
        encode_samples(stream(), vae, tmp_path, EncodeOptions(**{**OPTIONS.__dict__, **change}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_data_seed_masks_or_vae_are_refused(vae, tmp_path):
    encode_samples(stream(), vae, tmp_path, OPTIONS)
    plain = MaskSettings(strokes=1)
    others = [
        (stream(seed=1), vae, "seed = 0 (now 1)"),
        (stream(count=8), vae, "source ="),
        (SampleStream(SceneSource(7, SIZE), SIZE, masks=plain), vae, "drawing ="),
        (stream(), Autoencoder(vae.encoder, vae.config, "0" * 64, stand_in=True), "vae_sha256 ="),
    ]
    for source, network, said in others:
        with pytest.raises(DataError, match=r"holds an encoding with") as caught:
            encode_samples(source, network, tmp_path, OPTIONS)
        assert said in str(caught.value)


def test_a_damaged_shard_of_an_unfinished_run_is_named(vae, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="ended after 9 pictures; give more, or encode 9 at most"):
        encode_samples(SampleStream(SceneSource(9, SIZE), SIZE, epochs=1), vae, tmp_path, OPTIONS)
    path = tmp_path / "shard-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-00001.safetensors: its SHA-256"):
        encode_samples(SampleStream(SceneSource(9, SIZE), SIZE, epochs=1), vae, tmp_path, OPTIONS)


def test_folders_and_streams_that_do_not_serve(vae, folder, tmp_path):
    with pytest.raises(DataError, match="holds other files"):
        encode_samples(stream(), vae, folder, OPTIONS)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose another folder"):
        encode_samples(stream(), vae, tmp_path / "file", OPTIONS)
    moved = stream()
    next(moved)
    with pytest.raises(DataError, match="expected one at its start"):
        encode_samples(moved, vae, tmp_path / "out", OPTIONS)
    with pytest.raises(DataError, match="of one process"):
        encode_samples(SampleStream(SceneSource(7, SIZE), SIZE, world=2), vae, tmp_path / "out", OPTIONS)
    with pytest.raises(DataError, match="a multiple of 8"):
        encode_samples(SampleStream(SceneSource(7, SIZE), 36), vae, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    for change in ({"count": 0}, {"dtype": "int8"}, {"count": 10**9}):
        with pytest.raises(DataError):
            EncodeOptions(**{**OPTIONS.__dict__, **change})


class Loud(torch.nn.Module):
    """Latents that float16 cannot hold."""

    scaling_factor = 1.0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, image):
        return torch.full((image.shape[0], 4, image.shape[2] // 8, image.shape[3] // 8), 1e6) * self.weight


def test_latents_that_float16_cannot_hold_stop_it(vae, tmp_path):
    loud = Autoencoder(Loud(), vae.config, "0" * 64)
    with pytest.raises(DataError, match="latents holds NaN or infinite numbers; check the VAE; store float32"):
        encode_samples(stream(), loud, tmp_path / "half", EncodeOptions(3))
    encode_samples(stream(), loud, tmp_path / "whole", EncodeOptions(3, dtype="float32"))


def test_bfloat16_is_near(vae, tmp_path):
    held = []
    for bf16 in (False, True):
        out = tmp_path / str(bf16)
        encode_samples(stream(), vae, out, EncodeOptions(3, bf16=bf16, dtype="float32", num_categories=12))
        held.append(load_file(out / "shard-00000.safetensors")["latents"])
    error = (held[0] - held[1]).abs().max() / held[0].abs().max()
    assert 0 < error < 0.05


def test_broken_pictures_are_counted(vae, folder, tmp_path):
    (folder / "a" / "01.png").write_bytes(b"no picture")
    source = SampleStream(FolderSource(folder), SIZE)
    index = encode_samples(source, vae, tmp_path / "out", EncodeOptions(14, num_categories=12))
    assert index.position.skipped >= 1
    assert np.isfinite(load_file(tmp_path / "out" / "shard-00000.safetensors")["latents"].numpy()).all()
