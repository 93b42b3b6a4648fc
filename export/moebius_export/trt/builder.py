"""One builder over the Python API of TensorRT 10.3 to 11 and TensorRT-RTX.

Networks are strongly typed everywhere: precision is in the graph. Versions 10 need a flag for that
(`NetworkDefinitionCreationFlag.STRONGLY_TYPED`), version 11 and RTX type strongly in any case and ignore it or have
none. What else differs is a member that is there or not, see `Library`.
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
    """TensorRT cannot read a graph. `problems` are all that its parser found, one line each, with file and node."""

    def __init__(self, path: Path, problems: Sequence[str], version: str) -> None:
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{path}: {version} cannot read it ({count}; the first: {problems[0]}). Export the bundle again, with "
            "--target tensorrt"
        )


class BuildError(ExportError):
    """The builder gave no engine."""


class Cancelled(Exception):  # noqa: N818
    """The build ended because it was asked to."""


@dataclass(frozen=True)
class Parsed:
    """A network. The parser is kept beside it: until the engine is built, the network's weights are the parser's.

    `plugins` counts the nodes that are plugins.
    """

    network: Any
    parser: Any
    plugins: int = 0


class EngineBuilder:
    """Parses and builds graphs with one library.

    Args:
        library: what parses and builds.
        plugins: nodes that our plugins exist for are named as these, which must be registered before.

    Raises:
        RuntimeUnavailableError: the library makes no builder, which for TensorRT means that there is no GPU.
    """

    def __init__(self, library: Library, plugins: bool = False) -> None:
        self.library = library
        self._plugins = plugins
        self.messages = Messages()
        self._logger = logger_for(library.module, self.messages)
        try:
            self._builder = library.module.Builder(self._logger)
        except (TypeError, RuntimeError) as error:
            said = self.messages.last if "nullptr" in str(error) else " ".join(str(error).split())
            raise RuntimeUnavailableError(
                f"{library.backend} {library.version} makes no builder here ({said}); it needs a GPU and its "
                "driver, see `moebius-export doctor`"
            ) from error

    def parse(self, path: Path, shapes: Mapping[str, Sequence[int]] | None = None) -> Parsed:
        """Reads an ONNX file, its functions inlined but for those that are plugins.

        Args:
            path: of the file; its weights lie beside it.
            shapes: of inputs that the file leaves open, for a network that is only looked at.

        Raises:
            ParseError: the parser does not take it.
            ExportError: a node does not have the inputs that its plugin takes.
        """
        module = self.library.module
        typed = getattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = self._builder.create_network(0 if typed is None else 1 << int(typed))
        parser = module.OnnxParser(network, self._logger)
        count, content = named(path) if self._plugins else (0, b"")
        # The path says where the weights of a file in memory lie.
        if not (parser.parse(content, str(path)) if count else parser.parse_from_file(str(path))):
            problems = [_problem(path, parser.get_error(index)) for index in range(parser.num_errors)]
            version = f"{self.library.backend} {self.library.version}"
            raise ParseError(path, problems or [self.messages.last], version)
        for index in range(network.num_inputs if shapes else 0):
            tensor = network.get_input(index)
            if shapes and tensor.name in shapes:
                tensor.shape = tuple(shapes[tensor.name])
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
        """The engine as a buffer of bytes.

        Args:
            parsed: the network.
            tuning: checked options.
            targets: compute capabilities, named where the library can name them.
            profile: smallest, best and largest shape of each input that is open.
            phases: told of the progress; its `stop` ends the build.
            cache: timings of earlier builds, updated.

        Raises:
            BuildError: the builder failed; the message holds what it said last.
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
        if not tuning.tf32:  # set by default, and it makes float32 products something else
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
    """Timings of kernels from earlier builds, opaque to us. TensorRT refuses those of another version or GPU."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.refused = False

    def give(self, config: Any) -> None:
        """Gives the timings to a build; where the library refuses them, the build begins without."""
        if not config.set_timing_cache(config.create_timing_cache(self.content), False):
            self.refused = True
            self.content = b""
            config.set_timing_cache(config.create_timing_cache(b""), False)

    def take(self, config: Any) -> None:
        """Takes the timings after a build."""
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
