"""Measures pictures in a worker: a short cold one, as a user runs it, then the warm ones that count."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from moebius_bench.measure.results import PictureRun, WorkerResult
from moebius_bench.measure.variants import TORCH
from moebius_bench.measure.worker_job import Job
from moebius_runtime.errors import InputError, OutputError

if TYPE_CHECKING:
    from moebius_runtime.backends import Backend
    from moebius_runtime.bundle.manifest import GraphName, Precision
    from moebius_runtime.images.masks import BoolArray
    from moebius_runtime.images.pictures import Picture
    from moebius_runtime.pipeline import InpaintOptions, InpaintPipeline

_CONSTANT = 2  # levels of 255: a masked region whose values span less is flat


def import_runtime(runtime: str, baseline: bool = False) -> None:
    """Imports everything that a first picture needs, so that the import is timed separately.

    What the GPU's runtimes and `torch` import is part of their first picture's time instead.
    """
    importlib.import_module("moebius_runtime.pipeline")
    if runtime == TORCH and baseline:
        importlib.import_module("moebius_export.network.torch_runtime").import_torch()
    elif runtime.startswith("ort-"):
        importlib.import_module("moebius_runtime.backends.ort").import_onnxruntime()


def measure(job: Job, import_seconds: float) -> WorkerResult:
    """Runs a job's pictures.

    Raises:
        OutputError: a picture is NaN, flat, or not the same as the one before it.
        MoebiusError: the bundle, runtime or picture cannot be used; the message says why.
    """
    from moebius_runtime.pipeline import InpaintPipeline, make_options

    backend = make_backend(job)
    pipeline = InpaintPipeline(backend)  # as `moebius-inpaint` makes it: each graph loaded for its turn
    picture, mask = picture_and_mask(job, pipeline.manifest.geometry.image_size)
    common = {"mode": job.mode, "guidance_scale": job.guidance_scale, "seed": job.seed}
    options = make_options(steps=job.steps, **common)
    pipeline.check(options)
    # Strength 1 runs every step of its few; the full strength's picture follows.
    short = make_options(steps=job.warmup_steps, strength=1.0, **common)
    with _loads(backend) as loaded:
        cold, first = _timed_picture(pipeline, picture, mask, short)
    graphs = list(dict.fromkeys(loaded))  # a run asks for its graph once more
    _check_output(first, mask)
    load_seconds = {str(graph): value for graph, value in zip(graphs, cold.stages["load"], strict=True)}
    peak = peak_memory()  # before all graphs are held at once
    pipeline = InpaintPipeline(backend, memory="fast")
    for graph in graphs:
        backend.load(graph)
    _warm_up(backend, graphs[1])
    pictures, hashes = [], []
    for _ in range(job.repeats):
        run, pixels = _timed_picture(pipeline, picture, mask, options)
        _check_output(pixels, mask)
        pictures.append(run)
        hashes.append(hashlib.sha256(pixels.tobytes()).hexdigest())
    if len(set(hashes)) > 1:
        raise OutputError("two pictures of one process differ though seed and input are the same; nothing was timed")
    if job.out is not None:
        np.save(job.out, pixels, allow_pickle=False)
    return WorkerResult(
        import_seconds=import_seconds,
        load_seconds=load_seconds,
        cold=cold,
        pictures=pictures,
        peak_memory=peak,
        output_sha256=hashes[0],
        described=backend.describe(),
    )


def make_backend(job: Job) -> Backend:
    """The runtime of a job with its bundle; the torch baseline is the unfused network on the CPU."""
    from moebius_runtime.backends import create_backend
    from moebius_runtime.bundle.bundle import Bundle

    bundle = Bundle.open(job.bundle)
    if job.runtime == TORCH and job.baseline:
        from moebius_export.network.torch_runtime import TorchBackend

        if job.precision != "fp32":
            raise InputError(f"--precision {job.precision}: the torch baseline is the unfused network in fp32")
        return TorchBackend(bundle, threads=job.threads, weights=job.weights, vae=job.vae, device="cpu")
    return create_backend(bundle, job.runtime, threads=job.threads, precision=cast("Precision", job.precision))


@contextmanager
def _loads(backend: Backend) -> Iterator[list[GraphName]]:
    """The graphs that the backend loads meanwhile, in order: which ones depends on mode, mask and runtime."""
    loaded: list[GraphName] = []
    load = backend.load

    def noted(graph: GraphName) -> None:
        loaded.append(graph)
        load(graph)

    backend.load = noted  # type: ignore[method-assign]
    try:
        yield loaded
    finally:
        del backend.load  # the class's own again


def _warm_up(backend: Backend, graph: GraphName) -> None:
    """One run on zeros: a new session's first run is slower than the rest."""
    zeros = {
        tensor.name: np.zeros([1 if isinstance(size, str) else size for size in tensor.shape], tensor.dtype)
        for tensor in backend.bundle.graph(graph).inputs
    }
    backend.run(graph, zeros)


