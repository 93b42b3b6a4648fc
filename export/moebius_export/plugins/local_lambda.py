"""Registers `moebius::LocalLambda` as a TensorRT plugin: the engine contains PTX and runs without Python.

A Quick Deployable Plugin with an ahead-of-time implementation: TensorRT >= 10.9 (not TensorRT-RTX). It takes nodes of
the layout "convolution" (`moebius_export.graph.functions`): query, values, summary, window, with `heads` and `size`.

Off unless MOEBIUS_TRT_PLUGIN=1, because it has not run on a GPU yet. Without it TensorRT parses the function's body.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from moebius_export.errors import ExportError
from moebius_export.graph.function_bodies import DOMAIN
from moebius_export.plugins.ptx import check_compiler, compile_local_lambda, usable_tactics

if TYPE_CHECKING:
    import onnx

SWITCH = "MOEBIUS_TRT_PLUGIN"
PLUGIN_ID = f"{DOMAIN}::LocalLambda"
_OLDEST = (10, 9)
_REGISTERED: WeakKeyDictionary[ModuleType, int] = WeakKeyDictionary()  # tensorrt.plugin -> SM


def enabled() -> bool:
    """Whether the environment switches plugins on.

    Raises:
        ExportError: the variable is neither 0 nor 1.
    """
    value = os.environ.get(SWITCH, "0")
    if value not in ("0", "1"):
        raise ExportError(f"{SWITCH} is {value!r}; expected 1 to build with plugins or 0 without")
    return value == "1"


def name_plugins(model: onnx.ModelProto) -> int:
    """Sets `plugin_namespace` of every LocalLambda node to its domain, in place, so that the parser finds the plugin.

    Removes the function's body from the model, because the parsers of early TensorRT 10 prefer it to the plugin.
    Without the body, a missing plugin is an error.

    Returns:
        The number of nodes.

    Raises:
        ExportError: a node has another layout than "convolution", whose inputs do not fit the plugin.
    """
    import onnx

    count = 0
    for node in model.graph.node:
        if node.domain != DOMAIN or node.op_type != "LocalLambda":
            continue
        if len(node.input) != 4:
            raise ExportError(
                f"node {node.name!r}: LocalLambda with {len(node.input)} inputs; the plugin takes the 4 of the layout "
                "'convolution'. Export with --target tensorrt, or build without plugins"
            )
        kept = [attribute for attribute in node.attribute if attribute.name != "plugin_namespace"]
        del node.attribute[:]
        node.attribute.extend([*kept, onnx.helper.make_attribute("plugin_namespace", DOMAIN)])
        count += 1
    others = [one for one in model.functions if (one.domain, one.name) != (DOMAIN, "LocalLambda")]
    del model.functions[:]
    model.functions.extend(others)
    return count


def check_version(trt: Any) -> None:
    """Raises `ExportError` if TensorRT (the module) is too old for ahead-of-time plugins."""
    if tuple(int(part) for part in trt.__version__.split(".")[:2]) < _OLDEST:
        raise _too_old(trt)


def _too_old(trt: Any) -> ExportError:
    return ExportError(
        f"TensorRT {trt.__version__} has no ahead-of-time plugins; expected {_OLDEST[0]}.{_OLDEST[1]} or newer. "
        f"Unset {SWITCH} to build with the function's body"
    )


def register(trt: Any, trtp: Any, sm: int) -> None:
    """Registers the plugin with TensorRT for one GPU architecture per process.

    Args:
        trt, trtp: the modules `tensorrt` and `tensorrt.plugin`.
        sm: compute capability of the GPU that the engine is for, without its point.

    Raises:
        ExportError: this TensorRT has no ahead-of-time plugins; or the plugin is already registered for another
            architecture, or cannot be compiled for this one.
    """
    check_version(trt)
    if not hasattr(trtp, "aot_impl"):
        raise _too_old(trt)
    check_compiler(sm)
    if trtp in _REGISTERED:
        if _REGISTERED[trtp] != sm:
            raise ExportError(
                f"{PLUGIN_ID} is registered for SM {_REGISTERED[trtp]} in this process; build for SM {sm} in a new one"
            )
        return
    kinds = {trt.float32: "fp32", trt.float16: "fp16"}
    names = {"fp32": "FP32", "fp16": "FP16"}  # in the spelling of AutoTuneCombination

    def kind_of(query: Any) -> str:
        if query.dtype not in kinds:
            raise ExportError(f"LocalLambda of {query.dtype}: the plugin takes float32 and float16")
        return kinds[query.dtype]

    def describe(query, values, summary, window, heads, size):
        return query.like()  # [B, n, h*v], v = k

    def choose(query, values, summary, window, heads, size, outputs):
        kind = kind_of(query)
        found = usable_tactics(_picture(size), int(heads), window.shape[0], window.shape[1], kind, sm)
        return [trtp.AutoTuneCombination(", ".join([names[kind]] * 5), "LINEAR", found)]

    def compile_kernel(query, values, summary, window, heads, size, outputs, tactic):
        depth, reach = window.shape[0], window.shape[1]
        kernel = compile_local_lambda(_picture(size), int(heads), depth, reach, kind_of(query), sm, tactic)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y = kernel.grid
        launch.grid_z = query.shape_expr[0]  # the batch, known at run time
        launch.block_x = kernel.threads
        launch.shared_mem = kernel.shared
        return kernel.name, kernel.ptx, launch, trtp.SymIntExprs.from_tuple([])

    inputs = dict.fromkeys(("query", "values", "summary", "window"), trtp.TensorDesc)
    inputs |= {"heads": int, "size": npt.NDArray[np.int64]}
    outputs = {"outputs": tuple[trtp.TensorDesc]}
    compiled = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    trtp.register(PLUGIN_ID)(_typed(describe, inputs | {"return": trtp.TensorDesc}))
    trtp.autotune(PLUGIN_ID)(_typed(choose, inputs | outputs | {"return": list[trtp.AutoTuneCombination]}))
    trtp.aot_impl(PLUGIN_ID)(_typed(compile_kernel, inputs | outputs | {"tactic": int, "return": compiled}))
    _REGISTERED[trtp] = sm


def _typed(function: Callable[..., Any], annotations: dict[str, Any]) -> Callable[..., Any]:
    """Sets the annotations, which TensorRT reads as classes that exist only after its import."""
    function.__annotations__ = annotations
    return function


def _picture(size: npt.NDArray[np.int64]) -> tuple[int, int]:
    return int(size[0]), int(size[1])
