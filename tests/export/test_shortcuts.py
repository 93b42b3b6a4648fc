"""What torch's exporter is spared: the graphs are those that it makes without."""

import contextlib

import pytest
import torch
from torch import nn

import moebius.network.layer_ops  # noqa: F401  registers the operators that have functions
from moebius_export.onnx_export import convert
from moebius_export.onnx_export.convert import GraphSpec, to_onnx
from moebius_export.onnx_export.shortcuts import shortcuts

_fx_passes = pytest.importorskip("torch.onnx._internal.exporter._fx_passes", reason="a torch with other internals")


class Layers(nn.Module):
    """Operators that have ONNX functions, a cast that does nothing, and what `more` adds."""

    def __init__(self, more) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.LayerNorm(4), nn.Linear(8, 4)
        self.more = more

    def forward(self, x):
        x = self.norm(self.first(x)).to(torch.float32).flatten(2).transpose(1, 2)
        return self.more(torch.softmax(self.last(x), -1))


def add_in_place(x):
    y = x * 2
    y.add_(1)
    return y


def operators(more, monkeypatch, on: bool) -> tuple[list[str], int]:
    """The graph's operators in order, and how often the exporter decomposed."""
    calls = []
    decompose = _fx_passes.decompose_with_registry
    monkeypatch.setattr(_fx_passes, "decompose_with_registry", lambda *a: calls.append(1) or decompose(*a))
    if not on:
        monkeypatch.setattr(convert, "shortcuts", contextlib.nullcontext)
    torch.manual_seed(0)
    model = to_onnx(GraphSpec("g", Layers(more).eval(), {"x": torch.randn(1, 3, 4, 4)}, "y"), lambda stage: None)
    monkeypatch.undo()
    return [node.op_type for node in model.graph.node], len(calls)


@pytest.mark.parametrize(
    ("more", "decomposed"),
    [(torch.sigmoid, 0), (torch.square, 1), (add_in_place, 1), (lambda x: x.to(torch.float64), 1)],
    ids=["known", "without a function", "in place", "a cast"],
)
def test_only_a_program_that_needs_it_is_decomposed(more, decomposed, monkeypatch):
    with_shortcuts, calls = operators(more, monkeypatch, on=True)
    assert calls == decomposed
    without, calls = operators(more, monkeypatch, on=False)
    assert calls == 1
    assert with_shortcuts == without


def test_torch_is_left_as_it_was():
    from torch.onnx._internal.exporter._registration import onnxscript_apis

    before = _fx_passes.decompose_with_registry, onnxscript_apis.get_torchlib_ops
    with contextlib.suppress(ValueError), shortcuts():
        assert _fx_passes.decompose_with_registry is not before[0]
        raise ValueError
    assert before == (_fx_passes.decompose_with_registry, onnxscript_apis.get_torchlib_ops)


def test_a_torch_with_other_internals_exports_too(monkeypatch):
    monkeypatch.delattr(_fx_passes, "decompose_with_registry")
    with shortcuts():
        pass
