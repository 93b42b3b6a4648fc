import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from moebius_bench.paper.quality import measure_quality, quality_lines
from moebius_runtime.errors import InputError, RuntimeUnavailableError


def picture(seed, size=64):
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0 : size + 8]
    base = 128 + 60 * np.sin(x / 5 + seed) + 40 * np.cos(y / 7)
    return np.clip(base[..., None] + rng.normal(0, 10, (size, size + 8, 3)), 0, 255).astype(np.uint8)


def save(folder, pictures):
    folder.mkdir()
    for stem, pixels in pictures.items():
        Image.fromarray(pixels).save(folder / f"{stem}.png")
    return folder


@pytest.fixture
def folders(tmp_path):
    """Three true pictures, and filled ones: one equal, one noisy, one noisy in a corner."""
    real = {name: picture(seed) for seed, name in enumerate("abc")}
    rng = np.random.default_rng(9)
    noisy = np.clip(real["b"] + rng.normal(0, 25, real["b"].shape), 0, 255).astype(np.uint8)
    corner = real["c"].copy()
    corner[:20, :20] = noisy[:20, :20]
    hole = np.zeros((64, 72), np.uint8)
    hole[:20, :20] = 255
    return (
        save(tmp_path / "real", real),
        save(tmp_path / "fake", {"a": real["a"], "b": noisy, "c": corner}),
        save(tmp_path / "mask", dict.fromkeys("abc", hole)),
    )


def test_metrics_are_scikit_image_s(folders):
    metrics = pytest.importorskip("skimage.metrics")
    real, fake, mask = folders
    result = measure_quality(real, fake, mask, None, None)
    assert (result.pairs, result.identical) == (3, 1)
    expected_psnr = []
    for found in result.pictures:
        a, b = (np.asarray(Image.open(folder / f"{found.stem}.png")) for folder in (real, fake))
        value, local = metrics.structural_similarity(
            a,
            b,
            channel_axis=-1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=255,
            full=True,
        )
        # Both are float64; skimage cuts its Gaussian at the same 11 pixels.
        assert found.ssim == pytest.approx(value, abs=1e-12)
        assert found.ssim_in_mask == pytest.approx(local[:20, :20].mean(), abs=1e-12)
        if found.psnr is None:
            assert found.stem == "a"
            continue
        psnr = metrics.peak_signal_noise_ratio(a, b, data_range=255)
        inside = metrics.peak_signal_noise_ratio(a[:20, :20], b[:20, :20], data_range=255)
        assert found.psnr == pytest.approx(psnr, abs=1e-9)
        assert found.psnr_in_mask == pytest.approx(inside, abs=1e-9)
        expected_psnr.append(psnr)
    assert result.psnr == pytest.approx(np.mean(expected_psnr))


def test_what_was_not_computed_is_said_and_is_no_number(folders):
    result = measure_quality(*folders[:2], None, None, None)
    assert result.fid is None
    assert result.lpips is None
    assert set(result.not_computed) == {"FID", "LPIPS", "PSNR and SSIM inside the mask"}
    lines = list(quality_lines(result))
    assert "FID: not computed, its network was not given (--fid-weights)" in lines
    assert "LPIPS: not computed, its network was not given (--lpips-weights)" in lines
    assert not any(line.startswith(("FID 0", "FID nan", "LPIPS 0")) for line in lines)
    content = json.loads(result.model_dump_json())
    assert content["fid"] is None


def test_equal_pictures(tmp_path):
    pixels = picture(0)
    real, fake = (save(tmp_path / name, {"a": pixels}) for name in ("real", "fake"))
    result = measure_quality(real, fake, None, None, None)
    assert result.psnr is None
    assert result.ssim == 1
    assert "PSNR infinite: every pair is equal" in list(quality_lines(result))


def test_the_least_similar_picture_is_named(folders):
    assert list(quality_lines(measure_quality(*folders[:2], None, None, None)))[-1].startswith("least similar: b")


def test_pairs_that_do_not_fit_are_refused(folders, tmp_path):
    real, fake, mask = folders
    (fake / "b.png").rename(fake / "d.png")
    with pytest.raises(InputError, match="do not pair: b, d in one of them only"):
        measure_quality(real, fake, None, None, None)
    (fake / "d.png").rename(fake / "b.png")
    (mask / "c.png").unlink()
    with pytest.raises(InputError, match="do not pair: c"):
        measure_quality(real, fake, mask, None, None)
    Image.fromarray(picture(0, 80)).save(fake / "a.png")
    with pytest.raises(InputError, match=r"a: the true picture is 72x64, the filled one 88x80"):
        measure_quality(real, fake, None, None, None)
    Image.fromarray(picture(1)).save(real / "a.bmp")
    with pytest.raises(InputError, match=r"a\.bmp and a\.png have one stem"):
        measure_quality(real, fake, None, None, None)
    with pytest.raises(InputError, match="is no folder"):
        measure_quality(real / "a.png", fake, None, None, None)
    with pytest.raises(InputError, match="holds no picture"):
        measure_quality(save(tmp_path / "empty", {}), fake, None, None, None)


