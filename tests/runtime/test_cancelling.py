"""Work that its caller stops: within one step, with the memory given back, and the pipeline usable afterwards."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from moebius_runtime import CancelledError, InpaintOptions, InpaintPipeline, MoebiusError, Picture
from moebius_runtime.sampling.samplers import SAMPLERS


def picture() -> Picture:
    return Picture(np.random.RandomState(0).randint(0, 256, (128, 128, 3)).astype(np.uint8), "RGB")


def area() -> np.ndarray:
    mask = np.zeros((128, 128), bool)
    mask[40:80, 48:80] = True
    return mask


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_sampler_stops_before_the_next_step(toy_bundle, name, after):
    schedule = InpaintPipeline.from_bundle(toy_bundle.path, threads=1).schedule
    evaluated = []

    def denoise(latents, timestep):
        evaluated.append(timestep)
        return 0.1 * latents

    latents = np.ones((1, 4, 16, 16), np.float32)
    with pytest.raises(CancelledError, match="cancelled"):
        SAMPLERS[name](
            denoise, latents, schedule, np.array([800, 600, 400, 200]), None, lambda: len(evaluated) == after
        )
    assert len(evaluated) == after


@pytest.mark.parametrize("memory", ["low", "fast"])
@pytest.mark.parametrize("runs", range(6))  # two encodes, three steps of four, the decoder: 0 runs before the first
def test_inpaint_stops_before_the_next_run_of_a_graph(toy_bundle, memory, runs):
    """Whatever runs at the time: encoder, U-Net or decoder. The same pipeline then gives the same pixels as before."""
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path, threads=1, memory=memory)
    options = InpaintOptions(steps=4, strength=1.0)
    expected = pipeline.inpaint(picture(), area(), options).picture.pixels
    loaded = set(pipeline.backend._loaded)
    ran, real = [], pipeline.backend.run

    def run(graph, inputs):
        ran.append(graph)
        return real(graph, inputs)

    pipeline.backend.run = run
    with pytest.raises(CancelledError) as caught:
        pipeline.inpaint(picture(), area(), options, cancelled=lambda: len(ran) >= runs)
    assert isinstance(caught.value, MoebiusError)
    assert len(ran) == runs
    assert set(pipeline.backend._loaded) == loaded  # memory "low" holds nothing, "fast" what it held
    again = pipeline.inpaint(picture(), area(), options, cancelled=lambda: False)
    assert np.array_equal(again.picture.pixels, expected)


def test_a_cancelled_call_keeps_no_picture(toy_bundle):
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path, threads=1)
    given = picture()
    gone = weakref.ref(given)
    steps = []
    with pytest.raises(CancelledError):
        pipeline.inpaint(
            given, area(), InpaintOptions(steps=4), lambda *now: steps.append(now), cancelled=lambda: bool(steps)
        )
    assert [done for done, _ in steps] == [1]
    del given
    gc.collect()
    assert gone() is None


def test_a_call_inside_a_call_has_its_own_check(toy_bundle):
    """An `on_step` that fills another picture does not cancel it, nor lose its own check."""
    pipeline = InpaintPipeline.from_bundle(toy_bundle.path, threads=1, memory="fast")
    inner = []

    def on_step(done, total):
        inner.append(pipeline.inpaint(picture(), area(), InpaintOptions(steps=2)))

    with pytest.raises(CancelledError):
        pipeline.inpaint(picture(), area(), InpaintOptions(steps=4), on_step, cancelled=lambda: bool(inner))
    assert len(inner) == 1
