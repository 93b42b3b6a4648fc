"""Engines from the builder's command to a picture: what `moebius-export trt` writes is what the runtime takes."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.hardware import devices
from moebius_runtime.pipeline import InpaintPipeline

pytest.importorskip("moebius_export.commands.trt", reason="there is no builder's command")

_spec = importlib.util.spec_from_file_location("gpu", Path(__file__).parents[1] / "runtime" / "gpu.py")
gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(_spec))
if not hasattr(gpu, "Machine"):
    _spec.loader.exec_module(gpu)
builder = gpu.load_fake("fake_tensorrt")


@pytest.mark.parametrize("more", [[], ["--strip-weights"]])
@pytest.mark.parametrize(("version", "rtx"), [("10.3.0", False), ("11.4.1", False), ("1.7.1", True)])
def test_what_is_built_is_run(monkeypatch, tmp_path, fused_bundle, version, rtx, more):
    from moebius_export.commands import app as cli

    bundle = Path(shutil.copytree(fused_bundle, tmp_path / "bundle"))
    module = builder.make_module(version, rtx)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(devices, "current_device", lambda: gpu.DEVICE)
    backend = "tensorrt-rtx" if rtx else "tensorrt"
    monkeypatch.setattr(sys, "argv", ["moebius-export", "trt", str(bundle), "--fp32", "--backend", backend, *more])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    assert not leaving.value.code
    gpu.make_machine(monkeypatch, tmp_path / "cache", version, rtx)
    image, mask = Image.linear_gradient("L").resize((128, 128)).convert("RGB"), Image.new("L", (128, 128))
    mask.paste(255, (40, 40, 80, 80))
    built = InpaintPipeline.from_bundle(bundle, backend)
    assert built.backend.describe()["precision"] == "fp32"
    expected = np.asarray(InpaintPipeline.from_bundle(bundle, threads=1)(image, mask, steps=3), np.int16)
    # ort-cpu may run functions with compiled kernels, the fake runs their bodies: a level at most
    assert np.abs(np.asarray(built(image, mask, steps=3), np.int16) - expected).max() <= 1
