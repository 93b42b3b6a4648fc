"""A build with our plugins: refused where it cannot be, registered before the parser, named in the graph.

Nothing of this is used unless MOEBIUS_TRT_PLUGIN=1 asks for it: no plugin has run on a GPU yet.
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
    """Registers the plugins with the library, for the GPU that the engines are for.

    Args:
        options: of the build.
        library: what builds.
        targets: compute capabilities, as `checks.check_options` gives them.

    Raises:
        InputError: an option that goes with no plugin.
        ExportError: this TensorRT has no ahead-of-time plugins; a package is missing; the GPU is not known; or the
            plugins are registered in this process for another GPU.
    """
    said = f"{SWITCH}=1"
    if library.backend == "tensorrt-rtx":
        raise InputError(
            f"{said}: tensorrt-rtx has no plugins that are compiled ahead of time; unset it, or build with TensorRT "
            "10.9 or newer on the GPU (--backend tensorrt)"
        )
    if options.precision == "bf16":
        raise InputError(f"{said} with --bf16: the plugin takes float32 and float16; unset it, or build with --fp16")
    if options.tuning.hardware_compatibility == "ampere+":
        raise InputError(
            f"{said} with --hardware-compatibility ampere+: the plugin is compiled for SM {targets[0]} alone; leave "
            "one of them out"
        )
    if options.tuning.strip_weights:
        raise InputError(
            f"{said} with --strip-weights: an engine is refitted from the ONNX file, which names no plugins; leave one "
            "of them out"
        )
    check_version(library.module)
    _import("onnx")
    (sm,) = targets
    register(library.module, _import("tensorrt.plugin"), sm)


def named(path: Path) -> tuple[int, bytes]:
    """How many nodes of an ONNX file a plugin takes, and the file's content with these nodes named.

    Its weights stay in their file.

    Raises:
        BundleError: it is no ONNX file.
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
    """What the plugins take, in words.

    Args:
        counts: nodes that they take, of each graph that is built.
        precision: of the files.

    Raises:
        ExportError: none, so that plugins were asked for in vain.
    """
    found = [f"{count} of {graph}" for graph, count in counts.items() if count]
    if not found:
        files = f"`moebius-export precision BUNDLE --to {precision} --keep LocalLambda` keeps them in typed files"
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
