"""When graphs are loaded and released, and that it changes no pixel."""

from __future__ import annotations

import numpy as np
import pytest

from moebius_runtime.backends.ort import OrtBackend
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import InputError
from moebius_runtime.pictures import Picture
from moebius_runtime.pipeline import InpaintPipeline, make_options
from moebius_runtime.regions import Crop, apart, find_squares, whole_square, window


class Watched(OrtBackend):
    """Notes what is loaded, run and released; several runs in a row count as one."""

    def __init__(self, bundle):
        super().__init__(bundle, threads=1)
        self.calls: list[str] = []

    def _note(self, what):
        if self.calls[-1:] != [what]:
            self.calls.append(what)

    def _load(self, graph):
        self._note(f"load {graph}")
        assert not self._loaded or self.several
        return graph, super()._load(graph)

    def _run(self, handle, inputs):
        self._note(f"run {handle[0]}")
        return super()._run(handle[1], inputs)

    def _unload(self, handle):
        self._note(f"unload {handle[0]}")

    several = False


def turn(graph, loads=True, unloads=True):
    return [f"load {graph}"] * loads + [f"run {graph}"] + [f"unload {graph}"] * unloads


GRAPHS = ("vae_encoder", "unet", "vae_decoder")


def picture(height=128, width=128):
    return Picture(np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8), "RGB")


def holes(height, width, *corners):
    mask = np.zeros((height, width), bool)
    for top, left in corners:
        mask[top : top + 24, left : left + 24] = True
    return mask


@pytest.fixture
def watched(toy_bundle) -> Watched:
    return Watched(Bundle.open(toy_bundle.path))


def test_low_memory_holds_one_graph_at_a_time(watched):
    pipeline = InpaintPipeline(watched)
    for _ in range(2):
        watched.calls.clear()
        pipeline.inpaint(picture(), holes(128, 128, (50, 50)), make_options(steps=3))
        assert watched.calls == [call for graph in GRAPHS for call in turn(graph)]


def test_all_regions_share_one_pass(watched):
    mask = holes(400, 600, (30, 40), (300, 500), (40, 400))
    assert len(find_squares(mask, 128)) == 3
    InpaintPipeline(watched).inpaint(picture(400, 600), mask, make_options(steps=3))
    assert watched.calls == [call for graph in GRAPHS for call in turn(graph)]


def test_fast_keeps_every_graph(watched):
    watched.several = True
    pipeline = InpaintPipeline(watched, memory="fast")
    for first in (True, False):
        watched.calls.clear()
        result = pipeline.inpaint(picture(), holes(128, 128, (50, 50)), make_options(steps=3))
        assert watched.calls == [call for graph in GRAPHS for call in turn(graph, first, False)]
        assert ("load" in result.seconds) == first


@pytest.mark.parametrize("corners", [[(30, 40)], [(30, 40), (300, 500)], [(30, 40), (30, 140)]])
def test_the_picture_is_the_same(toy_bundle, corners):
    """The last two squares overlap outside their regions: the second sees the first's seam."""
    pictures = [
        InpaintPipeline.from_bundle(toy_bundle.path, threads=1, memory=memory)
        .inpaint(picture(400, 600), holes(400, 600, *corners), make_options(steps=3))
        .picture.pixels
        for memory in ("low", "fast")
    ]
    assert np.array_equal(*pictures)
    assert (pictures[0] != picture(400, 600).pixels).any()


def test_overlapping_squares_wait_for_each_other(watched):
    mask = holes(400, 600, (30, 40), (30, 130))
    squares = find_squares(mask, 128)
    assert len(squares) == 2
    assert len(apart(squares, mask.shape)) == 2
    seen, pixels = [], picture(400, 600)

    def options(seed):
        return make_options(steps=4, seed=seed, mask_dilate=0)

    result = InpaintPipeline(watched).inpaint(pixels, mask, options(0), lambda *step: seen.append(step))
    assert seen == [(step, 8) for step in range(1, 9)]
    assert watched.calls == [call for graph in GRAPHS for call in turn(graph)] * 2
    one_by_one = pixels
    for index, square in enumerate(squares):
        alone = np.zeros_like(mask)
        alone[window(square.crop, mask.shape)] = square.own(mask)
        one_by_one = InpaintPipeline(watched).inpaint(one_by_one, alone, options(seed=index)).picture
    assert np.array_equal(result.picture.pixels, one_by_one.pixels)


def test_runs_of_squares_that_share_no_pixel():
    a, b, c, d = (
        whole_square(crop, (64, 64)) for crop in (Crop(0, 0, 10), Crop(0, 10, 10), Crop(9, 19, 10), Crop(40, 40, 10))
    )
    assert apart([a, b, c, d], (64, 64)) == [[a, b], [c, d]]
    assert apart([a], (64, 64)) == [[a]]


def test_a_failed_picture_holds_no_memory(watched):
    def stop(_done, _total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InpaintPipeline(watched).inpaint(picture(), holes(128, 128, (50, 50)), make_options(steps=3), stop)
    assert not any(watched.is_loaded(graph) for graph in GRAPHS)


@pytest.mark.parametrize("memory", ["", "high", None, "Low"])
def test_another_policy_is_refused(toy_bundle, memory):
    with pytest.raises(InputError, match=r"memory .*: expected one of low, fast"):
        InpaintPipeline.from_bundle(toy_bundle.path, memory=memory)


def test_the_command_takes_it(run, monkeypatch):
    policies = []
    real = InpaintPipeline.inpaint

    def noted(self, *arguments):
        policies.append(self.memory)
        return real(self, *arguments)

    monkeypatch.setattr(InpaintPipeline, "inpaint", noted)
    for more in ([], ["--keep-loaded"]):
        code, _, _ = run("a.png", "--mask", "m.png", "--out", "o.png", "--steps", 2, "--overwrite", *more)
        assert code == 0
    assert policies == ["low", "fast"]
