"""One pipeline in several threads, and in another process."""

from __future__ import annotations

import copy
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from moebius_runtime.backends.base import Backend
from moebius_runtime.backends.ort import OrtBackend
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.images.pictures import Picture
from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline


def picture(seed: int) -> Picture:
    return Picture(np.random.RandomState(seed).randint(0, 256, (128, 128, 3)).astype(np.uint8), "RGB")


def area() -> np.ndarray:
    mask = np.zeros((128, 128), bool)
    mask[40:80, 48:80] = True
    return mask


@pytest.mark.parametrize("memory", ["low", "fast"])
def test_threads_share_a_pipeline(toy_bundle, memory):
    """Every thread gets its own picture and the seconds of its own stages; no two graphs are loaded at a time."""
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path, threads=1, memory=memory)
    alone = [pipeline.inpaint(picture(seed), area(), InpaintOptions(steps=5)) for seed in range(4)]
    most, real = [], pipeline.backend.run

    def run(graph, inputs):
        output = real(graph, inputs)
        most.append(len(pipeline.backend._loaded))
        return output

    pipeline.backend.run = run
    together = threading.Barrier(4)

    def fill(seed):
        together.wait()
        return [pipeline.inpaint(picture(seed), area(), InpaintOptions(steps=5)) for _ in range(3)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(fill, range(4)))
    for expected, results in zip(alone, found, strict=True):
        for result in results:
            assert np.array_equal(result.picture.pixels, expected.picture.pixels)
            counts = {stage: len(times) for stage, times in result.seconds.items()}
            loads = counts.pop("load", 0)
            assert counts == {"preprocess": 1, "encode": 1, "step": 5, "decode": 1, "paste": 1}
            assert loads == (3 if memory == "low" else 0)
    assert max(most) == (1 if memory == "low" else 3)


def test_a_call_inside_a_call_keeps_its_own_seconds(toy_bundle):
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path, threads=1)
    inner = []

    def once(done, _all):
        if done == 2:
            inner.append(pipeline.inpaint(picture(1), area(), InpaintOptions(steps=3)))

    outer = pipeline.inpaint(picture(0), area(), InpaintOptions(steps=5), once)
    assert len(inner[0].seconds["step"]) == 3
    assert len(outer.seconds["step"]) == 5
    expected = pipeline.inpaint(picture(0), area(), InpaintOptions(steps=5))
    assert np.array_equal(outer.picture.pixels, expected.picture.pixels)


def test_a_pipeline_goes_to_another_process(toy_bundle, monkeypatch):
    """It opens the bundle again there: also from a relative path, with its threads, precision and memory."""
    monkeypatch.chdir(toy_bundle.path.parent)
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path.name, threads=2, memory="fast", precision="fp32")
    image, mask = Image.fromarray(picture(0).pixels), Image.fromarray(area())
    expected = np.asarray(pipeline(image, mask, steps=3))  # the sessions of loaded graphs do not travel
    monkeypatch.chdir("/")
    again = copy.deepcopy(pipeline)
    assert (again.memory, again.backend.threads, again.backend.precision("unet")) == ("fast", 2, "fp32")
    assert not again.backend.is_loaded("unet")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert np.array_equal(np.asarray(pool.apply(pipeline, (image, mask), {"steps": 3})), expected)


def test_a_backend_that_cannot_travel(toy_bundle):
    class Foreign(OrtBackend):
        name = "foreign"
        arguments = Backend.arguments

    pipeline = InpaintPipeline(Foreign(Bundle.open(toy_bundle.path), threads=1))
    with pytest.raises(TypeError, match=r"'foreign' cannot be pickled.*from_bundle"):
        copy.deepcopy(pipeline)
