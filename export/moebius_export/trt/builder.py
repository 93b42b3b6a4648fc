"""One builder over the Python API of TensorRT 10.3 to 11 and TensorRT-RTX.

Networks are strongly typed in every version: the graph decides the precision. Versions 10 need the flag
`NetworkDefinitionCreationFlag.STRONGLY_TYPED` for that; version 11 and RTX always type strongly. Other differences
between versions are members that exist or not, see `Library`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebius_export.errors import ExportError
from moebius_export.trt.checks import LEVELS
from moebius_export.trt.library import Library
from moebius_export.trt.monitor import Messages, Phases, logger_for, monitor_for
from moebius_export.trt.options import Tuning
from moebius_export.trt.plugins import named
from moebius_runtime.bundle.passport import Range
from moebius_runtime.errors import RuntimeUnavailableError


class ParseError(ExportError):
    """TensorRT cannot parse a graph. `problems` lists every error of the parser, one line each, with file and node."""

    def __init__(self, path: Path, problems: Sequence[str], version: str) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{path}: {version} cannot parse it ({count}; the first: {problems[0]}). Export the bundle again, with "
            "--target tensorrt"
        )


class BuildError(ExportError):
    """The builder returned no engine."""


class Cancelled(Exception):  # noqa: N818
    """The build was stopped by `Phases.stop`."""


@dataclass(frozen=True)
class Parsed:
    """A parsed network. The parser must outlive it, because it owns the network's weights until the engine is built.

    `plugins` is the number of nodes that plugins take.
    """

    network: Any
    parser: Any
    plugins: int = 0


class EngineBuilder:
    """Parses and builds graphs with one library.

    Args:
        library: the TensorRT to use.
        plugins: give LocalLambda nodes to the project's plugin, which must already be registered.

    Raises:
        RuntimeUnavailableError: the library creates no builder, which for TensorRT means that there is no GPU.
    """

    def __init__(self, library: Library, plugins: bool = False) -> None:
        self.library = library
        self._plugins = plugins
        self.messages = Messages()
        self._logger = logger_for(library.module, self.messages)
        try:
            self._builder = library.module.Builder(self._logger)
        except (TypeError, RuntimeError) as error:
            reason = self.messages.last if "nullptr" in str(error) else " ".join(str(error).split())
            raise RuntimeUnavailableError(
                f"{library.backend} {library.version} cannot create a builder here ({reason}); it needs a GPU and its "
                "driver, see `moebius-export doctor`"
            ) from error

    def parse(self, path: Path) -> Parsed:
        """Parses an ONNX file into a strongly typed network. Functions are inlined, except those that plugins take.

        Args:
            path: of the file; its weights are beside it.

        Raises:
            ParseError: the parser rejects the file.
            ExportError: a node does not have the inputs that its plugin takes.
        """
        module = self.library.module
        typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        parser = module.OnnxParser(network, self._logger)
        count, content = named(path) if self._plugins else (0, b"")
        # The path tells the parser where the external weights are.
        if not (parser.parse(content, str(path)) if count else parser.parse_from_file(str(path))):
            problems = [_problem(path, parser.get_error(index)) for index in range(parser.num_errors)]
            version = f"{self.library.backend} {self.library.version}"
            raise ParseError(path, problems or [self.messages.last], version)
        return Parsed(network, parser, count)

    def build(
        self,
        parsed: Parsed,
        tuning: Tuning,
        targets: Sequence[int],
        profile: Mapping[str, Range],
        phases: Phases,
        cache: TimingCacheFile | None,
    ) -> Any:
        """Builds the serialized engine, a buffer of bytes.

        Args:
            parsed: the network.
            tuning: validated options.
            targets: compute capabilities; set only in a library that can build for other GPUs.
            profile: smallest, best and largest shape of each input if any of them is open, else empty.
            phases: receives the progress; its `stop` ends the build.
            cache: kernel timings of earlier builds, updated by this one.

        Raises:
            BuildError: the builder failed; the message holds its last errors.
            Cancelled: `phases.stop` was called.
        """
        self.messages.clear()
        config = self._config(tuning, targets)
        if profile:
            self._add_profile(config, profile)
        if cache is not None:
            cache.give(config)
        if self.library.has_monitor:
            monitor = monitor_for(self.library.module, phases)  # must outlive the build
            config.progress_monitor = monitor
        engine = self._builder.build_serialized_network(parsed.network, config)
        if phases.problem is not None:
            raise phases.problem
        if phases.stopped:
            raise Cancelled
        if engine is None:
            raise BuildError(f"the builder failed: {self.messages.last}")
        if cache is not None:
            cache.take(config)
        return engine

    def _config(self, tuning: Tuning, targets: Sequence[int]) -> Any:
        module, library = self.library.module, self.library
        config = self._builder.create_builder_config()
        if not tuning.tf32:  # on by default, and it rounds the factors of float32 matmuls and convolutions
            config.clear_flag(module.BuilderFlag.TF32)
        if tuning.version_compatible:
            config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
        if tuning.strip_weights:
            config.set_flag(module.BuilderFlag.STRIP_PLAN)
        if tuning.workspace is not None:
            config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, tuning.workspace)
        if tuning.opt_level is not None:
            config.builder_optimization_level = tuning.opt_level
        if tuning.hardware_compatibility != "none":
            config.hardware_compatibility_level = library.level(LEVELS[tuning.hardware_compatibility])
        if library.names_targets:
            config.num_compute_capabilities = len(targets)
            for index, sm in enumerate(targets):
                if not config.set_compute_capability(getattr(module.ComputeCapability, f"SM{sm}"), index):
                    raise BuildError(f"the builder refuses SM {sm}: {self.messages.last}")
        return config

    def _add_profile(self, config: Any, profile: Mapping[str, Range]) -> None:
        shapes = self._builder.create_optimization_profile()
        for name, range_ in profile.items():
            shapes.set_shape(name, min=tuple(range_.min), opt=tuple(range_.opt), max=tuple(range_.max))
        if config.add_optimization_profile(shapes) < 0:
            raise BuildError(f"the builder refuses the shapes: {self.messages.last}")


class TimingCacheFile:
    """The content of a timing cache, opaque to us. TensorRT refuses one of another version or GPU."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.refused = False

    def give(self, config: Any) -> None:
        """Sets the cache of a build. If the library refuses it, sets an empty one and `refused`."""
        if not config.set_timing_cache(config.create_timing_cache(self.content), False):
            self.refused = True
            self.content = b""
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def take(self, config: Any) -> None:
        """Stores the cache after a build."""
        cache = config.get_timing_cache()
        if cache is not None:
            self.content = bytes(cache.serialize())


def _problem(path: Path, error: Any) -> str:
    """A parser's error on one line."""
    description = " ".join(str(error.desc()).split())[:400]
    number, name = error.node(), str(getattr(error, "node_name", lambda: "")())
    operator = str(getattr(error, "node_operator", lambda: "")())
    where = f"node {name or number}" + (f" ({operator})" if operator else "")
    return f"{path}: {where if number >= 0 or name else 'the file'}: {description}"