def picture_and_mask(job: Job, size: int) -> tuple[Picture, BoolArray]:
    """The job's picture and mask, or a drawn picture of the bundle's size with a quarter of it masked."""
    from moebius_runtime.images.masks import load_mask
    from moebius_runtime.images.pictures import load_picture, picture_from_image

    if job.image is not None:
        picture = load_picture(Path(job.image))
        return picture, load_mask(Path(job.mask), picture.shape) if job.mask else _central(*picture.shape)
    from PIL import Image

    return picture_from_image(Image.fromarray(drawn_picture(size, job.seed))), _central(size, size)


def drawn_picture(size: int, seed: int) -> npt.NDArray[np.uint8]:
    """A seeded picture [size, size, 3] with smooth colours, edges and fine grain, as photographs have."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:size, 0:size] / size
    channels = [
        np.sin(2 * np.pi * (rng.uniform(0.5, 2) * x + rng.uniform(0.5, 2) * y + rng.uniform())) for _ in range(3)
    ]
    picture = 128 + 80 * np.stack(channels, axis=-1)  # [size, size, 3]
    picture[(x + y) % 0.25 < 0.125] -= 24
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)


def _central(height: int, width: int) -> BoolArray:
    mask = np.zeros((height, width), dtype=np.bool_)
    mask[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    return mask


def _timed_picture(
    pipeline: InpaintPipeline, picture: Picture, mask: BoolArray, options: InpaintOptions
) -> tuple[PictureRun, npt.NDArray[Any]]:
    began = time.monotonic()
    started = time.perf_counter()
    result = pipeline.inpaint(picture, mask, options)
    total = time.perf_counter() - started
    return PictureRun(stages=result.seconds, total=total, began=began), result.picture.to_rgb()


def _check_output(pixels: npt.NDArray[Any], mask: BoolArray) -> None:
    """Checks that the masked region is not one flat colour; the pipeline checks for NaN and flat pictures."""
    if int(np.ptp(pixels[mask])) < _CONSTANT:
        raise OutputError("the masked region is one flat colour, so its time means nothing; check the bundle")


def peak_memory() -> int:
    """The most host memory that this process has held, in bytes.

    Linux: VmHWM, which starts at 0 for each program; getrusage may include the peak of the parent. Windows: the peak
    of the working set.

    Raises:
        OSError: Windows does not answer.
    """
    try:
        with open("/proc/self/status", encoding="ascii") as stream:
            for line in stream:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform == "win32":
        return _peak_working_set()
    import resource  # noqa: TID251

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class _ProcessMemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of psapi.h."""

    _fields_ = (
        ("size", ctypes.c_uint32),
        ("page_faults", ctypes.c_uint32),
        ("peak_working_set", ctypes.c_size_t),
        ("others", ctypes.c_size_t * 7),
    )


def _peak_working_set() -> int:
    if sys.platform != "win32":
        raise OSError("only Windows has a working set")
    library = ctypes.WinDLL("kernel32", use_last_error=True)
    library.GetCurrentProcess.restype = ctypes.c_void_p
    found = _ProcessMemoryCounters(size=ctypes.sizeof(_ProcessMemoryCounters))
    library.K32GetProcessMemoryInfo.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32)
    if not library.K32GetProcessMemoryInfo(library.GetCurrentProcess(), ctypes.byref(found), found.size):
        raise ctypes.WinError(ctypes.get_last_error())
    return int(found.peak_working_set)
