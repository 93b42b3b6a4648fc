"""The baseline of `--baseline plain`: the bundle's network exported again without any rewrite."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moebius_bench.jobs import Job
from moebius_bench.processes import Runner, run_worker
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import InputError, RuntimeUnavailableError

if TYPE_CHECKING:
    from moebius_bench.running import Plan


def export_plain(job: Job) -> dict[str, int]:
    """The worker's side: exports the job's weights as written to its folder, and says how many rewrites there were."""
    from moebius_export.torch_runtime import import_torch

    import_torch()
    from moebius.errors import CheckpointError
    from moebius_export.bundle import ExportOptions, export_onnx

    ours = Bundle.open(job.bundle).manifest
    assert job.weights
    assert job.vae
    assert job.out
    try:
        guidance = ours.defaults.guidance_scale
        options = ExportOptions(job.weights, job.vae, ours.model.preset, rules=(), guidance_scale=guidance)
        manifest = export_onnx(job.out, options)
    except CheckpointError as error:
        raise InputError(f"--baseline plain: {error}") from error
    return {"rewrites": len(manifest.rewrites)}


@contextmanager
def plain_bundle(folder: str, plan: Plan, run: Runner = run_worker) -> Iterator[str]:
    """The folder of an unfused bundle of the same network and weights, removed when the block ends.

    Exporting takes minutes and needs torch.

    Raises:
        InputError: the bundle is itself unfused, its weights must be named, or those named are others.
        RuntimeUnavailableError: the export failed, or what it wrote is not plain.
    """
    manifest = Bundle.open(folder).manifest
    if not manifest.rewrites:
        raise InputError(f"{folder} is itself an unfused bundle; --baseline plain is for a fused one")
    sources = []
    for option, given, weights in (
        ("--weights", plan.weights, manifest.model.unet),
        ("--vae", plan.vae, manifest.model.vae),
    ):
        if given is None and not weights.stand_in:
            raise InputError(f"--baseline plain exports {weights.origin} again; name its source with {option}")
        sources.append(given or weights.origin)
    with tempfile.TemporaryDirectory(prefix="moebius-plain-") as temporary:
        out = str(Path(temporary) / "plain")
        job = Job(kind="export", runtime="torch", bundle=folder, weights=sources[0], vae=sources[1], out=out)
        answer = run(job)
        if answer.result is None:
            raise RuntimeUnavailableError(f"--baseline plain: it could not be exported: {answer.error}")
        plain = Bundle.open(out).manifest
        if answer.result["rewrites"] or plain.rewrites:
            raise RuntimeUnavailableError("--baseline plain: the export rewrote the graph; nothing was measured")
        made, wanted = plain.model, manifest.model
        if (made.unet.sha256, made.vae.sha256) != (wanted.unet.sha256, wanted.vae.sha256):
            raise InputError("--baseline plain: the named weights are not those that the bundle was exported from")
        yield out
