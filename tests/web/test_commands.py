"""`moebius-export web` and `moebius-serve --site` as processes, as a person starts them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import onnx
import pytest

from moebius_export.onnx_export.parity import run_file
from moebius_export.trajectories.scenes import seeded_inputs
from moebius_runtime import Bundle

pytest.importorskip("uvicorn", reason="pip install 'moebius-edge[serve]'")
pytestmark = pytest.mark.xdist_group("site")
FP16_ERROR = 3e-2  # of a step by a plan of the fixed rules: `moebius_export.precision.quick.STEP_ERROR`


def test_a_site_is_exported_and_served(fused_bundle, onnxruntime_web, export_command, tmp_path):
    """Every file of the site comes over HTTP as it was written; SIGTERM ends the server with exit code 0."""
    done = export_command("web", fused_bundle, "--out", tmp_path / "site", "--onnxruntime-web", onnxruntime_web)
    assert done.returncode == 0, done.stderr
    assert f"moebius-serve --site {tmp_path / 'site'}" in done.stdout
    started = [sys.executable, "-m", "moebius_serve.cli", "--site", str(tmp_path / "site"), "--port", "0"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "COLUMNS": "300"}
    server = subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        url = re.search(r"http://localhost:\d+/", server.stdout.readline()).group()
        files = [path for path in (tmp_path / "site").rglob("*") if path.is_file()]
        assert len(files) > 40
        for path in files:
            with urllib.request.urlopen(url + path.relative_to(tmp_path / "site").as_posix()) as answer:
                assert answer.read() == path.read_bytes()
                assert answer.headers["cross-origin-embedder-policy"] == "require-corp"
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert server.stderr.read() == ""
    finally:
        server.kill()
        server.stdout.close()
        server.stderr.close()


def test_a_site_of_fp16(fused_bundle, fp16_site, put_together):
    """Weights and activations are fp16, every graph has its file, and the notes name the folder that was given."""
    folder, notes = fp16_site
    assert f"`moebius-export precision {fused_bundle} " in notes  # and no folder that is gone by now
    site = json.loads((folder / "site.json").read_text())
    assert (site["precision"], site["tolerance"]) == ("fp16", 3e-2)
    manifest = Bundle.open(fused_bundle).manifest
    assert set(manifest.graphs) <= set(site["graphs"])
    assert not any("fp16" in graph.files for graph in manifest.graphs.values())  # the bundle was left as it is
    for path in (folder / "shards").iterdir():
        assert path.stem == hashlib.sha256(path.read_bytes()).hexdigest()
    types = onnx.TensorProto
    unet = put_together(folder, "unet")
    for file in (unet, put_together(folder, "vae_decoder")):
        model = onnx.load(file)
        assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx"}
        stored = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 4]
        half = sum(tensor.data_type == types.FLOAT16 for tensor in stored)
        assert half > 0.9 * len(stored) > 0
    inputs = seeded_inputs("unet", manifest, 4)
    got = run_file(unet, inputs)
    expected = run_file(Bundle.open(fused_bundle).model_file("unet"), inputs)
    assert 1e-6 < np.linalg.norm(got - expected) / np.linalg.norm(expected) < FP16_ERROR


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{bundle}", "--out", "{folder}"], "is not a site; name a new folder"),
        (["{folder}", "--out", "{folder}/site"], "expected a bundle folder"),
        (["{bundle}", "--out", "{folder}/site", "--onnxruntime-web", "{folder}"], "npm install onnxruntime-web@"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(arguments, words, fused_bundle, tmp_path, monkeypatch, capsys):
    from moebius_export.commands import app

    folder = tmp_path / "folder"
    folder.mkdir()
    given = [one.format(bundle=fused_bundle, folder=folder) for one in arguments]
    monkeypatch.setattr(sys, "argv", ["moebius-export", "web", *given])
    with pytest.raises(SystemExit) as leaving:
        app.main()
    captured = capsys.readouterr()
    assert (leaving.value.code, captured.out) == (2, "")
    assert words in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert list(folder.iterdir()) == []
