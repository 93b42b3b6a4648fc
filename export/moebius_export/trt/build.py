"""Builds the engines of a bundle with their passport, and moves them into place together.

An engine passport (`passport.json`) records what engines were built from, with what, and for which GPU.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from moebius_export.errors import ExportError
from moebius_export.trt.builder import BuildError, Cancelled, EngineBuilder, Parsed, TimingCacheFile
from moebius_export.trt.checks import check_options
from moebius_export.trt.earlier import check_options_agree, keep_earlier
from moebius_export.trt.events import Built, Note, Report, Stage, Step
from moebius_export.trt.forecast import Forecast, GraphNeeds, graph_needs, input_shapes
from moebius_export.trt.library import Library, find_library
from moebius_export.trt.monitor import Phases
from moebius_export.trt.options import Batches, BuildOptions, Tuning
from moebius_export.trt.plugins import switch_on, taken_by_plugins
from moebius_runtime.bundle.bundle import Bundle
from moebius_runtime.bundle.graph_files import tensor_bytes
from moebius_runtime.bundle.manifest import GraphInfo, GraphName
from moebius_runtime.bundle.passport import (
    ENGINES,
    Device,
    EngineInfo,
    Passport,
    Range,
    engine_file,
    folder_name,
    write_passport,
)
from moebius_runtime.errors import BundleError, InputError, OutputError
from moebius_runtime.files import atomic_write, check_writable, open_plain, placed_whole, sha256_file

_MAX_CACHE = 1 << 30


@dataclass(frozen=True)
class Result:
    """The folder of the engines and their passport."""

    folder: Path
    passport: Passport


@dataclass(frozen=True)
class Ready:
    """The library that builds, and the compute capabilities that it builds for."""

    library: Library
    targets: tuple[int, ...]


def ready(options: BuildOptions, device: Device | None, report: Report) -> Ready:
    """Finds the library and the targets, and validates the options against them.

    This needs no bundle, so a build that is refused never costs an export or a precision plan. Arguments as of
    `build_engines`.

    Raises:
        InputError: an option that the library or the GPU does not support.
        ExportError: the plugins cannot be registered.
        RuntimeUnavailableError: no TensorRT, or no GPU for it.
    """

    def note(text: str) -> None:
        report(Note(text))

    library = find_library(options.backend, bool(options.sms), note)
    targets = check_options(options, library, device, note)
    if options.plugins:
        switch_on(options, library, targets)
    return Ready(library, targets)


def build_engines(
    bundle: Bundle, options: BuildOptions, device: Device | None, report: Report, found: Ready | None = None
) -> Result:
    """Parses the graphs of a bundle, forecasts the memory of their engines, and builds them.

    Each graph is parsed once: the network that the forecast counts is the one that is built. The smallest is built
    first and freed, so the largest is built while no other network is in memory.

    The folder `engines/DEVICE-BACKENDVERSION-PRECISION` is replaced only when all engines are built. A build that
    fails, is interrupted or killed leaves the old folder. Engines of other graphs in it stay, see
    `earlier.keep_earlier`.

    Args:
        bundle: holds files of the precision, see `prepare.prepare`.
        options: what to build.
        device: the GPU of this machine, None where there is none.
        report: called with each event, see `events`.
        found: the result of `ready` for these options; None calls it.

    Raises:
        InputError: an option that the library, the GPU or the bundle does not support.
        BundleError: a file of the bundle is damaged.
        ExportError: a graph cannot be parsed, its memory surely does not suffice, or its build failed; or the folder
            holds engines of other graphs that were built with other options.
        OutputError: the engines cannot be written.
        RuntimeUnavailableError: no TensorRT, or no GPU for it.
        KeyboardInterrupt: the user interrupted the build.
    """

    def note(text: str) -> None:
        report(Note(text))

    found = found or ready(options, device, report)
    library, targets = found.library, found.targets
    profiles = {graph: _profile(bundle.graph(graph), options.batches, note) for graph in options.graphs}
    report(Stage("parse", f"{options.precision} files of {', '.join(options.graphs)}"))
    paths = {}
    for graph in options.graphs:
        report(Step(graph, "hash", None))
        paths[graph] = bundle.model_file(graph, options.precision)
    cache = _timing_cache(options.tuning, library, note)
    builder = EngineBuilder(library, options.plugins)
    here = device.name if device and not options.sms else f"sm{'+'.join(map(str, targets))}"
    out = bundle.path / ENGINES / folder_name(here, library.backend, library.version, options.precision)
    stamp = _stamp(library, options, targets, device)
    check_options_agree(out, stamp, options.graphs)
    parsed, needs = _parse(builder, paths, profiles, report)
    if options.plugins:
        note(taken_by_plugins({graph: one.plugins for graph, one in parsed.items()}, options.precision))
    free, name = (device.free_memory, device.name) if device and not options.sms else (None, None)
    forecast = Forecast(needs, options.tuning.workspace, free, name)
    report(forecast)
    if forecast.cannot_fit and not options.force:
        raise ExportError(
            f"weights, inputs and outputs alone need {forecast.least / 1e9:.1f} GB and {name} has "
            f"{(free or 0) / 1e9:.1f} GB free: {'; '.join(forecast.advice)}; --force builds all the same"
        )
    _check_disk(out, forecast, options)
    report(Stage("build", f"{len(needs)} engine(s) with {library.backend} {library.version}, the smallest first"))
    with placed_whole(out) as folder:
        engines = dict[GraphName, EngineInfo]()
        for graph in sorted(parsed, key={one.graph: one.weights for one in needs}.__getitem__):
            engines[graph] = _engine(
                bundle, builder, options, graph, parsed.pop(graph), targets, profiles[graph], cache, folder, report
            )
        if cache is not None and cache.refused:
            note(f"--timing-cache {options.tuning.timing_cache}: of another GPU or version, so it was started anew")
        kept = keep_earlier(bundle, out, folder, stamp, options.graphs, note)
        passport = Passport(**stamp, engines={**kept, **{graph: engines[graph] for graph in options.graphs}})
        write_passport(passport, folder)
    if cache is not None and options.tuning.timing_cache is not None:
        with atomic_write(options.tuning.timing_cache) as stream:
            stream.write(cache.content)
    return Result(out, passport)


def _parse(
    builder: EngineBuilder,
    paths: dict[GraphName, Path],
    profiles: dict[GraphName, dict[str, Range]],
    report: Report,
) -> tuple[dict[GraphName, Parsed], tuple[GraphNeeds, ...]]:
    """Parses every graph before any is built, and counts the memory of its engine at the largest batch."""
    parsed, needs = dict[GraphName, Parsed](), []
    for graph, path in paths.items():
        report(Step(graph, "parse", None))
        parsed[graph] = builder.parse(path)
        try:
            weights = tensor_bytes(path)
        except ValueError as error:
            raise BundleError(f"{path}: not an ONNX file ({error}). Export the bundle again.") from error
        largest = {name: [int(size) for size in range_.max] for name, range_ in profiles[graph].items()}
        batch = next(iter(largest.values()))[0]
        with input_shapes(parsed[graph].network, largest):
            # An open dimension inside the U-Net is that of its two guidance branches.
            needs.append(graph_needs(graph, parsed[graph].network, weights, 2 * batch))
    return parsed, tuple(needs)


def _engine(
    bundle: Bundle,
    builder: EngineBuilder,
    options: BuildOptions,
    graph: GraphName,
    parsed: Parsed,
    targets: tuple[int, ...],
    profile: dict[str, Range],
    cache: TimingCacheFile | None,
    folder: Path,
    report: Report,
) -> EngineInfo:
    """Builds one engine into the folder and returns its passport entry."""
    started = time.perf_counter()
    phases = Phases(lambda phase, share: report(Step(graph, phase, share)))
    report(Step(graph, "build", 0.0 if builder.library.has_monitor else None))
    try:
        engine = in_thread(
            lambda: builder.build(parsed, options.tuning, targets, _open_only(profile), phases, cache), phases
        )
    except BuildError as error:
        raise BuildError(
            f"{graph}: {error}. Nothing was changed; more memory (--workspace), a lower --opt-level or "
            "another precision may help, and `moebius-export doctor` checks this machine"
        ) from error
    file = folder / engine_file(graph)
    with atomic_write(file) as stream:
        stream.write(memoryview(engine))
    seconds, size = time.perf_counter() - started, file.stat().st_size
    report(Built(graph, seconds, size, builder.messages.activations))
    source, files = bundle.graph(graph).files[options.precision], bundle.manifest.files
    return EngineInfo(
        size=size,
        sha256=sha256_file(file),
        onnx_sha256=files[source.model].sha256,
        weights_sha256=files[source.weights].sha256 if source.weights else None,
        plan_sha256=files[source.plan].sha256 if source.plan else None,
        shapes=profile,
        device_memory=builder.messages.activations,
        build_seconds=round(seconds, 3),
    )


def in_thread(work: Callable[[], Any], phases: Phases) -> Any:
    """Runs a build in a thread of its own and returns its result, so that Python handles Ctrl-C while C++ code runs.

    The first interrupt ends the build at its next step; a second one does not wait for that.
    """
    outcome: list[tuple[bool, Any]] = []
    ended = threading.Event()  # Thread.join and is_alive of Python 3.10 and 3.11 are wrong after an interrupt

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:
            outcome.append((False, error))
        finally:
            ended.set()

    threading.Thread(target=run, name="build", daemon=True).start()
    try:
        while not ended.wait(0.1):
            pass
    except KeyboardInterrupt:
        phases.stop()
        while not ended.wait(0.1):
            pass
        raise
    good, value = outcome[0]
    if good:
        return value
    if isinstance(value, Cancelled):
        raise KeyboardInterrupt from value
    raise value


def _profile(info: GraphInfo, batches: Batches, note: Callable[[str], None]) -> dict[str, Range]:
    """The smallest, best and largest shape of every input. They differ only where the graph leaves the batch open."""
    fixed = all(isinstance(size, int) for tensor in info.inputs for size in tensor.shape)
    if fixed and batches.named:
        raise InputError(
            f"--min-batch, --opt-batch, --max-batch: this bundle's graphs take {info.inputs[0].shape[0]} picture(s), "
            "fixed when it was exported; export with --dynamic-batch, or leave them out"
        )
    sizes = (1, 1, 1) if fixed else batches.resolved()
    shapes = {}
    for tensor in info.inputs:
        ranges = [[size if isinstance(entry, str) else entry for entry in tensor.shape] for size in sizes]
        shapes[tensor.name] = Range(min=list(ranges[0]), opt=list(ranges[1]), max=list(ranges[2]))
    if not fixed and not batches.named:
        note("the bundle leaves the number of pictures open: built for 1; --max-batch builds for more")
    return shapes


def _open_only(profile: dict[str, Range]) -> dict[str, Range]:
    """The shapes of all inputs where one of them is open, else none: an optimization profile needs every open input."""
    return profile if any(range_.min != range_.max for range_ in profile.values()) else {}


def _timing_cache(tuning: Tuning, library: Library, note: Callable[[str], None]) -> TimingCacheFile | None:
    path = tuning.timing_cache
    if path is None or library.backend == "tensorrt-rtx":
        return None
    check_writable(path)
    try:
        with open_plain(path) as stream:
            content = stream.read(_MAX_CACHE + 1)
    except FileNotFoundError:
        note(f"--timing-cache {path}: it does not exist yet and is written after the build")
        return TimingCacheFile(b"")
    except OSError as error:
        raise InputError(f"--timing-cache {path}: {error.strerror}; name a file that can be read") from error
    if len(content) > _MAX_CACHE:
        raise InputError(f"--timing-cache {path}: over {_MAX_CACHE >> 20} MiB, so it is no timing cache")
    return TimingCacheFile(content)


def _check_disk(out: Path, forecast: Forecast, options: BuildOptions) -> None:
    """Raises `OutputError` before the build if the disk has no room for the weights, which the engines contain."""
    needed = 0 if options.tuning.strip_weights else sum(one.weights for one in forecast.needs)
    place = next(path for path in out.parents if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"cannot write {out}: the engines hold at least {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB "
            "free. Free some space, or move the bundle to another disk."
        )


def _stamp(library: Library, options: BuildOptions, targets: tuple[int, ...], device: Device | None) -> dict[str, Any]:
    """The passport's fields except `engines`."""
    tuning = options.tuning
    here = device if not options.sms else None

    def on_off(switch: bool) -> str:
        return "on" if switch else "off"

    return {
        "schema_version": 1,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "backend": library.backend,
        "backend_version": library.version,
        "precision": options.precision,
        "gpu": here.name if here else None,
        "sm": list(targets),
        "driver": here.driver if here else None,
        "cuda": here.cuda if here else None,
        "flags": {
            "opt_level": "default" if tuning.opt_level is None else str(tuning.opt_level),
            "workspace": "default" if tuning.workspace is None else str(tuning.workspace),
            "hardware_compatibility": tuning.hardware_compatibility,
            "version_compatible": on_off(tuning.version_compatible),
            "strip_weights": on_off(tuning.strip_weights),
            "tf32": on_off(tuning.tf32),
            "plugins": on_off(options.plugins),
        },
    }
