"""What one worker process does, in this process where that is enough."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moebius_bench.measure.measuring import drawn_picture, make_backend, measure, peak_memory, picture_and_mask
from moebius_bench.measure.worker_job import Job
from moebius_runtime.errors import BundleError, EngineError, InputError, OutputError
from moebius_runtime.pipeline import InpaintPipeline
from moebius_runtime.settings.modes import MODES


def job(bundle, **parts):
    return Job(**({"kind": "measure", "runtime": "ort-cpu", "bundle": str(bundle), "threads": 1, "steps": 3} | parts))


def test_a_measurement(tiny_bundle, tmp_path):
    found = measure(job(tiny_bundle, repeats=2, warmup_steps=2, out=str(tmp_path / "p.npy")), 0.5)
    assert found.import_seconds == 0.5
    assert len(found.pictures) == 2
    assert len(found.cold.stages["step"]) == 2
    for run in found.pictures:
        assert {name: len(values) for name, values in run.stages.items()} == {
            "preprocess": 1,
            "encode": 2,  # the masked picture, and the picture itself, which the noise is laid on
            "step": 2,
            "decode": 1,
            "paste": 1,
        }
        assert sum(map(sum, run.stages.values())) <= run.total
    assert found.pictures[0].began + found.pictures[0].total <= found.pictures[1].began
    pixels = np.load(tmp_path / "p.npy", allow_pickle=False)
    assert (pixels.shape, pixels.dtype) == ((128, 128, 3), np.uint8)
    untouched = drawn_picture(128, 0)
    np.testing.assert_array_equal(pixels[:20], untouched[:20])
    assert (pixels[32:96, 32:96] != untouched[32:96, 32:96]).any()


def test_at_a_scale_of_one_the_conditional_graph_runs(tiny_bundle):
    found = measure(job(tiny_bundle, guidance_scale=1.0), 0.0)
    assert set(found.load_seconds) == {"vae_encoder", "unet_conditional", "vae_decoder"}


def test_a_picture_of_one_colour_is_not_timed(tiny_bundle, monkeypatch):
    inpaint = InpaintPipeline.inpaint

    def flat(self, picture, mask, options, on_step=None):
        result = inpaint(self, picture, mask, options, on_step)
        result.picture.pixels[mask] = 7
        return result

    monkeypatch.setattr(InpaintPipeline, "inpaint", flat)
    with pytest.raises(OutputError, match="one flat colour"):
        measure(job(tiny_bundle), 0.0)


def test_pictures_that_differ_are_not_timed(tiny_bundle, monkeypatch):
    inpaint = InpaintPipeline.inpaint
    calls = []

    def different(self, picture, mask, options, on_step=None):
        result = inpaint(self, picture, mask, options, on_step)
        calls.append(1)
        result.picture.pixels[0, 0] = len(calls)
        return result

    monkeypatch.setattr(InpaintPipeline, "inpaint", different)
    with pytest.raises(OutputError, match="two pictures of one process differ"):
        measure(job(tiny_bundle, repeats=2), 0.0)


def test_a_given_picture_and_mask(tmp_path):
    pixels = drawn_picture(96, 1)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    hole = np.zeros((96, 96), np.uint8)
    hole[5:9] = 255
    Image.fromarray(hole).save(tmp_path / "m.png")
    given = Job(kind="measure", runtime="ort-cpu", image=str(tmp_path / "a.png"), mask=str(tmp_path / "m.png"))
    picture, mask = picture_and_mask(given, 128)
    np.testing.assert_array_equal(picture.to_rgb(), pixels)
    np.testing.assert_array_equal(mask, hole > 0)
    _, mask = picture_and_mask(given.model_copy(update={"mask": None}), 128)
    assert mask.mean() == 0.25


def test_the_drawn_picture_is_the_seed_s():
    np.testing.assert_array_equal(drawn_picture(64, 3), drawn_picture(64, 3))
    assert (drawn_picture(64, 3) != drawn_picture(64, 4)).mean() > 0.5
    assert drawn_picture(64, 3).std() > 20


def test_a_precision_that_no_runtime_has_is_refused(tiny_bundle):
    with pytest.raises(BundleError, match=r"has no fp16 file.*--precision fp16"):
        make_backend(job(tiny_bundle, precision="fp16"))


def test_peak_memory_is_this_process_s():
    before = peak_memory()
    block = np.ones(60_000_000)  # 480 MB
    assert peak_memory() - before > 200_000_000 or before > 480_000_000
    del block
    assert peak_memory() >= before


def test_a_small_process_s_peak_is_not_its_parent_s():
    """getrusage's figure would be: this process, with 480 MB held, starts one of a few."""
    block = np.ones(60_000_000)
    script = "from moebius_bench.measure.measuring import peak_memory; print(peak_memory())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < block.nbytes


