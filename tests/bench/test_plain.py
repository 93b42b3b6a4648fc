"""`--baseline plain`. The export is played by a function; that it makes plain bundles is tested with the export."""

import shutil

import pytest

from moebius_bench.measure.plain import plain_bundle
from moebius_bench.measure.processes import Answer
from moebius_bench.measure.rounds import Plan
from moebius_runtime.bundle.manifest import Rewrite, read_manifest, write_manifest
from moebius_runtime.errors import InputError, RuntimeUnavailableError


def changed(folder, **parts):
    write_manifest(read_manifest(folder).model_copy(update=parts), folder)
    return folder


@pytest.fixture
def fused(tiny_copy):
    """A bundle that says that it was rewritten."""
    return changed(tiny_copy, rewrites=[Rewrite(graph="unet", name="local-lambda", count=6)])


def test_the_same_weights_are_exported_as_written(fused, tiny_bundle):
    jobs = []

    def run(job):
        jobs.append(job)
        shutil.copytree(tiny_bundle, job.out)
        return Answer({"rewrites": 0})

    with plain_bundle(str(fused), Plan(), run) as folder:
        assert read_manifest(folder).rewrites == []
    (job,) = jobs
    assert (job.kind, job.weights, job.vae) == ("export", "stand-in:0", "stand-in:0")
    with pytest.raises(Exception, match="expected a bundle folder"):
        read_manifest(folder)  # gone with the block


def test_named_sources_are_used(fused, tiny_bundle):
    def run(job):
        assert (job.weights, job.vae) == ("my.bin", "vae/")
        return Answer(None, "there is no file my.bin")

    with (
        pytest.raises(RuntimeUnavailableError, match=r"could not be exported: there is no file my\.bin"),
        plain_bundle(str(fused), Plan(weights="my.bin", vae="vae/"), run),
    ):
        pass


def test_an_unfused_bundle_needs_no_baseline(tiny_bundle):
    with pytest.raises(InputError, match="is itself an unfused bundle"), plain_bundle(str(tiny_bundle), Plan()):
        pass


def test_weights_that_are_not_stand_ins_must_be_named(fused):
    model = read_manifest(fused).model
    unet = model.unet.model_copy(update={"stand_in": False, "origin": "hub:a/b"})
    changed(fused, model=model.model_copy(update={"unet": unet}))
    with (
        pytest.raises(InputError, match="exports hub:a/b again; name its source with --weights"),
        plain_bundle(str(fused), Plan()),
    ):
        pass


def test_an_export_that_is_not_plain_is_refused(fused):
    def run(job):
        shutil.copytree(fused, job.out)
        return Answer({"rewrites": 1})

    with pytest.raises(RuntimeUnavailableError, match="rewrote the graph"), plain_bundle(str(fused), Plan(), run):
        pass


def test_other_weights_are_refused(fused, tiny_bundle):
    def run(job):
        shutil.copytree(tiny_bundle, job.out)
        model = read_manifest(job.out).model
        vae = model.vae.model_copy(update={"sha256": "0" * 64})
        from pathlib import Path

        changed(Path(job.out), model=model.model_copy(update={"vae": vae}))
        return Answer({"rewrites": 0})

    with (
        pytest.raises(InputError, match="not those that the bundle was exported from"),
        plain_bundle(str(fused), Plan(), run),
    ):
        pass
