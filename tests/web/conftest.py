"""A site of the tiny bundle. onnxruntime-web comes from the dev dependencies of tests/page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

ONNXRUNTIME_WEB = Path(__file__).parents[1] / "page/node_modules/onnxruntime-web"


@pytest.fixture
def fake_runtime(tmp_path, monkeypatch) -> Path:
    """A folder in place of onnxruntime-web, for tests that run no graph."""
    import hashlib

    from moebius_export.web import onnxruntime_web

    folder = tmp_path / "onnxruntime-web"
    folder.mkdir()
    hashes = {}
    for name in onnxruntime_web.FILES:
        (folder / name).write_bytes(name.encode())
        hashes[name] = hashlib.sha256(name.encode()).hexdigest()
    monkeypatch.setattr(onnxruntime_web, "FILES", hashes)
    return folder


@pytest.fixture
def put_together(tmp_path) -> Callable[[Path, str], Path]:
    """put_together(site, graph): the path of the graph's ONNX file, with its weights, made of the site's shards."""

    def make(site: Path, graph: str) -> Path:
        described = json.loads((site / "site.json").read_text())["graphs"][graph]
        folder = tmp_path / "back" / graph
        folder.mkdir(parents=True)
        for name, shards in {"model.onnx": described["model"], **described["data"]}.items():
            (folder / name).write_bytes(
                b"".join((site / f"shards/{shard['sha256']}.bin").read_bytes() for shard in shards)
            )
        return folder / "model.onnx"

    return make


@pytest.fixture(scope="session")
def onnxruntime_web() -> Path:
    """The folder of the npm package."""
    if not ONNXRUNTIME_WEB.is_dir():
        pytest.skip("tests of sites need onnxruntime-web: npm install --prefix tests/page")
    return ONNXRUNTIME_WEB


@pytest.fixture(scope="session")
def site(shared_folder, fused_bundle, onnxruntime_web) -> Path:
    """The tiny bundle as a site, with shards of 200 kB. Read only."""
    from moebius_export.web.site import export_site

    out = shared_folder / "site"
    if not out.exists():
        export_site(fused_bundle, out, onnxruntime_web=onnxruntime_web, shard_bytes=200_000)
    return out
