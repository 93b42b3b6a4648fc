"""ONNX Runtime sessions as the runtime makes them, with what a verification needs on top: a profile, more outputs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebius_runtime.backends.ort import OrtBackend, add_kernels, import_onnxruntime
from moebius_runtime.errors import BundleError
from moebius_runtime.hardware.processors import physical_cores

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass
class Profiled:
    """A session; `events` holds one entry per executed node once the `with` block has ended.

    `kernels` says what ran the model's functions, see `moebius_runtime.backends.ort.add_kernels`.
    """

    session: Any
    kernels: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def profiled_session(model: Path, changed: bytes | None = None, *, kernels: bool = True) -> Iterator[Profiled]:
    """A session of `ort-cpu` that profiles what it runs.

    Args:
        model: the ONNX file.
        changed: a changed model to run in its place, whose weights stay in the original's files.
        kernels: whether compiled kernels take what they can; without them the bodies of the functions are run.

    Raises:
        BundleError: ONNX Runtime cannot load the file.
    """
    with tempfile.TemporaryDirectory(prefix="moebius-profile-") as folder:
        options = _options()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        ran_by = add_kernels(options, model) if kernels else None
        if changed is not None:
            options.add_session_config_entry(_WEIGHTS_FOLDER, str(model.parent))
        profiled = Profiled(_session(changed or str(model), options, str(model)), ran_by)
        path = None
        try:
            yield profiled
        finally:
            path = profiled.session.end_profiling()
        profiled.events.extend(
            entry for entry in json.loads(Path(path).read_bytes()) if entry.get("cat") == "Node" and "args" in entry
        )


def session_of_functions(model: Path) -> Any:
    """A session of `ort-cpu` without compiled kernels, so that the bodies of the model's functions are run.

    Raises:
        BundleError: ONNX Runtime cannot load the file.
    """
    return _session(str(model), _options(), str(model))


def session_of_bytes(model: bytes, path: Path, kernels: bool) -> Any:
    """A session of a changed model in memory whose weights stay in the files of the original `path`, unoptimised.

    Without ONNX Runtime's own fusions, so that what is found is a fault of the file, or of the compiled kernels where
    these are asked for.

    Raises:
        BundleError: ONNX Runtime cannot load it.
    """
    options = _options()
    options.graph_optimization_level = import_onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_cpu_mem_arena = False  # it would double and keep what one run with many outputs needs
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(path.parent))
    if kernels:
        add_kernels(options, path)
    return _session(model, options, f"a graph of {path.parent}")


def _options() -> Any:
    options = import_onnxruntime().SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.log_severity_level = 4
    options.enable_mem_reuse = options.enable_mem_pattern = False  # see `moebius_runtime.backends.ort`
    return options


def _session(model: str | bytes, options: Any, name: str) -> Any:
    try:
        return import_onnxruntime().InferenceSession(model, options, providers=list(OrtBackend.providers))
    except Exception as error:  # its exceptions share no base class of their own
        raise BundleError(f"{name}: ONNX Runtime cannot load it: {' '.join(str(error).split())[:300]}") from error
