"""The fast form of the λ layers against the form as written: outputs, every gradient, statistics, and the student."""

import copy

import pytest
import torch

from moebius import Moebius, preset
from moebius.network.lambda_layers import InteractiveLambda, LocalLambda, set_lambda_form
from moebius.network.lambda_ops import _Tiles, eager_tile, local_lambda, local_lambda_reference
from moebius.weights.load import load_student

# float64 on both sides, sums in another order; batch norms in training mode multiply the rounding by 1/std.
TOLERANCE = 1e-10


class Twice(torch.nn.Module):
    """A layer on its batch of one twice over, and the mean of both: the same function, also in training mode.

    Autograd through the form as written is wrong at batch 1: PyTorch 2.13's batch norm on a CPU mixes up the axes of a
    gradient that comes channels last to an input that is channels first. (Finite differences agree with the fast form.)
    """

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, *inputs):
        return self.layer(*(v.repeat(2, 1, 1) if isinstance(v, torch.Tensor) else v for v in inputs)).mean(0, True)


def step(layer, form, x, *rest):
    """Output, gradients of the inputs and of every parameter, and the buffers, from a copy of the layer."""
    layer = copy.deepcopy(layer)
    set_lambda_form(layer, form)
    inputs = [value.clone().requires_grad_() if isinstance(value, torch.Tensor) else value for value in (x, *rest)]
    doubled = form == "reference" and x.shape[0] == 1
    output = (Twice(layer) if doubled else layer)(*inputs)
    output.backward(torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(5)))
    found = {f"input {i}": value.grad for i, value in enumerate(inputs) if isinstance(value, torch.Tensor)}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    found |= {name: buffer.double() for name, buffer in layer.named_buffers()}
    return {"output": output.detach()} | found


def agree(layer, *inputs):
    expected, got = step(layer, "reference", *inputs), step(layer, "fast", *inputs)
    assert expected.keys() == got.keys()
    if inputs[0].shape[0] == 1:  # a running variance is over n - 1, which a doubled batch changes
        expected = {name: value for name, value in expected.items() if "running_var" not in name}
    assert all(value is not None for value in got.values())
    errors = {
        name: float((got[name] - value).norm() / value.norm().clamp(min=1e-9)) for name, value in expected.items()
    }
    assert max(errors.values()) < TOLERANCE, errors


def perturbed(layer):
    """Biases, gains and running statistics that are not zeros and ones."""
    with torch.no_grad():
        for value in layer.state_dict().values():
            if value.is_floating_point():
                value += 0.3 * torch.rand_like(value)
    return layer


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (6, 12), (16, 16), (9, 4)])
@pytest.mark.parametrize("batch", [1, 3])
def test_local_lambda(size, batch, train):
    torch.manual_seed(0)
    layer = perturbed(LocalLambda(20, 4, 7).double()).train(train)
    agree(layer, torch.randn(batch, size[0] * size[1], 20, dtype=torch.float64), size)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
@pytest.mark.parametrize("batch", [1, 3])
def test_interactive_lambda(size, batch, train):
    """Contexts differ from row to row."""
    torch.manual_seed(0)
    positions = size[0] * size[1]
    layer = perturbed(InteractiveLambda(20, 4, positions, 6, 11).double()).train(train)
    x = torch.randn(batch, positions, 20, dtype=torch.float64)
    agree(layer, x, torch.randn(batch, 6, 11, dtype=torch.float64), size)


@pytest.mark.parametrize("tiles", [1, 3, 1000])
def test_runs_of_tiles(tiles, monkeypatch):
    """One at a time, a number that leaves a rest and straddles pictures, all at once."""
    query, values, summary, window = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 64, 12), (2, 64, 4), (2, 4, 4), (4, 5, 5))
    )
    plan = _Tiles(query, window, (8, 8), (2, 4))
    band = plan.places * plan.heads * plan.near_size * 8
    monkeypatch.setattr("moebius.network.lambda_ops._BANDS_BYTES", tiles * band)
    assert len(_Tiles(query, window, (8, 8), (2, 4)).runs()) == -(-16 // tiles)
    inputs = (query, values, summary, window)
    outputs = local_lambda(*inputs, (8, 8), (2, 4)), local_lambda_reference(*inputs, (8, 8))
    found = [[y.detach(), *torch.autograd.grad(y.square().sum(), inputs)] for y in outputs]
    for got, expected in zip(*found, strict=True):
        assert float((got - expected).norm() / expected.norm()) < TOLERANCE


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_of_the_student(checkpointing):
    """Two branches in one batch; also through recomputed blocks. float64, so that only algebra could differ."""
    found = []
    for form in ("reference", "fast"):
        model = load_student("stand-in:0", preset("tiny").student)[0].double().train()
        model.set_lambda_form(form)
        model.diff_model.gradient_checkpointing = checkpointing and form == "fast"
        torch.manual_seed(0)
        sample = torch.randn(2, 9, 16, 16, dtype=torch.float64)
        ids = torch.stack([model.unconditional_ids, model.conditional_ids])
        noise = model.diff_model(sample, torch.tensor([10, 900]), model.embedding_layer(ids))[0]
        noise.square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
    for name, expected in found[0].items():
        # Gradients pass through a whole network in training mode, which enlarges 1e-15 by its condition.
        torch.testing.assert_close(found[1][name], expected, rtol=1e-7, atol=1e-10, msg=name)


def test_the_form_as_written_is_the_default_and_comes_back():
    model = Moebius(preset("tiny").student)
    layers = [m for m in model.modules() if isinstance(m, LocalLambda | InteractiveLambda)]
    assert {layer.form for layer in layers} == {"reference"}
    before = list(model.state_dict())
    model.set_lambda_form("fast")
    assert {layer.form for layer in layers} == {"fast"}
    assert list(model.state_dict()) == before
    model.set_lambda_form("reference")
    assert {layer.form for layer in layers} == {"reference"}
    with pytest.raises(ValueError, match="expected 'reference', 'fast' or 'triton'"):
        model.set_lambda_form("quick")


@pytest.mark.parametrize(("size", "tile"), [((64, 64), (4, 4)), ((9, 10), (3, 2)), ((7, 5), (1, 1))])
def test_the_eager_tile_divides(size, tile):
    assert eager_tile(*size) == tile


@pytest.mark.parametrize("layer", ["local", "interactive"])
def test_autocast_runs_the_fast_form_as_it_runs_the_written_one(layer):
    """bfloat16 products in both; within 3 % of float32, and gradients in the parameters' own type."""
    torch.manual_seed(0)
    if layer == "local":
        module, inputs = LocalLambda(32, 4, 5), (torch.randn(2, 48, 32), (6, 8))
    else:
        module, inputs = InteractiveLambda(32, 4, 48, 3, 20), (torch.randn(2, 48, 32), torch.randn(2, 3, 20), (6, 8))
    perturbed(module)
    exact = module(*inputs)
    for form in ("reference", "fast"):
        set_lambda_form(module, form)
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = module(*inputs)
        assert output.dtype == torch.bfloat16
        assert (output - exact).norm() < 0.03 * exact.norm(), form
        output.float().square().sum().backward()
        assert all(parameter.grad.dtype == torch.float32 for parameter in module.parameters())
