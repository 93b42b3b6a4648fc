"""Builds with the project's TensorRT plugins: validates the options, registers the plugins, names them in the graph.

Used only with MOEBIUS_TRT_PLUGIN=1, because no plugin has run on a GPU yet.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from moebius_export.errors import ExportError
from moebius_export.plugins.local_lambda import SWITCH, check_version, name_plugins, register
from moebius_export.trt.library import Library
from moebius_export.trt.options import BuildOptions
from moebius_runtime.bundle.manifest import GraphName, Precision
from moebius_runtime.errors import BundleError, InputError


def switch_on(options: BuildOptions, library: Library, targets: tuple[int, ...]) -> None:
    """Registers the plugins with the library for the target GPU.

    Args:
        options: options of the build.
        library: the TensorRT that builds.
        targets: compute capabilities, from `checks.check_options`.

    Raises:
        InputError: an option that excludes plugins.
        ExportError: this TensorRT has no ahead-of-time plugins; a package is missing; the GPU is not supported; or the
            plugins are registered in this process for another GPU.
    """
    switch = f"{SWITCH}=1"
    if library.backend == "tensorrt-rtx":
        raise InputError(
            f"{switch}: tensorrt-rtx has no ahead-of-time plugins; unset it, or build with TensorRT "
            "10.9 or newer on the GPU (--backend tensorrt)"
        )
    if options.precision == "bf16":
        raise InputError(f"{switch} with --bf16: the plugin takes float32 and float16; unset it, or build with --fp16")
    if options.tuning.hardware_compatibility == "ampere+":
        raise InputError(
            f"{switch} with --hardware-compatibility ampere+: the plugin is compiled for SM {targets[0]} alone; leave "
            "one of them out"
        )
    if options.tuning.strip_weights:
        raise InputError(
            f"{switch} with --strip-weights: an engine is refitted from the ONNX file, which names no plugins; leave "
            "one of them out"
        )
    check_version(library.module)
    _import("onnx")
    (sm,) = targets
    register(library.module, _import("tensorrt.plugin"), sm)


def named(path: Path) -> tuple[int, bytes]:
    """Counts the nodes of an ONNX file that a plugin takes, and returns the count with the model that names the plugin.

    The weights stay in their external file.

    Raises:
        BundleError: it is not an ONNX file.
        ExportError: a node does not have the inputs that the plugin takes.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError as error:
        raise BundleError(f"{path}: not an ONNX file ({error}). Export the bundle again.") from error
    try:
        return name_plugins(model), model.SerializeToString()
    except ExportError as error:
        raise ExportError(f"{path}: {error}") from error


def taken_by_plugins(counts: Mapping[GraphName, int], precision: Precision) -> str:
    """Describes the nodes that plugins take.

    Args:
        counts: number of such nodes, by graph.
        precision: precision of the files.

    Raises:
        ExportError: there is no such node in any graph.
    """
    found = [f"{count} of {graph}" for graph, count in counts.items() if count]
    if not found:
        files = (
            f"`moebius-export precision BUNDLE --to {precision} --keep LocalLambda` keeps them in mixed-precision files"
        )
        if precision == "fp32":
            files = "fp32 files of `moebius-export onnx --target tensorrt` have them"
        raise ExportError(
            f"{SWITCH}=1, and no node of {', '.join(counts)} can take the plugin: there is no LocalLambda in the "
            f"{precision} files; {files}. Unset {SWITCH} to build without"
        )
    return (
        f"{SWITCH}=1: LocalLambda nodes ({', '.join(found)}) become plugins. These have not run on a GPU yet: compare "
        "the pictures with those of engines built without"
    )


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(
            f"{SWITCH}=1 needs {name}, which cannot be imported ({error}); install it, or unset {SWITCH}"
        ) from error
