"""`moebius-bench browser`: two sites in Chromium, in turn."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moebius_bench.cli import app

pytest.importorskip("playwright.sync_api", reason="pip install playwright")


def run(*arguments: object):
    return CliRunner().invoke(app, ["browser", *map(str, arguments)])


@pytest.mark.xdist_group("site")
def test_the_graphs_run_in_turn_and_agree_with_pytorch(site, fp16_site, tmp_path):
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        pytest.skip("needs Chromium: apt install chromium")
    out = tmp_path / "times.json"
    result = run(site, fp16_site[0], "--rounds", 2, "--threads", 1, "--json", out)
    assert result.exit_code == 0, (result.stderr, result.exception)
    times = json.loads(out.read_text())
    assert times["graph"] == "unet"
    assert times["provider"] == "wasm"
    assert times["browser"].startswith("Chromium ")
    full, half = times["sites"]
    assert (full["precision"], half["precision"]) == ("fp32", "fp16")
    for one in (full, half):
        assert one["threads"] == 1
        assert one["run_seconds"]["count"] == 2
        assert 0 < one["run_seconds"]["min"] <= one["run_seconds"]["max"]
        assert one["peak_bytes"] > 50e6
    assert full["error"] < 3e-4 < half["error"] < 3e-2
    described = json.loads((site / "site.json").read_text())["graphs"]["unet"]
    sizes = [shard["size"] for shards in (described["model"], *described["data"].values()) for shard in shards]
    assert (full["bytes"], full["largest_file"], full["nodes"]) == (sum(sizes), max(sizes), described["nodes"])
    assert times["ratios"][0] == 1
    assert times["ratios"][1] == full["run_seconds"]["median"] / half["run_seconds"]["median"]


def test_a_folder_that_is_no_site_and_a_graph_that_it_lacks(site, tmp_path):
    for arguments, words in (
        ([tmp_path], "expected the folder of `moebius-export web BUNDLE --out SITE`"),
        ([site, "--graph", "unet_lower"], "has no graph unet_lower; it has unet"),
        ([site, "--provider", "webgl"], "--provider webgl: expected wasm or webgpu"),
        ([site, "--chromium", Path("/no/chromium")], "the browser failed"),
    ):
        result = run(*arguments)
        assert words in " ".join(str(result.exception).split())


@pytest.mark.slow
def test_the_graph_form_of_the_public_port_gives_pytorchs_output(site, tmp_path):
    """scripts/port_form_site.py, which our figures beside the port's come from."""
    script = Path(__file__).parents[2] / "scripts/port_form_site.py"
    subprocess.run([sys.executable, script, site, tmp_path / "port", "--preset", "tiny"], check=True)
    out = tmp_path / "times.json"
    result = run(tmp_path / "port", site, "--rounds", 1, "--json", out)
    assert result.exit_code == 0, (result.stderr, result.exception)
    port, ours = json.loads(out.read_text())["sites"]
    assert port["error"] < 3e-4
    assert port["nodes"] > 1.5 * ours["nodes"]
