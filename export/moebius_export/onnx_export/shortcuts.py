"""Two things that torch's exporter need not do for our graphs: half of the time of an export.

Both are internals of torch. Where a newer torch has others, the export does without and takes longer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import fx


@contextlib.contextmanager
def shortcuts() -> Iterator[None]:
    """Within it, the functions of onnxscript are parsed once, not for each graph, and a program whose operators all
    have ONNX functions is not traced again to decompose
    them. The graphs are the same to the node; intermediate values may be numbered differently."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter import _decomp, _fx_passes
            from torch.onnx._internal.exporter._registration import onnxscript_apis

            decompose, operators = _fx_passes.decompose_with_registry, _decomp.get_onnx_implemented_overloads

            def decompose_if_needed(program: torch.export.ExportedProgram, registry: Any) -> Any:
                _drop_casts_to_the_same_type(program)
                known = {*operators(registry), torch.ops.aten._assert_tensor_metadata.default}  # dropped later
                return program if _targets(program) <= known else decompose(program, registry)

            stack.enter_context(_replaced(_fx_passes, "decompose_with_registry", decompose_if_needed))
            stack.enter_context(_replaced(onnxscript_apis, "get_torchlib_ops", _functions_of(onnxscript_apis)))
        yield


@contextlib.contextmanager
def _replaced(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _targets(program: torch.export.ExportedProgram) -> set[Any]:
    """What the program calls; what changes its inputs counts as unknown, as decomposing makes it functional."""
    called = set()
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            called |= {node.target for node in module.graph.nodes if node.op == "call_function"}
    return {None if getattr(target, "_schema", None) and target._schema.is_mutable else target for target in called}


def _drop_casts_to_the_same_type(program: torch.export.ExportedProgram) -> None:
    """`to(dtype)` has no ONNX function; in float32 modules it does nothing."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.to.dtype and len(node.args) == 2 and not node.kwargs:
            source, dtype = node.args
            last = any(user.op == "output" for user in node.users)
            if not last and source.meta["val"].dtype == dtype:
                node.replace_all_uses_with(source)
                graph.erase_node(node)


@functools.cache
def _functions_of(apis: Any) -> Any:
    return functools.cache(apis.get_torchlib_ops)
