"""Engines of a bundle's graphs, built, stamped with a passport, and moved into place together."""

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
from moebius_export.placing import placed_whole
from moebius_export.trt.builder import BuildError, Cancelled, EngineBuilder, Parsed, TimingCacheFile
from moebius_export.trt.checks import check_options
from moebius_export.trt.earlier import check_options_agree, keep_earlier
from moebius_export.trt.events import Built, Note, Report, Step
from moebius_export.trt.forecast import Forecast, graph_needs
from moebius_export.trt.library import Library, find_library
from moebius_export.trt.monitor import Phases
from moebius_export.trt.options import Batches, BuildOptions, Tuning
from moebius_export.trt.plugged import switch_on, taken_by_plugins
from moebius_runtime.bundle import Bundle
from moebius_runtime.errors import BundleError, InputError, OutputError
from moebius_runtime.files import atomic_write, check_writable, open_plain, sha256_file
from moebius_runtime.graph_files import tensor_bytes
from moebius_runtime.manifest import GraphInfo, GraphName
from moebius_runtime.passport import (
    ENGINES,
    Device,
    EngineInfo,
    Passport,
    Range,
    engine_file,
    folder_name,
    write_passport,
)

_MAX_CACHE = 1 << 30


@dataclass(frozen=True)
class Result:
    """Where the engines are, and their passport."""

    folder: Path
    passport: Passport


@dataclass(frozen=True)
class Ready:
    """The library that will build, and the compute capabilities that it will build for."""

    library: Library
    targets: tuple[int, ...]


def ready(options: BuildOptions, device: Device | None, report: Report) -> Ready:
    """What can be found out before there is a bundle, so that no export or plan is made for a build that is refused.

    Arguments as of `build_engines`.

    Raises:
        InputError: options that make no sense here.
        ExportError: plugins that cannot be had.
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
    """Builds the engines of a bundle that holds the files of the precision.

    The folder `engines/DEVICE-BACKENDVERSION-PRECISION` is exchanged when all of them are built; a build that fails,
    is interrupted or killed leaves the one that was there. Engines of other graphs that the folder holds stay in it;
    see `earlier.keep_earlier`.

    Args:
        bundle: see `prepare.ensure_precision`.
        options: what to build.
        device: the GPU of this machine, None where there is none.
        report: told of notes, the forecast, progress and each engine.
        found: what `ready` gave for these options; None asks it.

    Raises:
        InputError: options that make no sense here.
        BundleError: a file of the bundle is damaged.
        ExportError: a graph is not understood, surely does not fit, or its build failed; or the folder holds engines
            of other graphs that were built with other options.
        OutputError: the engines cannot be written.
        RuntimeUnavailableError: no TensorRT, or no GPU for it.
        KeyboardInterrupt: the user ended it.
    """

    def note(text: str) -> None:
        report(Note(text))

    found = found or ready(options, device, report)
    library, targets = found.library, found.targets
    profiles = {graph: _profile(bundle.graph(graph), options.batches, note) for graph in options.graphs}
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
    forecast = _forecast(builder, options, paths, profiles, device, report)
    report(forecast)
    if forecast.cannot_fit and not options.force:
        raise ExportError(
            f"weights, inputs and outputs alone need {forecast.least / 1e9:.1f} GB and {device.name if device else ''} "
            f"has {(forecast.free or 0) / 1e9:.1f} GB free: {'; '.join(forecast.advice)}; --force builds all the same"
        )
    _check_disk(out, forecast, options)
    with placed_whole(out) as folder:
        engines = dict[GraphName, EngineInfo]()
        for graph in options.graphs:
            engines[graph] = _engine(bundle, builder, options, graph, targets, profiles[graph], cache, folder, report)
        if cache is not None and cache.refused:
            note(f"--timing-cache {options.tuning.timing_cache}: of another GPU or version, so it was begun anew")
        kept = keep_earlier(bundle, out, folder, stamp, options.graphs, note)
        passport = Passport(**stamp, engines={**kept, **engines})
        write_passport(passport, folder)
    if cache is not None and options.tuning.timing_cache is not None:
        with atomic_write(options.tuning.timing_cache) as stream:
            stream.write(cache.content)
    return Result(out, passport)


def _engine(
    bundle: Bundle,
    builder: EngineBuilder,
    options: BuildOptions,
    graph: GraphName,
    targets: tuple[int, ...],
    profile: dict[str, Range],
    cache: TimingCacheFile | None,
    folder: Path,
    report: Report,
) -> EngineInfo:
    """Builds one engine into the folder."""
    started = time.perf_counter()
    path = bundle.model_file(graph, options.precision)
    phases = Phases(lambda phase, share: report(Step(graph, phase, share)))
    has_monitor = builder.library.has_monitor

    def work() -> Any:
        parsed: Parsed = builder.parse(path)
        return builder.build(parsed, options.tuning, targets, _open_only(profile), phases, cache)

    report(Step(graph, "parse" if has_monitor else "build", 0.0 if has_monitor else None))
    try:
        engine = in_thread(work, phases)
    except BuildError as error:
        raise BuildError(
            f"{graph}: {error}. Nothing was changed; more memory (--workspace), a lower --opt-level or "
            "another --precision may help, and `moebius-export doctor` looks at this machine"
        ) from error
    file = folder / engine_file(graph)
    with atomic_write(file) as stream:
        stream.write(memoryview(engine))
    seconds, size = time.perf_counter() - started, file.stat().st_size
    report(Built(graph, seconds, size, builder.messages.activations))
    stated = bundle.graph(graph).files[options.precision]
    files = bundle.manifest.files
    return EngineInfo(
        size=size,
        sha256=sha256_file(file),
        onnx_sha256=files[stated.model].sha256,
        weights_sha256=files[stated.weights].sha256 if stated.weights else None,
        plan_sha256=files[stated.plan].sha256 if stated.plan else None,
        shapes=profile,
        device_memory=builder.messages.activations,
        build_seconds=round(seconds, 3),
    )


def in_thread(work: Callable[[], Any], phases: Phases) -> Any:
    """Runs a build beside the main thread, so that an interrupt reaches us and not the builder's code in C++.

    The first interrupt asks the builder to end at its next step; a second one does not wait for it.
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
    """Shapes of every input; they differ only where the graph leaves the batch open."""
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
    """All inputs' shapes where any of them is open: a profile must have every input that is."""
    return profile if any(range_.min != range_.max for range_ in profile.values()) else {}


