"""The command line. The measurement itself runs once, for real, on the tiny bundle."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from moebius_bench import cli
from moebius_bench.measure.results import Report


def bench(*arguments):
    command = [sys.executable, "-m", "moebius_bench.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def error_of(done, code=2):
    """The one line on the error stream of a refusal."""
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[-1]


@pytest.fixture(scope="module")
def measured(tiny_bundle, tmp_path_factory):
    """One real run: ONNX Runtime against eager PyTorch, two rounds, with a profile."""
    folder = tmp_path_factory.mktemp("bench")
    files = folder / "report.json", folder / "report.html"
    arguments = ("--threads", 1, "--steps", 4, "--rounds", 2, "--baseline", "torch", "--profile")
    done = bench(tiny_bundle, *arguments, "--json", files[0], "--html", files[1])
    assert done.returncode == 0, done.stderr
    return done.stdout, Report.model_validate_json(files[0].read_text()), files[1].read_text()


@pytest.mark.slow
def test_a_real_run(measured):
    out, report, html = measured
    ours, torch = report.variants
    assert (ours.name, torch.name) == ("ort-cpu", "baseline torch")
    assert report.settings.order == ["ort-cpu", "baseline torch"] * 2
    for row in (ours, torch):
        assert row.status == "ok"
        assert (row.steps, row.step.count) == (3, 6)  # strength 0.99 drops the first of four steps
        assert row.stage_seconds["encode"].median > 0
        assert set(row.load_seconds) == {"vae_encoder", "unet", "vae_decoder"}
        assert row.cold_seconds.keys() >= {"encode", "step", "decode"}
        assert 5e7 < row.peak_memory < 4e9
        assert row.total_seconds.median > row.stage_seconds["step"].median
        assert 0 < row.cost["step"].share_of_rate < 1
        assert len(set(row.output_sha256)) == 1
    # The same network and weights: rounding may move a value across a border of uint8, no more.
    assert torch.difference_to_first <= 1
    assert {"threads": "1"}.items() <= ours.described.items()
    assert [(r.above, r.below) for r in report.ratios] == [("baseline torch", "ort-cpu")] * 2
    assert len(report.ratios[0].rounds) == 2
    assert "baseline torch over ort-cpu, step:" in out
    assert "baseline torch over ort-cpu, step:" in html


@pytest.mark.slow
def test_a_real_profile(measured):
    _, report, _ = measured
    profiles = {profile.graph: profile for profile in report.variants[0].profile}
    assert set(profiles) == {"vae_encoder", "unet", "vae_decoder"}
    parts = {share.name for share in profiles["unet"].by_part}
    assert {"Local-λ", "Interactive-λ", "FFN", "residual blocks", "resampling", "norms", "in/out"} <= parts
    for profile in profiles.values():
        assert not {"unnamed", "other"} & {share.name for share in profile.by_part}
        assert sum(share.share for share in profile.by_part) == pytest.approx(1)
        assert [share.name for share in profile.by_provider] == ["CPUExecutionProvider"]
    assert report.variants[1].profile == []
    assert any("runtime 'torch' has none" in note for note in report.notes)


@pytest.mark.slow
def test_what_ran_is_in_the_report(measured):
    _, report, _ = measured
    assert {"cores", "python", "numpy", "onnxruntime", "architecture"} <= report.machine.keys()
    assert "onnxruntime" in report.installed
    bundle = report.variants[0].bundle
    assert len(bundle.manifest_sha256) == 64
    assert bundle.sha256.keys() == bundle.files.keys()
    assert {rate.runtime for rate in report.rates} == {"ort-cpu", "torch"}
    assert any("random test weights" in note for note in report.notes)


def test_a_variant_that_fails_is_exit_code_1_and_reported(tiny_copy):
    graph = tiny_copy / "unet" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    done = bench(tiny_copy, "--rounds", 1)
    assert done.returncode == 1
    assert "failed:" in done.stdout
    assert "SHA-256" in done.stdout


def test_run_is_taken_for_granted():
    runner = CliRunner()
    assert "latency" in runner.invoke(cli.app, ["run", "--help"]).output
    help_text = runner.invoke(cli.app, ["--help"]).output
    for name in ("run", "efficiency", "layers", "quality", "masks"):
        assert name in help_text
    # An option first, then a bundle: still the measurement.
    assert "no-such-bundle" in str(runner.invoke(cli.app, ["--rounds", "1", "no-such-bundle"]).exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{bundle}", "--threads", "two"], "--threads two: expected numbers from 1 on"),
        (["{bundle}", "--baseline", "tensorflow"], "expected torch, plain, or both"),
        (["{bundle}", "--baseline", "plain"], "is itself an unfused bundle"),
        (["{bundle}", "--mode", "fast,quick"], "--mode quick: expected some of reference, best"),
        (["{bundle}", "--mask", "m.png"], "--mask without --image"),
        (["{bundle}", "--json", "{tmp}/missing/r.json"], "its folder does not exist"),
        (["{bundle}", "--steps", "4,4"], "names one value twice"),
        (["{tmp}"], "expected a bundle folder"),
        (["masks", "--out", "{tmp}/m", "--kind", "round"], "expected one of mat-large"),
        (["quality", "--real", "{tmp}", "--fake", "{tmp}"], "holds no picture"),
        (["layers", "--preset", "tiny", "--batch", "1"], "wrong gradients at batch 1"),
        (["layers", "--preset", "huge"], "choose one of full, small, tiny"),
        (["layers", "--preset", "tiny", "--json", "{tmp}/missing/l.json"], "its folder does not exist"),
    ],
)
def test_refusals(arguments, words, tiny_bundle, tmp_path):
    filled = [a.format(bundle=tiny_bundle, tmp=tmp_path) for a in arguments]
    assert words in error_of(bench(*filled))


def test_an_unknown_runtime_is_a_failed_variant(tiny_bundle):
    done = bench(tiny_bundle, "--runtime", "warp-drive", "--rounds", 1)
    assert done.returncode == 1
    assert "failed: " in done.stdout
    assert "warp-drive" in done.stdout


@pytest.mark.slow
def test_efficiency_counts_the_released_network(tmp_path):
    """226 M parameters and 153.7 GFLOPs (convolutions, one sample), as the paper says, counted on the meta device."""
    pytest.importorskip("torch")
    done = bench("efficiency", "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    ours, *quoted = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert ours["parameters"] == 226_041_531
    assert ours["gflops"] == pytest.approx(153.698308096, abs=1e-9)
    assert (ours["quoted"], ours["ms_per_step"]) == (False, None)
    assert all(row["quoted"] for row in quoted)
    assert {
        row["name"]: (row["parameters"], row["gflops"], row["ms_per_step"], row["steps"], row["total_seconds"])
        for row in quoted
    } == {
        "Moebius (paper)": (0.226e9, 154.0, 26.01, 20, 0.52),
        "PixelHacker": (0.862e9, 338.0, 46.89, 20, 0.94),
        "SD3.5 Large-Inpainting": (8.057e9, 8657.0, 151.02, 28, 4.23),
        "FLUX.1-Fill-Dev": (11.902e9, 9927.0, 161.01, 50, 8.05),
    }
    line = next(line for line in done.stdout.splitlines() if "our own" in line)
    assert "226 M" in line
    assert "153.7" in line
    assert "quoted from the paper, measured there on one L40S" in " ".join(done.stdout.split())


def test_efficiency_of_a_bundle_is_measured(tiny_bundle, tmp_path):
    done = bench("efficiency", tiny_bundle, "--rounds", 1, "--threads", 1, "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "e.json").read_text())["rows"][0]
    assert ours["parameters"] == 120_215
    assert ours["ms_per_step"] > 0
    assert ours["total_seconds"] == pytest.approx(20 * ours["ms_per_step"] / 1000)
    assert ours["gflops"] == pytest.approx(0.009957632)  # torch's own counter gives the same for this preset
    assert "unfused graph" in ours["source"]


@pytest.mark.slow
def test_a_rewritten_bundle_s_gflops_are_those_of_the_network_as_written(tiny_copy, tmp_path):
    """Its own convolutions would not do: rewrites turn most of them into other products."""
    from moebius_runtime.bundle.manifest import Rewrite, read_manifest, write_manifest

    rewritten = read_manifest(tiny_copy).model_copy(update={"rewrites": [Rewrite(graph="unet", name="r", count=1)]})
    write_manifest(rewritten, tiny_copy)
    done = bench("efficiency", tiny_copy, "--rounds", 1, "--threads", 1, "--json", tmp_path / "e.json")
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "e.json").read_text())["rows"][0]
    assert ours["gflops"] == pytest.approx(0.009957632)
    assert "rewritten graph, 0.01039 GMAC a sample in all" in ours["source"]


def test_masks_and_quality_together(tmp_path):
    """Masks, then a folder of pictures that differ inside them alone."""
    import numpy as np
    from PIL import Image

    done = bench("masks", "--out", tmp_path / "mask", "--count", 3, "--size", 64, "--kind", "lama-medium")
    assert done.returncode == 0, done.stderr
    assert "3 masks of set lama-medium, 64x64, seed 0" in done.stdout
    rng = np.random.default_rng(0)
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
    for file in (tmp_path / "mask").iterdir():
        hole = np.asarray(Image.open(file)) > 0
        pixels = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "real" / file.name)
        pixels = pixels.copy()
        pixels[hole] ^= 8
        Image.fromarray(pixels).save(tmp_path / "fake" / file.name)
    folders = [part for name in ("real", "fake", "mask") for part in (f"--{name}", tmp_path / name)]
    done = bench("quality", *folders, "--json", tmp_path / "q.json")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "q.json").read_text())
    assert found["psnr_in_mask"] == pytest.approx(10 * np.log10(255**2 / 64))  # every value there is off by 8
    assert found["psnr"] > found["psnr_in_mask"]
    assert "FID: not computed" in done.stdout