def test_nothing_but_the_answer_is_on_standard_output(tiny_bundle):
    """Also what a library writes there with C's own functions."""
    script = (
        "import os, sys, moebius_bench.measure.worker as w\n"
        "own = w.own_stdout\n"
        "def noisy():\n"
        "    answer = own(); os.write(1, b'noise'); print('noise', flush=True); return answer\n"
        "w.own_stdout = noisy\n"
        "sys.exit(w.main())\n"
    )
    text = Job(kind="measure", runtime="warp", bundle=str(tiny_bundle)).model_dump_json()
    done = subprocess.run([sys.executable, "-c", script], input=text, capture_output=True, text=True, check=False)
    assert json.loads(done.stdout)["ok"] is False
    assert "noise" in done.stderr


def test_the_torch_baseline_refuses_other_weights(tiny_copy):
    pytest.importorskip("torch")
    with pytest.raises(InputError, match=r"stand-in:5 holds other unet weights than the bundle was exported from"):
        measure(job(tiny_copy, runtime="torch", baseline=True, weights="stand-in:5"), 0.0)


def test_without_torch_the_baseline_says_what_to_install(tiny_bundle, monkeypatch):
    from moebius_export.network import torch_runtime
    from moebius_runtime.errors import RuntimeUnavailableError

    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(RuntimeUnavailableError, match=r"needs PyTorch.*moebius-edge\[export\]"):
        torch_runtime.import_torch()


def test_measuring_imports_no_torch(tiny_bundle):
    """What runs on a device: a measurement without torch, onnx or the other packages of this project."""
    script = (
        "import sys\n"
        "from moebius_bench.measure.worker_job import Job\n"
        "from moebius_bench.measure.measuring import import_runtime, measure\n"
        "from moebius_bench import cli, running, text_report, html_report, machine\n"
        "import_runtime('ort-cpu')\n"
        "measure(Job.model_validate_json(sys.argv[1]), 0.0)\n"
        "print([m for m in ('torch', 'onnx', 'moebius', 'moebius_export', 'diffusers') if m in sys.modules])\n"
    )
    text = job(tiny_bundle).model_dump_json()
    done = subprocess.run([sys.executable, "-c", script, text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_runtime_on_a_gpu_is_measured(tiny_copy, tmp_path, monkeypatch):
    """Engines on a fake GPU, through the same door as every runtime."""
    path = Path(__file__).parents[1] / "runtime" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu", path)
    gpu = sys.modules.setdefault("gpu", importlib.util.module_from_spec(spec))
    if not hasattr(gpu, "Machine"):
        spec.loader.exec_module(gpu)
    machine = gpu.make_machine(monkeypatch, tmp_path / "cache")
    with pytest.raises(EngineError, match="holds no engines for tensorrt"):
        make_backend(job(tiny_copy, runtime="tensorrt", threads=None))
    machine.build(tiny_copy)
    found = measure(job(tiny_copy, runtime="tensorrt", threads=None), 0.0)
    assert found.described["tensorrt"] == "10.9.0.34"
    assert "unet captured" in found.described["cuda graphs"]
    assert found.output_sha256 == measure(job(tiny_copy), 0.0).output_sha256


def test_a_mode_is_measured_with_the_graphs_that_it_takes(fused_bundle, tmp_path):
    mask = np.zeros((512, 512), np.uint8)
    mask[8:16, 8:16] = 255  # where the decoder's window is a part of the square
    Image.fromarray(mask).save(tmp_path / "mask.png")
    Image.fromarray(drawn_picture(512, 0)).save(tmp_path / "image.png")
    files = {"image": str(tmp_path / "image.png"), "mask": str(tmp_path / "mask.png")}
    result = measure(job(fused_bundle, steps=None, mode="fast", **files), 0.0)
    assert list(result.load_seconds)[:2] == ["vae_encoder", "unet"]
    assert set(result.load_seconds) & {"vae_decoder", "vae_decoder_lower"}
    assert [len(picture.stages["step"]) for picture in result.pictures] == [MODES["fast"].steps]
    assert [len(picture.stages["encode"]) for picture in result.pictures] == [1]
    with pytest.raises(InputError, match="mode 'quick'"):
        measure(job(fused_bundle, mode="quick"), 0.0)