@pytest.fixture
def archive(tmp_path):
    """Writes TorchScript archives of small networks."""
    torch = pytest.importorskip("torch")

    class Distance(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs().mean(dim=[1, 2, 3], keepdim=True)

    class Features(torch.nn.Module):
        def forward(self, image: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            means = image.float().mean(dim=[2, 3])
            return means if return_features else means * 0

    class Map(torch.nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a - b).abs()

    def write(kind):
        path = tmp_path / f"{kind}.pt"
        module = {"distance": Distance, "features": Features, "map": Map}[kind]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            torch.jit.script(module).save(str(path))
        return path

    return write


def test_lpips_is_the_archive_s_distance_of_pictures_in_minus_one_to_one(folders, archive):
    real, fake, _ = folders
    path = archive("distance")
    result = measure_quality(real, fake, None, None, path)
    for found in result.pictures:
        a, b = (np.asarray(Image.open(folder / f"{found.stem}.png")).astype(float) for folder in (real, fake))
        # float32 sums of 13,824 values
        assert found.lpips == pytest.approx(np.abs(a - b).mean() / 127.5, rel=1e-5, abs=1e-7)
    assert result.lpips == pytest.approx(np.mean([p.lpips for p in result.pictures]))
    assert "LPIPS" not in result.not_computed
    assert len(result.networks["LPIPS"]) == 64


def test_an_archive_that_is_not_the_network_is_refused(folders, archive, tmp_path):
    real, fake, _ = folders
    with pytest.raises(InputError, match="expected one number"):
        measure_quality(real, fake, None, None, archive("map"))
    with pytest.raises(InputError, match="not a TorchScript archive of this network"):
        measure_quality(real, fake, None, None, archive("features"))
    junk = tmp_path / "junk.pt"
    junk.write_bytes(b"junk")
    with pytest.raises(InputError, match="not a TorchScript archive"):
        measure_quality(real, fake, None, None, junk)
    with pytest.raises(InputError, match="there is no such file"):
        measure_quality(real, fake, None, None, tmp_path / "missing.pt")


def test_fid_is_the_frechet_distance_of_the_archive_s_features(tmp_path, archive):
    """Features of three channel means; the distance worked out here from the closed form."""
    pytest.importorskip("torchmetrics")
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    sets = {}
    for name, shift in (("real", 0), ("fake", 20)):
        sets[name] = {
            f"{i}": rng.integers(shift, rng.integers(150, 200) + shift, (64, 64, 3), dtype=np.uint8) for i in range(12)
        }
    real, fake = (save(tmp_path / name, pictures) for name, pictures in sets.items())
    result = measure_quality(real, fake, None, archive("features"), None)
    first, second = (np.array([p.mean(axis=(0, 1)) for p in s.values()]) for s in sets.values())
    s1, s2 = np.cov(first.T), np.cov(second.T)
    means = first.mean(axis=0) - second.mean(axis=0)
    expected = means @ means + np.trace(s1 + s2 - 2 * linalg.sqrtm(s1 @ s2).real)
    assert result.fid == pytest.approx(expected, rel=1e-4)  # the features are float32
    assert any("unreliable below 2048" in line for line in quality_lines(result))
    assert not math.isnan(result.fid)


def test_fid_gets_the_true_and_the_filled_pictures(folders, tmp_path, monkeypatch):
    seen = {True: [], False: []}

    class Network:
        def __init__(self, path):
            assert path == tmp_path / "network.pt"

        def __call__(self, pixels):
            return pixels

    class Distance:
        def add(self, features, real):
            seen[real].append(features)

        def compute(self):
            return 1.25

    monkeypatch.setattr("moebius_bench.paper.perceptual.FidNetwork", Network)
    monkeypatch.setattr("moebius_bench.paper.perceptual.FidDistance", Distance)
    (tmp_path / "network.pt").write_bytes(b"x")
    result = measure_quality(*folders[:2], None, tmp_path / "network.pt", None)
    for real, folder in zip((True, False), folders, strict=False):
        for pixels, stem in zip(seen[real], "abc", strict=True):
            np.testing.assert_array_equal(pixels, np.asarray(Image.open(folder / f"{stem}.png")))
    assert result.fid == 1.25
    assert "FID" not in result.not_computed


def test_fid_without_its_library_is_a_refusal_not_a_number(folders, archive, monkeypatch):
    import builtins

    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchmetrics"):
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    path = archive("features")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RuntimeUnavailableError, match=r"FID needs torchmetrics.*moebius-edge\[quality\]"):
        measure_quality(*folders[:2], None, path, None)
