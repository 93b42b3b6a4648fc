from __future__ import annotations

import hashlib
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from moebius.data import noise, scenes
from moebius.data.patterns import PATTERNS
from moebius.data.scenes import KINDS, scene
from moebius.errors import DataError

# SHA-256 of scenes 0 to 39 at 64 x 96, the same on every machine. A change of any surface changes it: set it anew then.
GOLDEN = "e6ddb76818813c26e25565b58fe50d67a6c9bce1a57448e09d0e85b4da349c65"


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.0.0", reason="NumPy 1 rounds some scalars otherwise")
def test_the_same_bytes_everywhere():
    digest = hashlib.sha256()
    for index in range(40):
        digest.update(scene(index, 64, 96).tobytes())
    assert digest.hexdigest() == GOLDEN


def test_a_scene_depends_on_its_arguments_alone():
    first = scene(3, 64, seed=5)
    np.random.seed(1)  # the global generator must not matter
    scene(4, 32)
    np.testing.assert_array_equal(scene(3, 64, seed=5), first)
    code = "from moebius.data.scenes import scene; import sys; sys.stdout.buffer.write(scene(3, 64, seed=5).tobytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    assert done.stdout == first.tobytes()


def test_no_torch_is_needed():
    code = "import sys, moebius.data.scenes, moebius.data.masks; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True, timeout=60)
    assert done.stdout == "False\n"


def test_indices_seeds_and_splits_give_other_scenes():
    seen = {
        scene(index, 32, seed=seed, held_out=held_out).tobytes()
        for index in range(20)
        for seed in range(4)
        for held_out in (False, True)
    }
    assert len(seen) == 160


def test_the_splits_share_no_generator(monkeypatch):
    """Seeds of the generators are compared, not pictures: no training scene can ever be one of the held-out ones."""
    keys = {False: set(), True: set()}
    real = np.random.PCG64

    def kept(key, held_out):
        if isinstance(key, list):  # else it is the generator of a part, whose key the scene's own has drawn
            keys[held_out].add(tuple(key))
        return real(key)

    for held_out in (False, True):
        monkeypatch.setattr(scenes.np.random, "PCG64", partial(kept, held_out=held_out))
        for seed in (0, 1, 2, 3, 2**40):
            for index in range(3):
                scene(index, 16, seed=seed, held_out=held_out)
    assert len(keys[False]) == len(keys[True]) == 15
    assert not keys[False] & keys[True]


@pytest.mark.parametrize("shape", [(16, 16), (17, 40), (129, 63), (200, 64)])
def test_every_kind_at_odd_sizes(shape):
    canvas = noise.Canvas.of(*shape)
    for kind in (*KINDS, *PATTERNS):
        for seed in range(3):
            picture = kind(np.random.Generator(np.random.PCG64(seed)), canvas)
            assert picture.shape == (3, *shape), kind
            assert picture.dtype == np.float32, kind
            assert np.isfinite(picture).all(), kind


def test_another_size_shows_the_same_scene():
    """Small and large agree where both are blurred: lengths follow the picture."""
    for index in range(12):
        large = scene(index, 128).astype(float).reshape(8, 16, 8, 16, 3).mean((1, 3))
        small = scene(index, 64).astype(float).reshape(8, 8, 8, 8, 3).mean((1, 3))
        other = scene(index + 100, 64).astype(float).reshape(8, 8, 8, 8, 3).mean((1, 3))
        assert np.abs(large - small).mean() < 0.6 * np.abs(large - other).mean() + 2, index


def test_scenes_vary_and_use_the_range():
    pictures = np.stack([scene(index, 32) for index in range(150)]).astype(float)
    means = pictures.mean((1, 2))
    assert 80 < pictures.mean() < 170
    assert (means.std(0) > 25).all()  # of colours between pictures
    assert np.median(pictures.std((1, 2)).mean(1)) > 15  # of pixels within one
    flat = (pictures.std((1, 2)).mean(1) < 2).mean()
    assert flat < 0.05
    clipped = ((pictures == 0) | (pictures == 255)).all(axis=3).mean()
    assert clipped < 0.1


@pytest.mark.parametrize("arguments", [(-1, 64), (0, 15), (0, 64, 8193), (0, 64, 64, -1)])
def test_refusals(arguments):
    with pytest.raises(DataError, match="expected"):
        scene(*arguments)


def test_blocks():
    rng = np.random.Generator(np.random.PCG64(0))
    for _ in range(50):
        a, b = noise.direction(rng)
        assert a * a + b * b == pytest.approx(1, abs=1e-6)
    angles = [np.arctan2(*noise.direction(rng)) for _ in range(4000)]
    counts, _ = np.histogram(angles, bins=8, range=(-np.pi, np.pi))
    assert counts.min() > 350  # all directions come, about evenly
    t = np.linspace(-2, 2, 401, dtype=np.float32)
    waved = noise.wave(t)
    np.testing.assert_allclose(waved[::100], 1, atol=1e-5)
    np.testing.assert_allclose(waved[50::100], 0, atol=1e-5)
    stops = [np.array(c, np.float32) for c in ([0, 0, 0], [1, 0, 0], [1, 1, 0])]
    ramp = noise.ramp(np.array([[0, 0.25, 0.5, 1]], np.float32), stops)
    np.testing.assert_allclose(ramp[:, 0].T, [[0, 0, 0], [0.5, 0, 0], [1, 0, 0], [1, 1, 0]], atol=1e-3)
