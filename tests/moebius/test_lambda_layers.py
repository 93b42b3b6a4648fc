"""Both λ layers against the original implementation: outputs and every gradient, eval and train mode."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moebius.network.lambda_layers import InteractiveLambda, LocalLambda, set_crop, set_lambda_form
from moebius.weights.load import tensor_specs
from moebius.weights.stand_in import stand_in_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"

# Both sides are float32 with sums of up to a few thousand terms; the golden files' own statement is 1e-5.
TOLERANCE = 1e-5


def relative(got, expected):
    return float((got.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("form", ["reference", "fast"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["local_r15", "local_r5", "interactive"])
def test_outputs_and_gradients(name, mode, form):
    golden = np.load(GOLDEN / "lambda_layers.npz")

    def tensor(key):
        return torch.from_numpy(golden[f"{name}_{mode}_{key}"])

    local = name.startswith("local")
    layer = LocalLambda(64, 4, int(name[7:])) if local else InteractiveLambda(64, 4, 64, 10, 24)
    specs = {f"{name}.{key}": spec for key, spec in tensor_specs(layer).items()}
    weights = stand_in_state_dict(specs, seed=0)
    layer.load_state_dict({key.removeprefix(f"{name}."): value for key, value in weights.items()})
    layer.train(mode == "train")
    set_lambda_form(layer, form)
    x = tensor("x").requires_grad_()
    inputs = [x, (12, 12)]
    if not local:
        context = tensor("context").requires_grad_()
        inputs = [x, context, (8, 8)]

    y = layer(*inputs)
    y.backward(tensor("grad_out"))

    assert relative(y.detach(), tensor("y")) < TOLERANCE
    gradients = {key: parameter.grad for key, parameter in layer.named_parameters()}
    gradients["x"] = x.grad
    if not local:
        gradients["context"] = context.grad
    prefix = f"{name}_{mode}_grad_"
    expected = {key.removeprefix(prefix) for key in golden if key.startswith(prefix)} - {"out"}
    assert set(gradients) == expected
    errors = {key: relative(gradient, tensor(f"grad_{key}")) for key, gradient in gradients.items()}
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("form", ["reference", "fast"])
def test_a_crop_gets_the_embeddings_of_its_place(form):
    """Interactive-λ has no neighbourhood: at each position of a crop its output is that of the whole picture."""
    generator = torch.Generator().manual_seed(0)
    layer = InteractiveLambda(32, 4, 64, 6, 24).eval()
    set_lambda_form(layer, form)
    x, context = torch.randn(2, 64, 32, generator=generator), torch.randn(2, 6, 24, generator=generator)
    with torch.no_grad():
        whole = layer(x, context, (8, 8)).unflatten(1, (8, 8))
        for top, left, height, width in ((0, 0, 4, 4), (4, 2, 4, 6), (2, 0, 5, 3)):
            set_crop(layer, (top / 8, left / 8))
            view = (slice(None), slice(top, top + height), slice(left, left + width))
            part = layer(x.unflatten(1, (8, 8))[view].flatten(1, 2), context, (height, width))
            torch.testing.assert_close(part.unflatten(1, (height, width)), whole[view], rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x, context, (8, 8)).unflatten(1, (8, 8)), whole), "a whole picture has no place"
        set_crop(layer, None)
        with pytest.raises(RuntimeError):
            layer(x[:, :16], context, (4, 4))