def _forecast(
    builder: EngineBuilder,
    options: BuildOptions,
    paths: dict[GraphName, Path],
    profiles: dict[GraphName, dict[str, Range]],
    device: Device | None,
    report: Report,
) -> Forecast:
    """Reads every graph once, so that a graph that is not understood is known before anything is built."""
    needs, plugins = [], dict[GraphName, int]()
    for graph, path in paths.items():
        report(Step(graph, "forecast", None))
        largest = {name: [int(size) for size in range_.max] for name, range_ in profiles[graph].items()}
        parsed = builder.parse(path, largest)
        plugins[graph] = parsed.plugins
        try:
            weights = tensor_bytes(path)
        except ValueError as error:
            raise BundleError(f"{path}: not an ONNX file ({error}). Export the bundle again.") from error
        batch = next(iter(largest.values()))[0]
        needs.append(graph_needs(graph, parsed.network, weights, 2 * batch))  # the U-Net makes two branches of each
        del parsed
    if options.plugins:
        report(Note(taken_by_plugins(plugins, options.precision)))
    free, name = (device.free_memory, device.name) if device and not options.sms else (None, None)
    return Forecast(tuple(needs), options.tuning.workspace, free, name)


def _timing_cache(tuning: Tuning, library: Library, note: Callable[[str], None]) -> TimingCacheFile | None:
    path = tuning.timing_cache
    if path is None or library.backend == "tensorrt-rtx":
        return None
    check_writable(path)
    try:
        with open_plain(path) as stream:
            content = stream.read(_MAX_CACHE + 1)
    except FileNotFoundError:
        note(f"--timing-cache {path}: not there yet, it is written after the build")
        return TimingCacheFile(b"")
    except OSError as error:
        raise InputError(f"--timing-cache {path}: {error.strerror}; name a file that can be read") from error
    if len(content) > _MAX_CACHE:
        raise InputError(f"--timing-cache {path}: over {_MAX_CACHE >> 20} MiB, so it is no timing cache")
    return TimingCacheFile(content)


def _check_disk(out: Path, forecast: Forecast, options: BuildOptions) -> None:
    """An engine holds its weights: where the disk cannot take those, better to know it now."""
    needed = 0 if options.tuning.strip_weights else sum(one.weights for one in forecast.needs)
    place = next(path for path in out.parents if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OutputError(
            f"cannot write {out}: the engines hold at least {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB "
            "free. Free some space, or move the bundle to another disk."
        )


def _stamp(library: Library, options: BuildOptions, targets: tuple[int, ...], device: Device | None) -> dict[str, Any]:
    """The fields of the passport of what is built now, without `engines`."""
    tuning = options.tuning
    here = device if not options.sms else None

    def word(switch: bool) -> str:
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
            "version_compatible": word(tuning.version_compatible),
            "strip_weights": word(tuning.strip_weights),
            "tf32": word(tuning.tf32),
            "plugins": word(options.plugins),
        },
    }
