"""`moebius-export web` and `moebius-serve --site`, without a browser."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import urllib.request

import numpy as np
import onnx
import pytest

from moebius_export.errors import ExportError
from moebius_export.web import onnxruntime_web
from moebius_export.web.shards import refer_to, stored, volumes_of, write_shards
from moebius_export.web.site import export_site
from moebius_runtime import Bundle
from moebius_runtime.errors import InputError


def model_of(*ranges: tuple[int, int]) -> onnx.ModelProto:
    """A model whose tensors lie at (offset, length) of a weights file."""
    model = onnx.ModelProto()
    for index, (start, length) in enumerate(ranges):
        tensor = model.graph.initializer.add(name=f"t{index}", data_location=onnx.TensorProto.EXTERNAL)
        for key, value in (("location", "w"), ("offset", str(start)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
    return model


def test_no_tensor_is_cut_by_a_volume_and_shared_ones_are_stored_once():
    first, second = model_of((0, 60), (64, 30), (200, 500)), model_of((0, 60), (70, 10), (800, 50))
    volumes = volumes_of([first, second], "w", 100)
    assert [(one.start, one.end) for one in volumes] == [(0, 94), (200, 700), (800, 850)]
    assert [one.name for one in refer_to(second, volumes)] == ["w-0.bin", "w-2.bin"]
    assert [(start, length) for _, start, length in stored(second)] == [(0, 60), (70, 10), (0, 50)]


def test_content_is_cut_into_shards_of_the_limit(tmp_path):
    shards = write_shards([b"a" * 70, b"b" * 80], tmp_path, 50)
    assert [shard.size for shard in shards] == [50, 50, 50]
    assert b"".join((tmp_path / shard.name).read_bytes() for shard in shards) == b"a" * 70 + b"b" * 80


def test_a_site_holds_the_graphs_and_all_hashes_hold(fused_bundle, fake_runtime, put_together, tmp_path):
    """Put together again from its shards, the U-Net gives what the bundle's gives (its own budget is 3e-5)."""
    site = export_site(fused_bundle, tmp_path / "site", onnxruntime_web=fake_runtime, shard_bytes=200_000)
    assert json.loads((tmp_path / "site/site.json").read_text()) == json.loads(json.dumps(site))
    for path in (tmp_path / "site/shards").iterdir():
        assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
        assert path.stat().st_size <= 200_000
    from moebius_export.onnx_export.parity import run_file
    from moebius_export.trajectories.scenes import seeded_inputs

    inputs = seeded_inputs("unet", Bundle.open(fused_bundle).manifest, 4)
    got = run_file(put_together(tmp_path / "site", "unet"), inputs)
    expected = run_file(Bundle.open(fused_bundle).model_file("unet"), inputs)
    assert np.linalg.norm(got - expected) < 3e-5 * np.linalg.norm(expected)
    for name in site["graphs"]:
        file = tmp_path / "back/unet/model.onnx"
        model = onnx.load(file if name == "unet" else put_together(tmp_path / "site", name))
        assert not model.functions
        assert {entry.domain for entry in model.opset_import} == {""}
    page = (tmp_path / "site/index.html").read_text()
    assert 'content="site"' in page
    assert "wasm-unsafe-eval" in page
    assert not (tmp_path / "site/page/docs.html").exists()
    listed = json.loads((tmp_path / "site/offline.js").read_text().split("self.SITE = ")[1].split(";\n")[0])
    assert {"index.html", "site.json", "page/js/main.js", "ort/ort.webgpu.min.mjs"} <= set(listed["files"])
    for name, digest in listed["files"].items():
        assert hashlib.sha256((tmp_path / "site" / name).read_bytes()).hexdigest() == digest
    with pytest.raises(ExportError, match="is not a site"):
        export_site(fused_bundle, tmp_path / "back", onnxruntime_web=fake_runtime)


def test_another_version_of_onnxruntime_web_is_refused(fused_bundle, fake_runtime, tmp_path):
    (fake_runtime / "ort.webgpu.min.mjs").write_bytes(b"another")
    with pytest.raises(InputError, match="is not the file of onnxruntime-web"):
        export_site(fused_bundle, tmp_path / "site", onnxruntime_web=fake_runtime)
    with pytest.raises(InputError, match="No such file"):
        onnxruntime_web.runtime_files(tmp_path)
    assert not (tmp_path / "site").exists()


def test_the_registry_is_npms_own_variable_and_the_package_is_checked(fake_runtime, tmp_path, monkeypatch):
    """The pinned hash decides; a package that passes is kept, so that the next export needs no network."""
    import base64

    buffer, asked = io.BytesIO(), []
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for path in fake_runtime.iterdir():
            archive.add(path, f"package/dist/{path.name}")
    package = buffer.getvalue()

    def urlopen(address, timeout):
        asked.append(address)
        return io.BytesIO(package)

    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("npm_config_registry", "https://registry.example/npm/")
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(ExportError, match="SHA-512 differs"):
        onnxruntime_web.runtime_files()
    digest = base64.b64encode(hashlib.sha512(package).digest()).decode()
    monkeypatch.setattr(onnxruntime_web, "INTEGRITY", f"sha512-{digest}")
    files = onnxruntime_web.runtime_files()
    assert files == {name: name.encode() for name in onnxruntime_web.FILES}
    assert onnxruntime_web.runtime_files() == files
    address = f"https://registry.example/npm/onnxruntime-web/-/onnxruntime-web-{onnxruntime_web.VERSION}.tgz"
    assert asked == [address] * 2
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "empty"))
    with pytest.raises(InputError, match="expected an address"):
        onnxruntime_web.runtime_files()


def test_a_site_is_served_with_its_headers_types_and_ranges(tmp_path):
    pytest.importorskip("httpx")
    from starlette.testclient import TestClient

    from moebius_serve.guard import Access
    from moebius_serve.limits import Limits
    from moebius_serve.site import create_site

    with pytest.raises(InputError, match=r"site\.json: No such file"):
        create_site(tmp_path, Access(), Limits())
    (tmp_path / "site.json").write_text('{"schema_version": 2}')
    with pytest.raises(InputError, match="no site of this version"):
        create_site(tmp_path, Access(), Limits())
    (tmp_path / "site.json").write_text('{"schema_version": 1}')
    (tmp_path / "index.html").write_text("page")
    for name in ("shards/a.bin", "ort/a.mjs", "ort/a.wasm"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"0123456789")
    client = TestClient(create_site(tmp_path, Access(), Limits()), base_url="http://localhost")
    answer = client.get("/")
    assert answer.text == "page"
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert answer.headers["cross-origin-embedder-policy"] == "require-corp"
    assert "wasm-unsafe-eval" in answer.headers["content-security-policy"]
    assert client.get("/ort/a.mjs").headers["content-type"].startswith("text/javascript")
    assert client.get("/ort/a.wasm").headers["content-type"] == "application/wasm"
    part = client.get("/shards/a.bin", headers={"range": "bytes=4-"})
    assert (part.status_code, part.content) == (206, b"456789")
    assert "immutable" in part.headers["cache-control"]
    assert client.get("/../conftest.py").status_code == 404
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421
