"""A site of the tiny bundle. onnxruntime-web comes from the dev dependencies of tests/page."""

from __future__ import annotations

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


@pytest.fixture(scope="session")
def site(shared_folder, fused_bundle) -> Path:
    """The tiny bundle as a site, with shards of 200 kB. Read only."""
    if not ONNXRUNTIME_WEB.is_dir():
        pytest.skip("tests of the site in a browser need onnxruntime-web: npm install --prefix tests/page")
    from moebius_export.web.site import export_site

    out = shared_folder / "site"
    if not out.exists():
        export_site(fused_bundle, out, onnxruntime_web=ONNXRUNTIME_WEB, shard_bytes=200_000)
    return out
