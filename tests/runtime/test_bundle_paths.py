"""Bundles in unusual places: the advice of each refusal is followed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from moebius_runtime.errors import BundleError
from moebius_runtime.pipeline import InpaintPipeline


@pytest.mark.skipif(sys.platform != "linux", reason="paths of other systems are UTF-8")
@pytest.mark.parametrize("name", [b"b\xfcn", b"\xff\xfe/deeper/\x80", "ünö".encode()])
def test_a_path_that_is_not_utf8(toy_bundle, tmp_path, name):
    place = tmp_path / os.fsdecode(name)
    shutil.copytree(toy_bundle.path, place)
    pipeline = InpaintPipeline.from_bundle(place, threads=1)
    for graph in ("vae_encoder", "unet", "vae_decoder"):  # each has its weights in a file of its own
        pipeline.backend.load(graph)


@pytest.mark.skipif(sys.platform == "win32", reason="no cp")
def test_a_bundle_of_links(toy_bundle, tmp_path):
    """As the hub's cache keeps files: the copy that the message asks for runs."""
    links = tmp_path / "links"
    shutil.copytree(toy_bundle.path, links, copy_function=lambda source, target: os.symlink(source, target))
    pipeline = InpaintPipeline.from_bundle(links, threads=1)
    with pytest.raises(BundleError, match=r"a link that leaves the bundle.*`cp -rL BUNDLE COPY`") as caught:
        pipeline.backend.load("unet")
    command = str(caught.value).split("`")[1].split()
    subprocess.run([{"BUNDLE": links, "COPY": tmp_path / "copy"}.get(word, word) for word in command], check=True)
    InpaintPipeline.from_bundle(tmp_path / "copy", threads=1).backend.load("unet")
